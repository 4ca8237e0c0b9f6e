"""What the dense experiments share: settings, the network, the run of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.data import Compose, Domain, Normalize
from ftn_jax.data.joint import JointCrop, JointFlip, JointPad, JointScale
from ftn_jax.dense.constant import constant_score
from ftn_jax.dense.network import DenseBackbone, dense_backbone
from ftn_jax.dense.pictures import plot_tasks, shared_by_method
from ftn_jax.dense.table import dense_report
from ftn_jax.measure import Measure
from ftn_jax.method import Layers
from ftn_jax.models import RESNETS
from ftn_jax.models.deeplab import DeepLab
from ftn_jax.pretrained import load_resnet
from ftn_jax.results import Results
from ftn_jax.sweep import Contender, sweep

FREE = ("data", "weights", "workdir", "methods", "ranks", "seeds", "processes")
"""Settings that may change between runs into one workdir."""


@dataclass(frozen=True)
class DenseConfig:
    """Settings of any dense experiment; the defaults are the papers', on NYUD."""

    data: Path | None = None
    """Data set; without it, synthetic scenes."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS."""
    weights: str | None = None
    """Checkpoint of the backbone; without it the network is random."""
    workdir: Path = Path("runs/dense")
    """Folder for the table, the pictures and the saved tasks."""
    methods: tuple[str, ...] = ()
    """Rows of the table."""
    ranks: tuple[int, ...] = (10,)
    """Ranks of the FTN rows."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of init, data order and augmentation."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    height: int = 425
    """Height of crops and of the evaluation, in pixels."""
    width: int = 560
    """Width of crops and of the evaluation, in pixels."""
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    """Factors of the random scaling of training images."""
    high: str = "layer4"
    """Deep features: layer3 or layer4 of a ResNet."""
    low: str = "layer1"
    """Shallow features: layer1 or layer2 of a ResNet."""
    decoder_width: int = 256
    """Channels of the decoders; the papers' are 256."""
    low_width: int = 48
    """Channels of the decoders' shallow branch; the papers' are 48."""
    rates: tuple[int, ...] = (6, 12, 18)
    """Dilations of the decoders' pyramid; the papers' are 6 12 18."""
    output_stride: int = 16
    """Of a ResNet with a 7x7 stem: 16 or 8."""
    max_dist: float = 0.011
    """Largest distance of matched edges, as a share of the diagonal."""
    thresholds: int = 99
    """Thresholds of the boundary benchmark."""
    processes: int | None = None
    """Worker processes of the boundary benchmark; default: one for each CPU."""
    max_train: int | None = None
    """Use at most so many training images."""
    max_test: int | None = None
    """Use at most so many test images."""


def resnet(cfg: DenseConfig) -> tuple[Any, dict[str, Any]]:
    """Build the ResNet that --backbone names, and read its weights."""
    strided = not cfg.backbone.startswith("cifar")
    options = {"output_stride": cfg.output_stride} if strided else {}
    model = RESNETS[cfg.backbone](**options)
    if cfg.weights is None:
        return model, random_weights(model)
    params, batch_stats = load_resnet(cfg.weights, model)
    return model, {"params": params, "batch_stats": batch_stats}


def random_weights(model: Any) -> Any:
    """Draw a backbone's variables, and say so."""
    print("warning: no --weights: the backbone is random, the numbers mean little")
    image = jnp.zeros((1, 64, 64, 3))
    return model.init(jax.random.key(0), image, features=True)


def under_decoder(
    cfg: DenseConfig, model: Any, variables: Mapping[str, Any], layers: Layers
) -> DenseBackbone:
    """Put a backbone under the decoder that the settings describe."""

    def make(outputs: int) -> DeepLab:
        return DeepLab(
            model,
            outputs,
            high=cfg.high,
            low=cfg.low,
            width=cfg.decoder_width,
            low_width=cfg.low_width,
            rates=cfg.rates,
        )

    return dense_backbone(make, variables, layers)


def fill_table(
    cfg: DenseConfig,
    experiment: str,
    network: DenseBackbone,
    domains: Sequence[Domain],
    contenders: Mapping[str, Contender],
    measures: Mapping[str, Measure],
    *,
    recipe: Recipe,
    normalize: Normalize,
    details: Sequence[str] = (),
    free: Sequence[str] = (),
) -> Results:
    """Train every row on every task; write the table and draw the tasks.

    Args:
        cfg: the experiment's settings.
        experiment: its name.
        network: the frozen backbone.
        domains: the tasks.
        contenders: rows of the table by name.
        measures: by task.
        recipe: how to train; contenders bring their rates.
        normalize: the last step of both transforms.
        details: further columns, see `dense_report`.
        free: settings besides `FREE` that may change between runs.
    """
    size = (cfg.height, cfg.width)
    train = Compose((JointScale(cfg.scales), JointCrop(*size), JointFlip(), normalize))
    evaluation = Compose((JointPad(*size), normalize))
    results = Results(
        cfg.workdir, experiment=experiment, config=asdict(cfg), free=(*FREE, *free)
    )
    sweep(
        network.backbone,
        domains,
        contenders,
        results=results,
        recipe=recipe,
        train_transform=train,
        eval_transform=evaluation,
        seeds=cfg.seeds,
        validation=0.0,
        measures=measures,
        eval_batch_size=cfg.batch_size,
        workdir=cfg.workdir,
    )
    constant = {
        d.name: constant_score(
            d.name,
            measures[d.name],
            d.train,
            d.test,
            classes=d.num_classes,
            transform=evaluation,
        )
        for d in domains
    }
    dense_report(results, measures, constant=constant, details=details)
    plot_tasks(
        measures,
        network.backbone,
        domains,
        shared_by_method(network.backbone, contenders),
        transform=evaluation,
        workdir=cfg.workdir,
        seed=cfg.seeds[0],
    )
    return results
