"""A 1x1 convolution inside a kernel: where it stands and how it starts."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.nodes.matrix import add, product

PointwiseInit = Literal["zeros", "normal"]


def find_tap(shape: tuple[int, ...], tap: Sequence[int] | None) -> tuple[int, ...]:
    """Return the tap of a kernel (taps..., C_in, C_out) that a 1x1 kernel stands at.

    Args:
        shape: the kernel's.
        tap: its index if it is not the centre.

    Raises:
        ValueError: if the shape has fewer than two axes, the centre is not a tap, or
            `tap` is none of the kernel's.
    """
    if len(shape) < 2:
        raise ValueError(
            f"an adapter needs a weight of two or more axes, found the shape {shape}; "
            "train a bias or norm with Replace"
        )
    taps = shape[:-2]
    if tap is None:
        if even := [n for n in taps if n % 2 == 0]:
            raise ValueError(
                f"a kernel of even size {even[0]} has no centre tap, found the shape "
                f"{shape}; give the tap that a 1x1 convolution of the same stride "
                "coincides with, for example tap=(0, 0) under padding (0, 1)"
            )
        return tuple(n // 2 for n in taps)
    found = tuple(int(t) for t in tap)
    inside = len(found) == len(taps)
    if not inside or not all(0 <= t < n for t, n in zip(found, taps, strict=True)):
        raise ValueError(
            f"tap must be an index into the kernel's taps {taps}, found {found}"
        )
    return found


def add_at_tap(
    w: Float[Array, "*taps c_in c_out"],
    alpha: Float[Array, "c_in c_out"],
    tap: tuple[int, ...],
) -> Float[Array, "..."]:
    """Add a 1x1 kernel at one tap of `w`, in w's dtype.

    Raises:
        ValueError: if the two do not fit together.
    """
    find_tap(w.shape, tap)
    if alpha.shape != w.shape[-2:]:
        raise ValueError(
            f"the adapter is for (C_in, C_out) = {alpha.shape}, the weight of shape "
            f"{w.shape} has {w.shape[-2:]}"
        )
    dtype = jnp.promote_types(w.dtype, alpha.dtype)
    return w.astype(dtype).at[tap].add(alpha.astype(dtype)).astype(w.dtype)


def add_on_outputs(
    w: Float[Array, "..."], change: Float[Array, "c_out c_out"]
) -> Float[Array, "..."]:
    """Return `w + w @ change`, the last axes of `w` taken together; in w's dtype."""
    dtype = jnp.promote_types(w.dtype, change.dtype)
    update = product(w.reshape(-1, len(change)), change, dtype)
    return add(w, update.reshape(w.shape), 1.0)


def start_pointwise(
    key: Any, w: Any, shape: tuple[int, ...], init: PointwiseInit
) -> Float[Array, "c_in c_out"]:
    """Make a 1x1 kernel for the weight `w`: zeros, or normal with variance 2 / C_out.

    Raises:
        ValueError: for an unknown init.
    """
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    if init == "zeros":
        return jnp.zeros(shape, dtype)
    if init == "normal":
        return math.sqrt(2 / shape[-1]) * jax.random.normal(key, shape, dtype)
    raise ValueError(f"init must be zeros or normal, found {init!r}")
