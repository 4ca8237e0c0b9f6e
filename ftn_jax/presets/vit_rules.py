"""A Vision Transformer as patterns of its leaves, and what its presets share."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from ftn_jax.core import Init, split_extras
from ftn_jax.method import Layers, Method
from ftn_jax.nodes.replace import Replace
from ftn_jax.nodes.stacked_rules import layer_leaves, stacked_rules
from ftn_jax.presets.patterns import head_rules

VIT = Layers(
    kernels=r"(.*/)?blocks_\d+/(attention/(query|key|value|out)|mlp/fc[12])/kernel",
    norms=r"(.*/)?norm(1|2|_pre)?/(scale|bias)",
    head=r"head(_distilled)?/(kernel|bias)",
    stem=r"patch_embedding/kernel",
)
"""Our ViTs. Patterns are those of separate blocks, and serve a stack of them too."""

INPUTS_FIRST = "query|key|value"
"""The kernels (d_model, heads, d_head); `out` has d_model last."""

Initializer = Callable[..., Array]
LeafRules = Mapping[str, Init | None]


def kernels_of(layers: Layers, names: str) -> str:
    """Write a pattern of those kernels that carry one of these names."""
    return rf"(?=(.*/)?({names})/kernel$)({layers.kernels})"


def matching(leaves: Mapping[str, Any], pattern: str) -> list[str]:
    """List the paths that a pattern matches."""
    return [path for path in leaves if re.fullmatch(pattern, path)]


def vit_method(
    layers: Layers,
    classes: int,
    head: Initializer | None,
    rules: LeafRules | Callable[[Mapping[str, Any]], LeafRules],
) -> Method:
    """Join a head to rules for separate blocks; make them fit the backbone's form."""
    heads = head_rules(layers, classes)
    if head is not None:
        init = partial(
            Replace.init, group="head", shape=(..., classes), initializer=head
        )
        heads = {rf"(?=.*kernel$)({layers.head})": init, **heads}

    def fitting(shared: Any) -> LeafRules:
        params, _ = split_extras(shared)
        own = rules
        if callable(own):
            own = own(jax.eval_shape(layer_leaves, params))
        return stacked_rules(params, {**heads, **own})

    return Method(fitting, classes)
