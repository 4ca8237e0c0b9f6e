"""The papers' own method and the baselines around it."""

from functools import partial
from typing import Any

from ftn_jax.method import Layers, Method
from ftn_jax.nodes.cp import CP, CPInit
from ftn_jax.nodes.replace import Replace
from ftn_jax.presets.patterns import head_rules, norm_rules


def feature_extractor(layers: Layers, *, classes: int) -> Method:
    """Train a new head on frozen features; BatchNorm keeps its statistics.

    Source: FTN (arXiv 2310.06124), baseline "Feature extractor". The papers do not
    say which statistics it uses; this is the reading in which nothing but the head
    depends on the task.
    """
    return Method(head_rules(layers, classes), classes, frozen_stats=True)


def bn_head(layers: Layers, *, classes: int) -> Method:
    """Train the BatchNorm parameters and a new head.

    Source: FTN (arXiv 2310.06124), baseline "FC and BN only".
    """
    return Method(norm_rules(layers) | head_rules(layers, classes), classes)


def bias_only(layers: Layers, *, classes: int) -> Method:
    """Train every bias, those of the norms among them, and a new head.

    Source: BitFit (arXiv 2106.10199).
    """
    biases = {".*/bias": partial(Replace.init, group="norm")}
    return Method(head_rules(layers, classes) | biases, classes)


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
    rules = {layers.kernels: factors} | norm_rules(layers) | head_rules(layers, classes)
    return Method(rules, classes)


def fine_tuning(layers: Layers, *, classes: int) -> Method:
    """Train a copy of every weight, and a new head.

    Source: FTN (arXiv 2310.06124), baseline "Fine-tuning".
    """
    rest = {".*": partial(Replace.init, group="weights")}
    return Method(norm_rules(layers) | head_rules(layers, classes) | rest, classes)
