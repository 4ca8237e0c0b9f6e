"""FTN on a Vision Transformer: factors on its attention, and on its MLPs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ftn_jax.core import Init
from ftn_jax.method import Layers, Method
from ftn_jax.nodes.cp import CP, CPInit
from ftn_jax.presets.vit_rules import (
    INPUTS_FIRST,
    Initializer,
    LeafRules,
    kernels_of,
    vit_method,
)


def ftn_qv(
    layers: Layers,
    *,
    classes: int,
    rank: int = 4,
    alpha: float = 10.0,
    init: CPInit = "normal",
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add CP factors to the query and value kernels, tensors (d_model, heads, d_head).

    With the default init the start is near the pretrained network, not at it: the
    update's entries have a standard deviation of 6e-4; `init="identity"` starts there.

    Source: FTN (arXiv 2310.06124), transformer section: R = 4, alpha = 10, every factor
    N(0, 0.05). On ViT-B/32: 81,024 parameters.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        rank: number of rank-one terms in each kernel.
        alpha: the update is scaled by alpha / rank.
        init: see `CP.init`.
        head: `(key, shape, dtype) -> array` for the head's kernel, for example from
            `head_from_embeddings`; default LeCun normal.
        options: passed to `CP.init` (`std`, `gain`).
    """
    factors = _factors(rank, alpha, init, options)
    return vit_method(
        layers, classes, head, {kernels_of(layers, "query|value"): factors}
    )


def ftn_o(
    layers: Layers,
    *,
    classes: int,
    rank: int = 4,
    alpha: float = 100.0,
    init: CPInit = "normal",
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add CP factors to the output kernels of the attention (heads, d_head, d_model).

    Heads are on the side of the inputs here, as the papers' notation has it.

    Source: FTN (arXiv 2310.06124), transformer section: alpha = 100. On ViT-B/32:
    40,512 parameters. Arguments as `ftn_qv`.
    """
    factors = _factors(rank, alpha, init, options)
    return vit_method(layers, classes, head, {kernels_of(layers, "out"): factors})


def ftn_attention(
    layers: Layers,
    *,
    classes: int,
    rank: int = 4,
    alpha: float = 10.0,
    out_alpha: float = 100.0,
    init: CPInit = "normal",
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add CP factors to all four kernels of every attention.

    Source: FTN (arXiv 2310.06124), the union of its two variants, each with its alpha.
    Arguments as `ftn_qv`; `out_alpha` is that of the output kernels.
    """
    rules: LeafRules = {
        kernels_of(layers, INPUTS_FIRST): _factors(rank, alpha, init, options),
        kernels_of(layers, "out"): _factors(rank, out_alpha, init, options),
    }
    return vit_method(layers, classes, head, rules)


def ftn_attention_mlp(
    layers: Layers,
    *,
    classes: int,
    rank: int = 4,
    alpha: float = 10.0,
    out_alpha: float = 100.0,
    init: CPInit = "normal",
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add CP factors to the kernels of every attention and MLP.

    An MLP's kernel has two axes: its factors are those of a low-rank matrix.

    Source: not in the papers; their factors on every kernel of the blocks, as on every
    convolution. Arguments as `ftn_attention`.
    """
    rules: LeafRules = {
        kernels_of(layers, "out"): _factors(rank, out_alpha, init, options),
        layers.kernels: _factors(rank, alpha, init, options),
    }
    return vit_method(layers, classes, head, rules)


def _factors(rank: int, alpha: float, init: CPInit, options: Mapping[str, Any]) -> Init:
    if rank < 1:
        raise ValueError(f"rank must be an integer >= 1, found {rank!r}")
    return partial(CP.init, rank=rank, scale=alpha / rank, init=init, **options)
