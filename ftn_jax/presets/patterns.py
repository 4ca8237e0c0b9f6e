"""Backbones as patterns of their leaves, and the rules that many methods share."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from ftn_jax.core import Init, split_extras
from ftn_jax.method import Layers
from ftn_jax.nodes.replace import Replace
from ftn_jax.paths import path_name, some

RESNET = Layers(
    # FTN's counts of 16,291 (ResNet-34) and 49,204 (ResNet-50) factors at rank 1 are
    # those of every convolution but the stem, 1x1 shortcuts included.
    kernels=r"(?!stem/).*conv\d*/kernel",
    norms=r".*bn\d*/(scale|bias)",
    head=r"head/(kernel|bias)",
    stem=r"stem/conv/kernel",
)


def norm_rules(layers: Layers) -> dict[str, Init | None]:
    """Give each task its own scale and bias of every normalisation."""
    if layers.norms is None:
        return {}
    return {layers.norms: partial(Replace.init, group="norm")}


def head_rules(layers: Layers, classes: int) -> dict[str, Init | None]:
    """Give each task its own head."""
    if layers.new_head is not None:
        return dict(layers.new_head(classes))
    return {layers.head: partial(Replace.init, group="head", shape=(..., classes))}


def select(
    shared: Any, pattern: str, where: Callable[[Any], bool] = lambda w: True
) -> str:
    """Write a pattern of exactly those paths that match one and whose leaf passes.

    Raises:
        ValueError: if there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(split_extras(shared)[0])
    found = [
        path_name(path)
        for path, w in leaves
        if re.fullmatch(pattern, path_name(path)) and where(w)
    ]
    if not found:
        raise ValueError(
            f"no leaf fits {pattern!r} and what the method needs of it; shared has "
            f"{some([path_name(path) for path, _ in leaves])}"
        )
    return "|".join(map(re.escape, found))


def is_spatial(w: Any) -> bool:
    """Tell whether a kernel has an odd window of more than one pixel."""
    window = w.shape[:-2]
    return w.ndim >= 4 and max(window) > 1 and all(n % 2 for n in window)
