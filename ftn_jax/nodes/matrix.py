"""A weight of any number of axes as one matrix, inputs by outputs."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def matrix_shape(shape: tuple[int, ...], inputs: int | None) -> tuple[int, int]:
    """Return the sizes (inputs, outputs) of the matrix that a weight is.

    Args:
        shape: of the weight.
        inputs: how many of its leading axes are inputs; default all but the last.

    Raises:
        ValueError: if no axis is left for the inputs or for the outputs.
    """
    if len(shape) < 2:
        raise ValueError(
            f"needs a weight with inputs and outputs, found the shape {shape}; leave "
            "this leaf out, or replace it as a whole (Replace)"
        )
    cut = len(shape) - 1 if inputs is None else inputs
    if not 1 <= cut < len(shape):
        raise ValueError(
            f"inputs must be 1 to {len(shape) - 1} leading axes of the shape {shape}, "
            f"found {inputs!r}"
        )
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def check_matrix(shape: tuple[int, ...], rows: int, columns: int, name: str) -> None:
    """Check that a weight of this shape can be read as a rows x columns matrix.

    Raises:
        ValueError: if no cut through its axes gives these sizes.
    """
    cuts = [matrix_shape(shape, cut) for cut in range(1, len(shape))]
    if (rows, columns) not in cuts:
        raise ValueError(
            f"{name}'s arrays make a matrix {(rows, columns)}, the weight has shape "
            f"{shape}, which can be one of {cuts}"
        )


def check_rank(rank: Any) -> None:
    """Check that a rank is a whole number of at least 1.

    Raises:
        ValueError: if it is not.
    """
    if not is_whole(rank) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, found {rank!r}")


def is_whole(x: Any) -> bool:
    """Tell whether `x` is a whole number, and no truth value."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def add(
    w: Float[Array, "..."], update: Float[Array, "..."], scale: float
) -> Float[Array, "..."]:
    """Return `w + scale * update`, formed in the better precision, in w's dtype."""
    dtype = jnp.promote_types(w.dtype, update.dtype)
    total = w.astype(dtype) + jnp.asarray(scale, dtype) * update.astype(dtype)
    return total.astype(w.dtype)


def product(
    left: Float[Array, "rows rank"], right: Float[Array, "rank columns"], dtype: Any
) -> Float[Array, "rows columns"]:
    """Return the matrix product, formed in `dtype`."""
    # At full precision: accelerators would round the factors to TF32 or bf16.
    return jnp.matmul(left.astype(dtype), right.astype(dtype), precision="highest")
