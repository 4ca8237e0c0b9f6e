"""Your own domains: one pretrained ResNet, every method, the papers' table.

    python -m experiments.multi_domain --data DIR --backbone resnet18 \\
        --weights resnet18.safetensors

DIR holds one `.npz` file (x_train, y_train, x_test, y_test, optionally class_names)
or one image folder (train/CLASS/*.jpg, test/CLASS/*.jpg) for each domain. Training
data is split in a training and a validation part; where a rate has several candidates
the validation part chooses, and the test images are looked at once. Without --data
the domain is scikit-learn's handwritten digits.

Rows: the methods of `ftn_jax.presets`, by default feature extractor (new head on a
frozen network), BN + head, FTN at each rank and init, fine-tuning; `--methods all`
takes the whole shelf, each method at its published size or, with `--budget 0.05`, at
one common size. Expected order of the means, from FTN (arXiv 2310.06124) Tables 1 and
2: feature extractor < BN + head < FTN R=1 < larger ranks <= fine-tuning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.apply import Apply, from_linen
from ftn_jax.command import launch
from ftn_jax.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Compose,
    Domain,
    Flip,
    Normalize,
    RandomCrop,
    Resize,
    Step,
    ToRGB,
    Transform,
    find_domains,
    load_digits,
    load_domain,
)
from ftn_jax.method import Backbone
from ftn_jax.models import RESNETS
from ftn_jax.optimizer import Schedule
from ftn_jax.parallel import Layout
from ftn_jax.presets import RESNET
from ftn_jax.pretrained import load_resnet
from ftn_jax.results import Results
from ftn_jax.selection import Select
from ftn_jax.shelf import Shelf, contenders
from ftn_jax.sweep import ChooseOn, Contender, sweep
from ftn_jax.tables import report


@dataclass(frozen=True)
class Config(Shelf):
    """Settings of the multi-domain experiment."""

    data: Path | None = None
    """Folder of the domains; without it, scikit-learn's handwritten digits."""
    backbone: str = "cifar_resnet20"
    """Name in ftn_jax.models.RESNETS: resnet18, resnet50, cifar_resnet20, ..."""
    weights: str | None = None
    """Checkpoint (.safetensors, .pth, .th, .npz) or hub name (hf://owner/repo)."""
    weights_classes: int | None = None
    """Classes of the checkpoint's head; default: 1000, or 10 for CIFAR ResNets."""
    workdir: Path = Path("runs/multi_domain")
    """Folder for the table, the picture and the saved tasks."""
    domains: tuple[str, ...] = ()
    """Names of the domains in the data folder; all if empty."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of init, data order and augmentation; the table gives mean and std."""
    image_px: int = 32
    """Images are resized to this height and width."""
    crop_padding: int = 4
    """Training images are cropped at random after padding by so many pixels."""
    flip: bool = False
    """Also mirror training images; wrong for digits, letters and signs."""
    skip_bad: bool = False
    """Leave out images that do not decode (named and counted) instead of stopping."""
    max_train: int | None = None
    """Use at most so many training images of each domain, balanced over classes."""
    max_test: int | None = None
    """Use at most so many test images of each domain, drawn at random."""
    validation: float = 0.1
    """Share of the training images that is held out to choose rates; a domain with
    validation images of its own keeps all, and those choose."""
    choose_on: ChooseOn = "each"
    """Choose rates on each domain, or on the first one for all of them."""
    select: Select = "last"
    """Which epoch of a run counts: the last, the best on held-out training images, or,
    as the code that the papers compare with does, the best on test images: that one
    flatters, and is for comparison with printed numbers alone."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    bf16: bool = False
    """Compute in bfloat16; factors, norms and optimizer stay in float32."""
    mesh: str | None = None
    """Devices to use: data=8, or data=4,model=2 to split the backbone too; default:
    one. docs/batch_jobs.md has recipes."""
    local_batch_norm: bool = False
    """On several devices, let BatchNorm see each one's part of the batch alone."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            backbone="cifar_resnet8",
            workdir=Path("runs/multi_domain_tiny"),
            ranks=(2,),
            image_px=16,
            crop_padding=2,
            max_train=128,
            max_test=64,
            epochs=1,
        )


def load_backbone(cfg: Config) -> Backbone:
    """Build the network and read its weights; without weights it stays random."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    classes = {"num_classes": cfg.weights_classes} if cfg.weights_classes else {}
    model = RESNETS[cfg.backbone](**classes)

    def network(classes: int) -> Apply:
        return from_linen(model.clone(num_classes=classes))

    if cfg.weights is None:
        print("warning: no --weights: the backbone is random, the numbers mean little")
        image = jnp.zeros((1, cfg.image_px, cfg.image_px, 3))
        fresh = model.init(jax.random.key(0), image)
        params, batch_stats = fresh["params"], fresh["batch_stats"]
    else:
        params, batch_stats = load_resnet(cfg.weights, model)
    return Backbone(network, params, {"batch_stats": batch_stats}, RESNET)


def load_domains(cfg: Config) -> list[Domain]:
    """Read the domains that were asked for, capped at the sizes asked for."""
    if cfg.data is None:
        domains = [load_digits()]
    else:
        found = find_domains(cfg.data, cfg.domains or None)
        domains = [load_domain(p, skip_bad=cfg.skip_bad) for p in found.values()]
    return [d.limited(train=cfg.max_train, test=cfg.max_test) for d in domains]


def transforms(cfg: Config) -> tuple[Compose, Compose]:
    """Make the training and the evaluation transform."""
    resize: list[Step] = [Resize(cfg.image_px, cfg.image_px)]
    random: list[Step] = [RandomCrop(cfg.image_px, padding=cfg.crop_padding)]
    last: list[Step] = [ToRGB(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    flip: list[Step] = [Flip()] if cfg.flip else []
    return Compose(resize + random + flip + last), Compose(resize + last)


def main(cfg: Config) -> Results:
    """Adapt the backbone to every domain by every method; print the table."""
    backbone, domains = load_backbone(cfg), load_domains(cfg)
    train_transform, eval_transform = transforms(cfg)
    results = fill(
        cfg,
        "multi_domain",
        backbone,
        domains,
        contenders(cfg, backbone),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    report(results)
    return results


def fill(
    cfg: Config,
    experiment: str,
    backbone: Backbone,
    domains: Sequence[Domain],
    rows: Mapping[str, Contender],
    *,
    train_transform: Transform | Mapping[str, Transform],
    eval_transform: Transform | Mapping[str, Transform],
    schedule: Schedule = "cosine",
) -> Results:
    """Train what the workdir's results lack, under an experiment's name."""
    results = Results(
        cfg.workdir,
        experiment=experiment,
        config=asdict(cfg),
        free=(
            "data",
            "workdir",
            "domains",
            "methods",
            "budget",
            "ranks",
            "inits",
            "seeds",
            "mesh",
            "placements",
            "dropouts",
            "svd_ranks",
            "check",
        ),
    )
    sweep(
        backbone,
        domains,
        rows,
        results=results,
        recipe=Recipe(
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            rates={},
            schedule=schedule,
            compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
        ),
        train_transform=train_transform,
        eval_transform=eval_transform,
        seeds=cfg.seeds,
        validation=cfg.validation,
        choose_on=cfg.choose_on,
        layout=Layout.for_run(cfg.mesh, local_batch_norm=cfg.local_batch_norm),
        select=cfg.select,
        workdir=cfg.workdir,
    )
    return results


if __name__ == "__main__":
    launch(Config, main)
