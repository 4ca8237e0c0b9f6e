"""Hard choices: a step that lets the gradient through, and bits packed into bytes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8


def straight_through(
    hard: Shaped[Array, "*shape"], real: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Return `hard` exactly, with the gradient of `real`.

    Source: Bengio et al. (arXiv 1308.3432), the straight-through estimator.
    """
    # The difference is exactly zero; `real + (hard - real)` would round.
    return hard.astype(real.dtype) + (real - jax.lax.stop_gradient(real))


def pack_bits(bits: Bool[Array | np.ndarray, "..."]) -> UInt8[Array, " bytes"]:
    """Put eight bits in each byte, the first highest; the last byte ends in zeros."""
    if isinstance(bits, np.ndarray):  # on the host: nothing to compile for each shape
        return jnp.asarray(np.packbits(bits))
    return jnp.packbits(bits.ravel())


def unpack_bits(
    packed: UInt8[Array, " bytes"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Return the bits of `pack_bits` in their shape, as booleans.

    Raises:
        ValueError: if the number of bytes is not that of the shape.
    """
    size = math.prod(shape)
    if packed.shape != (-(-size // 8),):
        raise ValueError(
            f"found packed bits of shape {packed.shape}, expected {(-(-size // 8),)} "
            f"for {size} bits of shape {shape}"
        )
    return jnp.unpackbits(packed, count=size).astype(bool).reshape(shape)
