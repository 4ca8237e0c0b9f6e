"""The baselines around the transformer methods; see `ftn_jax.presets.vit`."""

from functools import partial

from ftn_jax.method import Layers, Method
from ftn_jax.nodes.replace import Replace
from ftn_jax.presets.vit_rules import Initializer, vit_method


def layer_norm(
    layers: Layers, *, classes: int, head: Initializer | None = None
) -> Method:
    """Train scale and bias of every LayerNorm.

    Source: the baseline of training normalisation alone, here on a transformer.
    `head` see `ftn_qv`.
    """
    if layers.norms is None:
        raise ValueError("layer_norm trains the norms; these layers name none")
    norms = partial(Replace.init, group="norm")
    return vit_method(layers, classes, head, {layers.norms: norms})


def bias_only(
    layers: Layers, *, classes: int, head: Initializer | None = None
) -> Method:
    """Train every bias.

    Source: BitFit (arXiv 2106.10199). `head` see `ftn_qv`.
    """
    biases = partial(Replace.init, group="norm")
    return vit_method(layers, classes, head, {".*/bias": biases})


def linear_probe(
    layers: Layers, *, classes: int, head: Initializer | None = None
) -> Method:
    """Train a head alone.

    Source: FTN (arXiv 2310.06124), baseline "Feature extractor". A BatchNorm before the
    head (`feature_norm`) belongs to the head and keeps the task's statistics.
    `head` see `ftn_qv`.
    """
    return vit_method(layers, classes, head, {})


def fine_tuning(
    layers: Layers, *, classes: int, head: Initializer | None = None
) -> Method:
    """Train a copy of every weight.

    Source: FTN (arXiv 2310.06124), baseline "Fine-tuning". `head` see `ftn_qv`.
    """
    weights = partial(Replace.init, group="weights")
    return vit_method(layers, classes, head, {".*": weights})
