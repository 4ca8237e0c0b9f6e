"""Which leaves each method of the papers touches: rules by name, each with its source.

A backbone is described by three patterns, so that a preset serves any network: ours
follow `RESNET`; for a network of your own write a `Layers` of its paths.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ftn_jax.method import Layers, Method
from ftn_jax.nodes.cp import CP, CPInit
from ftn_jax.nodes.replace import Replace

RESNET = Layers(
    # FTN's counts of 16,291 (ResNet-34) and 49,204 (ResNet-50) factors at rank 1 are
    # those of every convolution but the stem, 1x1 shortcuts included.
    kernels=r"(?!stem/).*conv\d*/kernel",
    norms=r".*bn\d*/(scale|bias)",
    head=r"head/(kernel|bias)",
)


def feature_extractor(layers: Layers, *, classes: int) -> Method:
    """Train a new head on frozen features; BatchNorm keeps its statistics.

    Source: FTN (arXiv 2310.06124), baseline "Feature extractor". The papers do not
    say which statistics it uses; this is the reading in which nothing but the head
    depends on the task.
    """
    return Method(_head(layers, classes), classes, frozen_stats=True)


def bn_head(layers: Layers, *, classes: int) -> Method:
    """Train the BatchNorm parameters and a new head.

    Source: FTN (arXiv 2310.06124), baseline "FC and BN only".
    """
    return Method(_norms(layers) | _head(layers, classes), classes)


def ftn(
    layers: Layers,
    *,
    classes: int,
    rank: int,
    init: CPInit | None = None,
    **options: Any,
) -> Method:
    """Add CP factors of one rank to the kernels; train BatchNorm and a new head.

    Source: FTN (arXiv 2310.06124), eq. 2 to 4.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        rank: number of rank-one terms in each kernel.
        init: see `CP.init`.
        options: passed to `CP.init`.
    """
    factors = partial(CP.init, rank=rank, init=init, **options)
    rules = {layers.kernels: factors} | _norms(layers) | _head(layers, classes)
    return Method(rules, classes)


def fine_tuning(layers: Layers, *, classes: int) -> Method:
    """Train a copy of every weight, and a new head.

    Source: FTN (arXiv 2310.06124), baseline "Fine-tuning".
    """
    rest = {".*": partial(Replace.init, group="weights")}
    return Method(_norms(layers) | _head(layers, classes) | rest, classes)


METHODS: dict[str, Callable[..., Method]] = {
    "feature_extractor": feature_extractor,
    "bn_head": bn_head,
    "ftn": ftn,
    "fine_tuning": fine_tuning,
}


def _norms(layers: Layers) -> dict[str, Any]:
    if layers.norms is None:
        return {}
    return {layers.norms: partial(Replace.init, group="norm")}


def _head(layers: Layers, classes: int) -> dict[str, Any]:
    return {layers.head: partial(Replace.init, group="head", shape=(..., classes))}
