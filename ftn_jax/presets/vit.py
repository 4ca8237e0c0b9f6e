"""The transformer methods of the papers: what each adds to a Vision Transformer.

Rules are for networks with blocks `blocks_N/...`, and for those that scan over them
(`blocks/...`, with a leading axis of layers). Every method trains a head of the task's
own. LayerNorms stay as they are, but for the methods that are about them.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from ftn_jax.core import Init, extend, split_extras
from ftn_jax.method import Backbone, Layers, Method
from ftn_jax.nodes.cp import CP, CPInit
from ftn_jax.nodes.kronecker import Kronecker
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.replace import Replace
from ftn_jax.nodes.scale import scale_rules
from ftn_jax.nodes.stacked_rules import layer_leaves, stack_entries
from ftn_jax.nodes.svft import SVFT, svd_bases
from ftn_jax.presets.patterns import select
from ftn_jax.presets.vit_baselines import (
    bias_only,
    fine_tuning,
    layer_norm,
    linear_probe,
)
from ftn_jax.presets.vit_rules import (
    VIT,
    Initializer,
    LeafRules,
    kernels_of,
    matching,
    vit_method,
)

_INPUTS_FIRST = "query|key|value"


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
        kernels_of(layers, _INPUTS_FIRST): _factors(rank, alpha, init, options),
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


def lora_qv(
    layers: Layers,
    *,
    classes: int,
    rank: int = 4,
    alpha: float = 128.0,
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add LoRA to the query and value kernels, matrices (d_model, heads * d_head).

    Source: LoRA (arXiv 2106.09685), in the setting of KAdaptation (arXiv 2203.16329):
    r = 4, alpha = 128, the first factor N(0, 0.02). On ViT-B/32: 147,456 parameters
    (FTN prints 147.2K).

    Args:
        layers: the backbone's paths.
        classes: of the head.
        rank: of every update.
        alpha: the update is scaled by alpha / rank.
        head: see `ftn_qv`.
        options: passed to `LoRA.init`.
    """
    settings = {"init": "normal", "inputs": 1} | options
    lora = partial(LoRA.init, rank=rank, alpha=alpha, **settings)
    return vit_method(layers, classes, head, {kernels_of(layers, "query|value"): lora})


def kadaptation_qv(
    layers: Layers,
    *,
    classes: int,
    n: int = 32,
    rank: int = 1,
    bias: Literal["query", "value"] = "value",
    head: Initializer | None = None,
    **options: Any,
) -> Method:
    """Add sums of Kronecker products to the query and value kernels; train a bias.

    Query and value kernels have slow factors of their own, common to all layers. The
    published count has one bias of d_model values in each layer and does not say whose.

    Source: KAdaptation (arXiv 2203.16329) and its code's settings: n = 32, rank 1,
    scale 160. On ViT-B/32: 50,176 parameters (FTN prints 80.7K).

    Args:
        layers: the backbone's paths.
        classes: of the head.
        n: number and size of the slow factors; divides d_model.
        rank: of the fast factors.
        bias: which of the two biases is trained.
        head: see `ftn_qv`.
        options: passed to `Kronecker.init` (`scale`, `dropout`).
    """
    init = partial(Kronecker.init, n=n, rank=rank, inputs=1, **options)
    rules: dict[str, Init | None] = {
        kernels_of(layers, name): partial(init, share=name)
        for name in ("query", "value")
    }
    rules[rf"(.*/)?blocks_\d+/(.*/)?{bias}/bias"] = partial(
        Replace.init, group="factors"
    )
    return vit_method(layers, classes, head, rules)


def svft_all(
    layers: Layers, *, classes: int, head: Initializer | None = None, **options: Any
) -> Method:
    """Train coefficients over the singular directions of every kernel of the blocks.

    The bases lie beside the backbone, computed once by the method's `prepare`.

    Source: SVFT (arXiv 2405.19597), plain form, on the six matrices of a block. On
    ViT-B/32: 55,296 parameters. Options are those of `SVFT.init`; `head` see `ftn_qv`.
    """
    inputs_first = kernels_of(layers, _INPUTS_FIRST)

    def prepare(backbone: Backbone) -> Backbone:
        params, _ = split_extras(backbone.shared)
        leaves = layer_leaves(params)
        rest = select(leaves, f"(?!{inputs_first}$)({layers.kernels})")
        bases = svd_bases(leaves, inputs_first, inputs=1) | svd_bases(leaves, rest)
        beside = stack_entries(params, bases)
        return backbone._replace(shared=extend(backbone.shared, svd=beside))

    rules: LeafRules = {
        inputs_first: partial(SVFT.init, inputs=1, **options),
        layers.kernels: partial(SVFT.init, **options),
    }
    return vit_method(layers, classes, head, rules)._replace(prepare=prepare)


def ssf_all(
    layers: Layers, *, classes: int, head: Initializer | None = None, **options: Any
) -> Method:
    """Scale and shift what every linear layer, LayerNorm and patch embedding puts out.

    Where the patch embedding has no bias to shift (CLIP), the LayerNorm behind it
    stands in its place.

    Source: SSF (arXiv 2210.08823). On ViT-B: 205,824 parameters. Options are those of
    `Scale.init`; `head` see `ftn_qv`.
    """
    if layers.norms is None or layers.stem is None:
        raise ValueError("ssf_all scales norms and a stem; these layers name none")
    stem = layers.stem
    norms = layers.norms
    inputs_first = kernels_of(layers, _INPUTS_FIRST)

    def rules(leaves: Mapping[str, Any]) -> LeafRules:
        rest = f"(?!{inputs_first}$)({layers.kernels}|{norms}|{stem})"
        places = {path.rpartition("/")[0] for path in matching(leaves, rest)}
        places -= {p for p in places if f"{p}/bias" not in leaves}
        first = {p.rpartition("/")[0] for p in matching(leaves, inputs_first)}
        return {
            **scale_rules(leaves, "|".join(map(re.escape, places)), **options),
            **scale_rules(leaves, "|".join(map(re.escape, first)), inputs=1, **options),
        }

    return vit_method(layers, classes, head, rules)


def _factors(rank: int, alpha: float, init: CPInit, options: Mapping[str, Any]) -> Init:
    if rank < 1:
        raise ValueError(f"rank must be an integer >= 1, found {rank!r}")
    return partial(CP.init, rank=rank, scale=alpha / rank, init=init, **options)


VIT_METHODS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (
        linear_probe,
        layer_norm,
        bias_only,
        ftn_o,
        ftn_qv,
        ftn_attention,
        ftn_attention_mlp,
        lora_qv,
        kadaptation_qv,
        svft_all,
        ssf_all,
        fine_tuning,
    )
}
"""Every preset by name: `(layers, *, classes, head=None, **options) -> Method`."""

__all__ = ["VIT", "VIT_METHODS", *VIT_METHODS]
