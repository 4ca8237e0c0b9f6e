"""Bring checkpoints of BigGAN generators into `ftn_jax.models`, and back.

Spectral normalization is folded when a checkpoint is read: the kernels that come out
are W / sigma, with the sigma that PyTorch computes in evaluation mode.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftn_jax.models import BigGAN
from ftn_jax.pretrained.files import read_weights
from ftn_jax.pretrained.hub import locate
from ftn_jax.pretrained.matching import (
    CheckpointMismatch,
    Pretrained,
    to_flax,
    to_torch,
    variable_shapes,
)

_DEEP_MARK = "generator.gen_z.weight_orig"
_MARK = "linear.weight"
_OUTPUT = {("bn", "scale"): "0.gain", ("bn", "bias"): "0.bias"}
_STATS = {"mean": "stored_mean", "var": "stored_var"}
_LEAVES = {"kernel": "weight", "bias": "bias", "gamma": "gamma"}


def load_biggan(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
    model: BigGAN | None = None,
) -> tuple[BigGAN, Pretrained]:
    """Load a generator of the authors' PyTorch code (`G_ema.pth`).

    Args:
        source: A file, a hub name, or the named arrays themselves. Without any `u0`
            the kernels are taken as they are (what `export_biggan` gives).
        model: The generator to fill; by default the one whose shapes they are.

    Returns:
        The generator, and its `params` and `batch_stats`.

    Raises:
        FileNotFoundError: If the file is not there, nor on the hub.
        WeightsFileError: If it cannot be read as plain arrays.
        CheckpointMismatch: If it is of another variant, or if its keys, shapes or
            values do not fit the model.
    """
    name, weights = read_source(source)
    if _DEEP_MARK in weights:
        raise CheckpointMismatch(
            f"{name}: a checkpoint of BigGAN-deep (it has {_DEEP_MARK}), expected one "
            "of BigGAN: load it with load_biggan_deep"
        )
    if model is None:
        model = biggan_of(weights, source=name)
    folded = _fold(weights, name)
    if "shared.weight" in folded:  # the embedding is not transposed as kernels are
        folded["shared.weight"] = folded["shared.weight"].T
    z, y = jnp.zeros((1, model.dim_z)), jnp.zeros((1,), jnp.int32)
    return model, to_flax(
        folded,
        shapes=variable_shapes(model, z, y),
        name=_name,
        source=name,
        hint="Check resolution, width and number of classes; ftn_jax.pretrained."
        "load_biggan without a model builds the one that fits.",
    )


def export_biggan(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], model: BigGAN
) -> dict[str, np.ndarray]:
    """Name a generator's arrays as the authors' code does, kernels folded (no `u0`)."""
    trees: Any = (params, batch_stats)
    weights = to_torch(Pretrained(*trees), name=_name)
    expected = (model.shared_dim, model.num_classes)
    if weights["shared.weight"].shape != expected:
        raise ValueError(
            f"the embedding has shape {weights['shared.weight'].T.shape}, the model "
            f"{expected[::-1]}"
        )
    weights["shared.weight"] = np.ascontiguousarray(weights["shared.weight"].T)
    return weights


def biggan_of(weights: Mapping[str, np.ndarray], *, source: str = "weights") -> BigGAN:
    """Build the generator whose shapes a checkpoint has.

    Raises:
        CheckpointMismatch: If the arrays are not those of a hierarchical BigGAN.
    """
    pattern = re.compile(r"blocks\.(\d+)\.0\.conv1\.weight")
    convs = {int(m[1]): w for k, w in weights.items() if (m := pattern.fullmatch(k))}
    wanted = (_MARK, "shared.weight", "blocks.0.0.conv1.weight")
    if missing := [key for key in wanted if key not in weights]:
        raise CheckpointMismatch(
            f"{source}: missing {missing}: not the generator of a BigGAN with shared "
            f"embedding; found {sorted(weights)[:4]} and more"
        )
    flat = {_MARK: weights[_MARK], "shared.weight": weights["shared.weight"]}
    kernels = {f"blocks.{i}.0.conv1.weight": w for i, w in convs.items()}
    for axes, arrays in ((2, flat), (4, kernels)):
        for key, w in arrays.items():
            if w.ndim != axes:
                raise CheckpointMismatch(
                    f"{source}: {key} has shape {w.shape}, expected {axes} axes"
                )
    blocks = [convs[i] for i in sorted(convs)]
    classes, shared_dim = weights["shared.weight"].shape
    return BigGAN(
        channels=(blocks[0].shape[1], *(w.shape[0] for w in blocks)),
        num_classes=classes,
        chunk=weights[_MARK].shape[1],
        shared_dim=shared_dim,
        attention=tuple(
            8 * 2**i for i in sorted(convs) if f"blocks.{i}.1.gamma" in weights
        ),
    )


def read_source(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
) -> tuple[str, dict[str, np.ndarray]]:
    """Read named arrays, with a name for errors."""
    if isinstance(source, Mapping):
        return "weights", dict(source)
    return os.fspath(source), read_weights(locate(source))


def _fold(weights: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Divide each kernel that has a `u0` by its sigma: one step of power iteration."""
    folded = dict(weights)
    for key in weights:
        place = key.removesuffix(".u0")
        if place == key or f"{place}.weight" not in weights:
            continue
        w = np.asarray(weights[f"{place}.weight"])
        if w.ndim < 2 or weights[key].size != len(w):
            raise CheckpointMismatch(
                f"{source}: {key} has shape {weights[key].shape}, {place}.weight "
                f"{w.shape}; expected a kernel, and a value of u0 for each of its rows"
            )
        matrix = w.reshape(len(w), -1).astype(np.float64)
        v = _unit(weights[key].reshape(-1) @ matrix)
        u = _unit(matrix @ v)
        folded[f"{place}.weight"] = (w / (u @ matrix @ v)).astype(w.dtype)
        del folded[key]
        folded.pop(f"{place}.sv0", None)
    return folded


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(np.linalg.norm(x), 1e-12)


def _name(path: tuple[str, ...]) -> str:
    """Give the authors' name of (collection, module, ..., leaf)."""
    collection, top, *inside, leaf = path
    if top == "embedding":
        return "shared.weight"
    if top == "first":
        return f"linear.{_LEAVES[leaf]}"
    if top == "output":
        if collection == "batch_stats":
            return f"output_layer.0.{_STATS[leaf]}"
        return "output_layer." + (
            _OUTPUT.get((inside[0], leaf)) or f"2.{_LEAVES[leaf]}"
        )
    kind, number = re.fullmatch(r"(block|attention)(\d+)", top).groups()  # pyright: ignore[reportOptionalMemberAccess]
    place = f"blocks.{number}.{0 if kind == 'block' else 1}"
    if collection == "batch_stats":
        return f"{place}.{inside[0]}.{_STATS[leaf]}"
    return ".".join([place, *inside, _LEAVES[leaf]])
