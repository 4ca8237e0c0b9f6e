"""A classifier's head from the embeddings that a text encoder gives the class names."""

import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ftn_jax.pretrained.files import read_weights

CLIP_SCALE = 100.0
"""What CLIP multiplies cosines by: its learned temperature, at its limit."""


def head_from_embeddings(
    source: str | os.PathLike[str], *, scale: float = CLIP_SCALE
) -> Callable[..., Array]:
    """Start a head at the classes' text embeddings: CLIP's zero-shot classifier.

    The kernel is the normalised embeddings, transposed, times `scale`. On features of
    unit length its logits are CLIP's; features that are not normalised, as our ViTs
    give them, rank the classes of an image the same, with another temperature.

    Give the result as `head` to a preset of `ftn_jax.presets.vit`, or as `initializer`
    to `Replace.init`.

    Source: Radford et al., "Learning transferable visual models from natural language
    supervision" (2021), section 3.1.2.

    Args:
        source: a `.npz` or `.safetensors` file with one array (classes, features), or
            with one named "embeddings"; rows in the order of the classes.
        scale: of the logits.

    Returns:
        `(key, shape, dtype) -> array`; refuses (ValueError) a head of another shape.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsFileError: if it cannot be read as plain arrays.
        ValueError: if it holds no such array, or a row that is zero or not finite.
    """
    arrays = read_weights(source)
    name = os.fspath(source)
    if len(arrays) != 1 and "embeddings" not in arrays:
        raise ValueError(
            f"{name}: found the arrays {sorted(arrays)}, expected one, or one named "
            "'embeddings'"
        )
    rows = arrays.get("embeddings", next(iter(arrays.values())))
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(
            f"{name}: found {rows.dtype} of shape {rows.shape}, expected "
            "floating-point numbers (classes, features)"
        )
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = ~(np.isfinite(length[:, 0]) & (length[:, 0] > 0))
    if bad.any():
        raise ValueError(
            f"{name}: the rows {np.flatnonzero(bad)[:6].tolist()} are zero or not "
            "finite; each class needs an embedding"
        )
    kernel = scale * (rows / length).T

    def initializer(
        key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Array:
        if tuple(shape) != kernel.shape:
            raise ValueError(
                f"{name}: {kernel.shape[1]} classes of {kernel.shape[0]} features make "
                f"a head of shape {kernel.shape}, expected {tuple(shape)} (features, "
                "classes); embed the task's classes by the model's own text encoder"
            )
        return jnp.array(kernel, dtype)

    return initializer
