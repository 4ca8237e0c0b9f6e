"""The papers' transformer table: CLIP ViT-B/32, five domains, few parameters each.

    python -m experiments.clip_transfer --weights clip_vit_b32.safetensors --data DIR

The weights are a file or a hub name, in any layout that `ftn_jax.pretrained` reads
(OpenAI, Hugging Face, timm). DIR holds the domains (cifar10, cifar100, dtd, fer2013,
stl10): for each a `.npz` file or an image folder, see `experiments.multi_domain`, or
`fer2013.csv` as published.

The defaults are the papers': 224 px without augmentation, batches of 64, 100 epochs,
R = 4, SGD with momentum (they do not name the optimizer). Every method has one learning
rate for all that it trains, chosen for each domain on a fifth of the training images,
from the powers of ten of PEViT's search and the papers' 5e-6. At such rates a head
hardly moves: `--embeddings DIR` starts it at DIR/DOMAIN.npz, text embeddings of the
domain's classes, as the papers' baselines do; `--feature-norm` is their BatchNorm
before it, `--shots 5` their few-shot setting.

The table has the FLOPs of a training step as compiled, and seconds per epoch.
`experiments.vit_transfer` is the same table for a small ViT that it trains itself.

Expected parameters per task: FTN Q+V 81,024, FTN O 40,512, LoRA 147,456, SVFT 55,296
(FTN, arXiv 2310.06124, Table 3, prints 147.2K for LoRA), KAdaptation 50,176 (prints
80.7K). The papers find FTN close to fine-tuning. Their LoRA row (83.6 % on average) may
be low: the code that it comes from adds updates to other tokens than it should. Not run
at full size: the weights were not at hand.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.apply import Apply, from_linen
from ftn_jax.command import launch
from ftn_jax.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Domain,
    Normalize,
    ResizeShort,
    ToRGB,
    find_domains,
    load_digits,
    load_domain,
)
from ftn_jax.method import Backbone
from ftn_jax.models import VITS, ViT
from ftn_jax.presets.text_head import head_from_embeddings
from ftn_jax.presets.vit import VIT
from ftn_jax.pretrained import load_vit
from ftn_jax.results import Results
from ftn_jax.sweep import Contender
from ftn_jax.vit_table import (
    ALL_GROUPS,
    PAPER_ROWS,
    VitMethod,
    vit_contenders,
    vit_table,
)

NORMALIZE = {
    "clip": Normalize(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    "imagenet": Normalize(IMAGENET_MEAN, IMAGENET_STD),
    "half": Normalize((0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class Config:
    """Settings of the papers' transformer table."""

    workdir: Path = Path("runs/clip_transfer")
    """Folder for the table, the picture and the saved tasks."""
    weights: str | None = None
    """Checkpoint (.safetensors, .npz, .pth) or hub name (hf://owner/repo)."""
    data: Path | None = None
    """Folder of the domains; without it, scikit-learn's handwritten digits."""
    domains: tuple[str, ...] = ()
    """Names of the domains in the data folder; all if empty."""
    methods: tuple[VitMethod, ...] = PAPER_ROWS
    """Rows of the table: names of ftn_jax.presets.vit, or all of them."""
    embeddings: Path | None = None
    """Folder of text embeddings (DOMAIN.npz or .safetensors) that heads start at."""
    embeddings_scale: float = 100.0
    """What these are multiplied by, once normalised."""
    feature_norm: bool = False
    """Put a BatchNorm without scale and bias before the head."""
    shots: int | None = None
    """Use so many training images of each class; None for all."""
    rank: int = 4
    """Rank of FTN and LoRA."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of init and data order; the table gives mean and std."""
    validation: float = 0.2
    """Share of the training images that chooses the rates."""
    backbone: str = "clip_vit_b32"
    """Name in ftn_jax.models.VITS."""
    image_px: int = 224
    """Height and width of the images."""
    normalization: Literal["clip", "imagenet", "half"] = "clip"
    """Mean and std of the pixels that the weights expect; half is 0.5 and 0.5."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Of all that is trained."""
    rates: tuple[float, ...] = (1e-6, 5e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Candidate peak rates, each for all that a method trains."""
    weight_decay: float = 0.0
    """Of all that is trained."""
    max_train: int | None = None
    """Use at most so many training images of each domain, balanced over classes."""
    max_test: int | None = None
    """Use at most so many test images of each domain."""
    bf16: bool = False
    """Compute in bfloat16; factors, norms and optimizer stay in float32."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/clip_transfer_tiny"),
            methods=("ftn_qv",),
            seeds=(0, 1),
            backbone="vit_tiny_cifar",
            image_px=8,
            epochs=1,
            rates=(1e-2,),
            max_train=128,
            max_test=64,
        )


def build(cfg: Config, classes: int) -> ViT:
    """Build the network."""
    if cfg.backbone not in VITS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(VITS)}"
        )
    return VITS[cfg.backbone](
        classes, image_px=cfg.image_px, feature_norm=cfg.feature_norm
    )


def load_backbone(cfg: Config) -> Backbone:
    """Build the network and read its weights; without weights it stays random."""
    model = build(cfg, classes=1)  # each task has a head of its own
    if cfg.weights is None:
        print("warning: no --weights: the backbone is random, the numbers mean little")
        image = jnp.zeros((1, *model.image_shape))
        fresh = jax.jit(model.init)(jax.random.key(0), image)
        params, stats = fresh["params"], fresh.get("batch_stats", {})
    else:
        params, stats = load_vit(cfg.weights, model, new_head=True)

    def network(classes: int) -> Apply:
        return from_linen(model.clone(num_classes=classes))

    return Backbone(network, params, {"batch_stats": stats} if stats else {}, VIT)


def load_domains(cfg: Config) -> list[Domain]:
    """Read the domains that were asked for, at the sizes asked for."""
    if cfg.data is None:
        domains = [load_digits()]
    else:
        found = find_domains(cfg.data, cfg.domains or None)
        domains = [load_domain(path) for path in found.values()]
    return [limited(cfg, domain) for domain in domains]


def limited(cfg: Config, domain: Domain) -> Domain:
    """Keep as many examples as were asked for."""
    shots = cfg.shots and cfg.shots * domain.num_classes
    sizes = [n for n in (shots, cfg.max_train) if n is not None]
    return domain.limited(train=min(sizes, default=None), test=cfg.max_test)


def transform(cfg: Config) -> Compose:
    """Make the transform of training and evaluation alike."""
    resize = (ResizeShort(cfg.image_px), CenterCrop(cfg.image_px))
    return Compose((*resize, ToRGB(), NORMALIZE[cfg.normalization]))


def rows_of(
    cfg: Config, backbone: Backbone
) -> Callable[[Domain], dict[str, Contender]]:
    """Say how to list the rows of a domain's table."""

    def rows(domain: Domain) -> dict[str, Contender]:
        head = None
        if cfg.embeddings is not None:
            stem = cfg.embeddings / domain.name
            files = [stem.with_name(stem.name + s) for s in (".npz", ".safetensors")]
            file = next((f for f in files if f.exists()), files[0])
            head = head_from_embeddings(file, scale=cfg.embeddings_scale)
        return vit_contenders(
            backbone,
            cfg.methods,
            classes=domain.num_classes,
            rates=cfg.rates,
            rank=cfg.rank,
            weight_decay=cfg.weight_decay,
            head=head,
        )

    return rows


def main(cfg: Config) -> Results:
    """Adapt the backbone to every domain by every method; print the table."""
    backbone, domains = load_backbone(cfg), load_domains(cfg)
    results = Results(
        cfg.workdir,
        experiment="clip_transfer",
        config=asdict(cfg),
        free=("workdir", "data", "domains", "methods", "seeds"),
    )
    vit_table(
        backbone,
        domains,
        rows_of(cfg, backbone),
        results=results,
        recipe=Recipe(
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            rates={},
            adam=ALL_GROUPS if cfg.optimizer == "adam" else (),
            compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
        ),
        train_transform=transform(cfg),
        eval_transform=transform(cfg),
        seeds=cfg.seeds,
        validation=cfg.validation,
        workdir=cfg.workdir,
    )
    return results


if __name__ == "__main__":
    launch(Config, main)
