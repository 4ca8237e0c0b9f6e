"""Edges on BSDS500: how much of a dense task fits in factors beside a frozen network.

    python -m experiments.edges --data bsds500_edges_80x120.npz \\
        --weights tiny_darknet_hwio.npz

A DeepLabv3+ decoder (narrow here) stands on a network that was trained to classify.
Rows: a decoder on frozen features, with the task's own BatchNorm, with FTN's factors,
and a network of its own for the task ("single task"). Trained on BSDS500's training
and validation images, judged on its 200 test images by the boundary benchmark (odsF,
oisF, AP) without non-maximum suppression, as in the papers' NYUD evaluation.

--data takes the `.npz` above (80x120 px) or BSDS500's own folder; there, set
--height 321 --width 481. Without --data the pictures are synthetic scenes. --backbone
takes Tiny Darknet or a ResNet of `ftn_jax.models.RESNETS`.

Expected order, from FTN (arXiv 2310.06124) Table 3 on NYUD (odsF): decoder only 68.5
< decoder + BN < FTN < single task, all by small steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments import tiny_darknet
from experiments._dense import (
    DenseConfig,
    fill_table,
    random_weights,
    resnet,
    under_decoder,
)
from experiments.tiny_darknet import TinyDarknet
from ftn_jax.adapt import Recipe
from ftn_jax.command import launch
from ftn_jax.data import IMAGENET_MEAN, IMAGENET_STD, Domain, Normalize
from ftn_jax.data.dense import load_bsds
from ftn_jax.data.scenes import scenes
from ftn_jax.dense import edges
from ftn_jax.dense.network import DenseBackbone
from ftn_jax.dense.table import plot_curves
from ftn_jax.models import RESNETS
from ftn_jax.presets import RESNET, bn_head, fine_tuning, ftn
from ftn_jax.presets.dense import decoder_only
from ftn_jax.results import Results
from ftn_jax.sweep import Contender

DARKNET = "tiny_darknet"


@dataclass(frozen=True)
class Config(DenseConfig):
    """Settings of the edges experiment."""

    data: Path | None = None
    """BSDS500 as `.npz` or as its folder; without it, synthetic scenes."""
    validation: bool = False
    """Train on BSDS's training images alone: its validation images choose among
    several rates. Without it they are trained on too."""
    backbone: str = DARKNET
    """tiny_darknet, or a name in ftn_jax.models.RESNETS."""
    workdir: Path = Path("runs/edges")
    """Folder for the table, the pictures and the saved tasks."""
    methods: tuple[str, ...] = ("decoder", "bn", "ftn", "single")
    """Rows of the table."""
    height: int = 80
    """Height of crops and of the evaluation, in pixels."""
    width: int = 120
    """Width of crops and of the evaluation, in pixels."""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5)
    """Factors of the random scaling of training images."""
    depth: int = 10
    """Convolutions of Tiny Darknet that are used."""
    high: str = "conv_10"
    """Deep features: conv_10 of Tiny Darknet, layer3 or layer4 of a ResNet."""
    low: str = "conv_2"
    """Shallow features: conv_2 of Tiny Darknet, layer1 of a ResNet."""
    decoder_width: int = 32
    """Channels of the decoder; the papers' are 256."""
    low_width: int = 16
    """Channels of the decoder's shallow branch; the papers' are 48."""
    rates: tuple[int, ...] = (2, 4, 6)
    """Dilations of the decoder's pyramid; the papers' are 6 12 18."""
    threshold: float = 0.3
    """Pixels that this share of the annotators marks are edges."""
    positive: float = 0.9
    """Weight of edges in the loss; that of other pixels is 1 less it."""
    max_dist: float = 0.0075
    """Largest distance of a match, as a share of the image's diagonal."""
    epochs: int = 40
    """Passes over the training images."""
    decoder_rates: tuple[float, ...] = (5e-3,)
    """Adam's peak rates of the decoder; several are candidates, as of all groups."""
    norm_rates: tuple[float, ...] = (1e-3,)
    """SGD's peak rates of the norms (the loss carries a weight of 50)."""
    factor_rates: tuple[float, ...] = (5e-3,)
    """Adam's peak rates of the factors."""
    weight_rates: tuple[float, ...] = (1e-3,)
    """SGD's peak rates of all weights and norms, single task."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/edges_tiny"),
            methods=("bn", "ftn"),
            ranks=(2,),
            height=32,
            width=48,
            depth=4,
            high="conv_4",
            decoder_width=8,
            low_width=4,
            rates=(2,),
            thresholds=9,
            processes=1,
            max_train=16,
            max_test=4,
            epochs=1,
        )


def load_backbone(cfg: Config) -> DenseBackbone:
    """Build DeepLab on the backbone and read its weights."""
    if cfg.backbone in RESNETS:
        return under_decoder(cfg, *resnet(cfg), RESNET)
    if cfg.backbone != DARKNET:
        known = sorted({DARKNET, *RESNETS})
        raise ValueError(f"--backbone {cfg.backbone}: unknown, known are {known}")
    model = TinyDarknet(depth=cfg.depth)
    kernels = "|".join(str(n) for n in range(2, cfg.depth + 1))
    layers = tiny_darknet.LAYERS._replace(kernels=f"conv_({kernels})/kernel")
    found = cfg.weights and tiny_darknet.load_weights(cfg.weights)
    return under_decoder(cfg, model, found or random_weights(model), layers)


def load_data(cfg: Config) -> Domain:
    """Read BSDS500, or draw scenes."""
    if cfg.data is None:
        size = (cfg.height, cfg.width)
        train = scenes(cfg.max_train or 200, size=size, seed=0, targets=("edge",))
        test = scenes(cfg.max_test or 50, size=size, seed=1, targets=("edge",))
        return Domain("edges", ("edge",), train, test)
    domain = load_bsds(cfg.data, validation=cfg.validation)
    return domain.limited(train=cfg.max_train, test=cfg.max_test)


def contenders(cfg: Config, network: DenseBackbone) -> dict[str, Contender]:
    """List the rows of the table."""
    layers = network.backbone.layers
    head, norm = {"head": cfg.decoder_rates}, {"norm": cfg.norm_rates}
    factors = {"factors": cfg.factor_rates}

    def row(preset: Callable[..., Any], rates: Any, **options: Any) -> Contender:
        method = partial(preset, layers, **options)
        grid = [dict(zip(rates, x, strict=True)) for x in product(*rates.values())]
        if preset is fine_tuning:
            grid = [each | {"norm": each["weights"]} for each in grid]
        return Contender(lambda classes: method(classes=classes), grid)

    rows = {}
    for name in cfg.methods:
        if name == "decoder":
            rows["decoder only"] = row(decoder_only, head, frozen=network.frozen)
        elif name == "bn":
            rows["decoder + BN"] = row(bn_head, head | norm)
        elif name == "ftn":
            for rank in cfg.ranks:
                label = f"FTN R={rank}"
                rows[label] = row(ftn, head | norm | factors, rank=rank)
        elif name == "single":
            weights = {"weights": cfg.weight_rates}
            rows["single task"] = row(fine_tuning, head | weights)
        else:
            raise ValueError(
                f"--methods {name}: unknown, known are decoder, bn, ftn, single"
            )
    return rows


def main(cfg: Config) -> Results:
    """Train every row, judge it by the boundary benchmark, draw its edges."""
    domain, network = load_data(cfg), load_backbone(cfg)
    imagenet = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    results = fill_table(
        cfg,
        "edges",
        network,
        [domain],
        contenders(cfg, network),
        {
            domain.name: edges(
                positive=cfg.positive,
                threshold=cfg.threshold,
                thresholds=cfg.thresholds,
                max_dist=cfg.max_dist,
                processes=cfg.processes,
                title="boundary benchmark",
            )
        },
        recipe=Recipe(
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            rates={},
            adam=("factors", "head"),
        ),
        normalize=Normalize() if cfg.backbone == DARKNET else imagenet,
        details=("oisF", "AP"),
    )
    plot_curves(results.rows, cfg.workdir / "curves.png")
    return results


if __name__ == "__main__":
    launch(Config, main)
