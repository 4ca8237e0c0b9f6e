"""Bring Hugging Face's biggan-deep checkpoints into `ftn_jax.models.BigGANDeep`."""

import os
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ftn_jax.models import BigGANDeep
from ftn_jax.pretrained.biggan import read_source
from ftn_jax.pretrained.matching import (
    CheckpointMismatch,
    Pretrained,
    to_flax,
    variable_shapes,
)

_STATS = {"mean": "running_means", "var": "running_vars"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "gamma": "gamma"}
_ATTENTION = {
    "theta": "snconv1x1_theta",
    "phi": "snconv1x1_phi",
    "g": "snconv1x1_g",
    "o": "snconv1x1_o_conv",
}
_NORM = {"gain": "scale", "bias": "offset"}


def load_biggan_deep(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray], model: BigGANDeep
) -> Pretrained:
    """Load a `biggan-deep-128`, `-256` or `-512` checkpoint (`pytorch_model.bin`).

    Args:
        source: A file, a hub name such as `hf://owner/repo/pytorch_model.bin`, or the
            named arrays themselves.
        model: The generator to fill.

    Returns:
        `params` and `batch_stats`, spectral normalization folded into the kernels.

    Raises:
        FileNotFoundError: If the file is not there, nor on the hub.
        WeightsFileError: If it cannot be read as plain arrays.
        CheckpointMismatch: If it is of another variant, or if its keys, shapes or
            values do not fit the model.
    """
    name, weights = read_source(source)
    if "linear.weight" in weights and "shared.weight" in weights:
        raise CheckpointMismatch(
            f"{name}: a checkpoint of BigGAN (it has linear.weight), expected one of "
            "BigGAN-deep: load it with load_biggan"
        )
    z, y = jnp.zeros((1, model.dim_z)), jnp.zeros((1,), jnp.int32)
    layer = _layer_numbers(model)
    return to_flax(
        _fold(weights),
        shapes=variable_shapes(model, z, y),
        name=lambda path: _name(path, layer),
        source=name,
        hint="Check resolution and width of the model.",
    )


def _layer_numbers(model: BigGANDeep) -> dict[str, int]:
    """Number our blocks as the checkpoint does, which counts self-attention too."""
    numbers = {
        f"block{i}": i + (i >= model.attention) for i in range(len(model.levels))
    }
    return numbers | {f"attention{model.attention}": model.attention}


def _fold(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divide each `weight_orig` by its sigma, `u W v`; scalars lose their axis."""
    folded = dict(weights)
    for key in weights:
        place = key.removesuffix(".weight_orig")
        u, v = (weights.get(f"{place}.weight_{x}") for x in "uv")
        if place == key or u is None or v is None:
            continue
        w = np.asarray(weights[key])
        matrix = w.reshape(len(w), -1).astype(np.float64)
        sigma = u.astype(np.float64) @ matrix @ v
        folded[f"{place}.weight"] = (w / sigma).astype(w.dtype)
        for kind in ("orig", "u", "v"):
            del folded[f"{place}.weight_{kind}"]
    return {
        k: w.reshape(()) if k.endswith(".gamma") and w.size == 1 else w
        for k, w in folded.items()
    }


def _name(path: tuple[str, ...], layer: Mapping[str, int]) -> str:
    """Give the checkpoint's name of (collection, module, ..., leaf)."""
    collection, top, *inside, leaf = path
    if top == "embedding":
        return "embeddings.weight"
    last = _STATS[leaf] if collection == "batch_stats" else _LEAVES.get(leaf, leaf)
    if top == "first":
        return f"generator.gen_z.{last}"
    if top == "output":
        module = "bn" if inside[0] == "bn" else "conv_to_rgb"
        return f"generator.{module}.{last}"
    place = f"generator.layers.{layer[top]}"
    if top.startswith("attention"):
        return ".".join([place, *(_ATTENTION[m] for m in inside), last])
    first, *norm = inside
    module = re.sub(r"(\d)", r"_\1", first)
    return ".".join([place, module, *(_NORM[m] for m in norm), last])
