"""Tasks with a decoder: the presets' methods for dense prediction."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from ftn_jax.core import Init
from ftn_jax.method import Backbone, Layers, Method
from ftn_jax.nodes.replace import Replace

_NORMAL = jax.nn.initializers.normal(0.01)


def dense_layers(layers: Layers) -> Layers:
    """Describe `DeepLab` around a backbone that `layers` describes.

    The backbone's leaves lie under `backbone/`; the decoder is the head: every task
    starts its own afresh, kernels N(0, 0.01), with its number of outputs in the end.
    """

    def inside(pattern: str | None) -> str | None:
        return pattern and f"backbone/({pattern})"

    kernels = inside(layers.kernels)
    assert kernels is not None
    return Layers(
        kernels=kernels,
        norms=inside(layers.norms),
        head="decoder/.*",
        stem=inside(layers.stem),
        new_head=_decoder_rules,
    )


def _decoder_rules(outputs: int) -> dict[str, Init | None]:
    new = partial(Replace.init, group="head")
    return {
        "decoder/out/(kernel|bias)": partial(
            new, shape=(..., outputs), initializer=_fresh
        ),
        "decoder/.*/scale": partial(new, initializer=jax.nn.initializers.ones),
        "decoder/.*": partial(new, initializer=_fresh),
    }


def _fresh(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw a kernel, or zeros for a bias."""
    make = _NORMAL if len(shape) > 1 else jax.nn.initializers.zeros
    return make(key, shape, dtype)


def decoder_only(layers: Layers, *, classes: int, frozen: Any) -> Method:
    """Train a decoder on frozen features.

    The backbone keeps its pretrained statistics, the decoder's BatchNorm trains.

    Source: FTN (arXiv 2310.06124), Table 3, "Decoder only".

    Args:
        layers: of `dense_layers`.
        classes: number of outputs.
        frozen: `classes -> Apply` of the network whose backbone runs in evaluation
            mode in training too.
    """
    if layers.new_head is None:
        raise ValueError("decoder_only takes the layers that dense_layers makes")

    def prepare(backbone: Backbone) -> Backbone:
        return backbone._replace(network=frozen)

    return Method(layers.new_head(classes), classes, prepare=prepare)
