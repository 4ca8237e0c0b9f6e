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
from ftn_jax.presets.vit_ftn import (
    ftn_attention,
    ftn_attention_mlp,
    ftn_o,
    ftn_qv,
)
from ftn_jax.presets.vit_rules import (
    INPUTS_FIRST,
    VIT,
    Initializer,
    LeafRules,
    kernels_of,
    matching,
    vit_method,
)


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
    inputs_first = kernels_of(layers, INPUTS_FIRST)

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
    inputs_first = kernels_of(layers, INPUTS_FIRST)

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

VIT_LABELS = {
    "linear_probe": "feature extractor",
    "layer_norm": "LayerNorm",
    "bias_only": "biases",
    "ftn_o": "FTN O",
    "ftn_qv": "FTN Q+V",
    "ftn_attention": "FTN attention",
    "ftn_attention_mlp": "FTN attention+MLP",
    "lora_qv": "LoRA",
    "kadaptation_qv": "KAdaptation",
    "svft_all": "SVFT",
    "ssf_all": "SSF",
    "fine_tuning": "fine-tuning",
}
"""What a table calls each of them."""

__all__ = ["VIT", "VIT_LABELS", "VIT_METHODS", *VIT_METHODS]
