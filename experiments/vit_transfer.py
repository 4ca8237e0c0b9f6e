"""The transformer table from nothing: train a small ViT, then adapt it to domains.

    python -m experiments.vit_transfer --data DIR --pretrain-data DIR/cifar10.npz

A small Vision Transformer is trained on one domain, `--pretrain-data` or drawn capital
letters, by AdamW with warm-up, frozen, and adapted to the domains of `--data` (one
`.npz` file or image folder for each), or to drawn ones, by the rows of the papers'
table: feature extractor, FTN on output or on query and value kernels, LoRA,
KAdaptation, SVFT, fine-tuning; `--methods all` adds LayerNorm, biases, SSF and FTN on
more kernels. Every method trains by Adam at one learning rate for all that it trains,
chosen for each domain from one grid on a fifth of the training images.

The table has the FLOPs of a training step as compiled, and seconds per epoch.
`experiments.clip_transfer` is the same table for CLIP ViT-B/32. Without flags it takes
minutes on two CPU cores. docs/transformers.md has a run on real images with its
command, its cost and its table, which is the expected result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.apply import Apply, from_linen
from ftn_jax.command import launch
from ftn_jax.data import (
    CenterCrop,
    Compose,
    Domain,
    Normalize,
    RandomCrop,
    ResizeShort,
    Step,
    ToRGB,
    describe,
    digest,
    find_domains,
    load_domain,
)
from ftn_jax.data.embedded import embedded_source, embedded_targets
from ftn_jax.method import Backbone
from ftn_jax.models import ViT
from ftn_jax.presets.vit import VIT, fine_tuning
from ftn_jax.pretrain import pretrain
from ftn_jax.results import Results
from ftn_jax.sweep import Contender
from ftn_jax.trial import short_hash
from ftn_jax.vit_table import (
    ALL_GROUPS,
    PAPER_ROWS,
    VitMethod,
    vit_contenders,
    vit_table,
)


@dataclass(frozen=True)
class Config:
    """Settings of the small transformer table."""

    workdir: Path = Path("runs/vit_transfer")
    """Folder for the table, the picture, the backbone and the saved tasks."""
    data: Path | None = None
    """Folder of the domains; None for drawn ones."""
    domains: tuple[str, ...] = ()
    """Names of the domains; all if empty."""
    methods: tuple[VitMethod, ...] = PAPER_ROWS
    """Rows of the table: names of ftn_jax.presets.vit, or all of them."""
    rank: int = 4
    """Rank of FTN and LoRA."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of init, data order and augmentation; the table gives mean and std."""
    validation: float = 0.2
    """Share of the training images that chooses the rates."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Candidate peak rates, each for all that a method trains."""
    weight_decay: float = 0.0
    """Of all that is trained."""
    crop_padding: int = 0
    """Training images are cropped at random after padding by so many pixels."""
    max_train: int | None = None
    """Use at most so many training images of each domain, balanced over classes."""
    max_test: int | None = None
    """Use at most so many test images of each domain."""
    image_px: int = 32
    """Height and width of the images."""
    patch_px: int = 8
    """Side of the ViT's patches."""
    width: int = 96
    """Channels of the ViT, a multiple of 3."""
    depth: int = 4
    """Blocks of the ViT."""
    pretrain_data: Path | None = None
    """Domain (.npz or image folder) of the pretraining; None draws one."""
    pretrain_epochs: int = 20
    """Passes over it."""
    pretrain_rate: float = 1e-3
    """AdamW's peak rate there, after two epochs of warm-up."""
    pretrain_decay: float = 0.05
    """AdamW's weight decay there."""
    pretrain_limit: int | None = None
    """Use at most so many images of it."""
    bf16: bool = False
    """Compute in bfloat16; factors, norms and optimizer stay in float32."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/vit_transfer_tiny"),
            domains=("digits",),
            methods=("linear_probe", "ftn_qv"),
            width=24,
            depth=1,
            epochs=1,
            rates=(3e-3,),
            max_train=128,
            max_test=64,
            pretrain_epochs=3,
            pretrain_limit=128,
        )


def build(cfg: Config, classes: int) -> ViT:
    """Build the network."""
    return ViT(
        classes,
        image_px=cfg.image_px,
        patch_px=cfg.patch_px,
        width=cfg.width,
        depth=cfg.depth,
        heads=3,
    )


def transforms(cfg: Config, crop_padding: int) -> tuple[Compose, Compose]:
    """Make the training and the evaluation transform."""
    resize: list[Step] = [ResizeShort(cfg.image_px), CenterCrop(cfg.image_px)]
    last: list[Step] = [ToRGB(), Normalize((0.5,) * 3, (0.5,) * 3)]
    random: list[Step] = []
    if crop_padding:
        random = [RandomCrop(cfg.image_px, padding=crop_padding)]
    return Compose(resize + random + last), Compose(resize + last)


def load_domains(cfg: Config) -> list[Domain]:
    """Read the domains that were asked for, at the sizes asked for."""
    if cfg.data is not None:
        found = find_domains(cfg.data, cfg.domains or None)
        domains = [load_domain(path) for path in found.values()]
    else:
        drawn = {d.name: d for d in embedded_targets()}
        if unknown := sorted({*cfg.domains} - {*drawn}):
            raise ValueError(
                f"--domains {unknown}: without --data these are {[*drawn]}"
            )
        domains = [drawn[name] for name in cfg.domains or drawn]
    return [d.limited(train=cfg.max_train, test=cfg.max_test) for d in domains]


def load_backbone(cfg: Config) -> Backbone:
    """Train the network on the source domain, or read it from the workdir."""
    place = cfg.pretrain_data
    source = embedded_source() if place is None else load_domain(place)
    source = source.limited(train=cfg.pretrain_limit, test=cfg.max_test)
    model = build(cfg, source.num_classes)
    fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.image_shape)))

    def network(classes: int) -> Apply:
        return from_linen(model.clone(num_classes=classes))

    groups = ("weights", "head")
    recipe = Recipe(
        epochs=cfg.pretrain_epochs,
        batch_size=cfg.batch_size,
        rates=dict.fromkeys(groups, cfg.pretrain_rate),
        warmup_epochs=min(2, cfg.pretrain_epochs / 2),
        weight_decay={"weights": cfg.pretrain_decay},
        adam=groups,
        compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
    )
    train_transform, eval_transform = transforms(cfg, cfg.image_px // 8)
    name = short_hash(model, recipe, digest(source.train), describe(train_transform))
    return pretrain(
        Backbone(network, fresh["params"], {}, VIT),
        fine_tuning(VIT, classes=source.num_classes),
        recipe,
        source,
        train_transform=train_transform,
        eval_transform=eval_transform,
        path=cfg.workdir / f"backbone_{name}.safetensors",
    )


def rows_of(
    cfg: Config, backbone: Backbone
) -> Callable[[Domain], dict[str, Contender]]:
    """Say how to list the rows of a domain's table."""
    return lambda domain: vit_contenders(
        backbone,
        cfg.methods,
        classes=domain.num_classes,
        rates=cfg.rates,
        rank=cfg.rank,
        weight_decay=cfg.weight_decay,
    )


def main(cfg: Config) -> Results:
    """Train the backbone, adapt it to every domain by every method; print the table."""
    domains = load_domains(cfg)
    results = Results(
        cfg.workdir,
        experiment="vit_transfer",
        config=asdict(cfg),
        free=("workdir", "data", "domains", "methods", "seeds"),
    )
    backbone = load_backbone(cfg)
    train_transform, eval_transform = transforms(cfg, cfg.crop_padding)
    vit_table(
        backbone,
        domains,
        rows_of(cfg, backbone),
        results=results,
        recipe=Recipe(
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            rates={},
            adam=ALL_GROUPS,
            compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
        ),
        train_transform=train_transform,
        eval_transform=eval_transform,
        seeds=cfg.seeds,
        validation=cfg.validation,
        workdir=cfg.workdir,
    )
    return results


if __name__ == "__main__":
    launch(Config, main)
