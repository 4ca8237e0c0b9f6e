"""Bits in bytes, and a hard step that lets the gradient through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.nodes.bits import pack_bits, straight_through, unpack_bits


def draw(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 3, 1, 5), (2, 4, 4)])
def test_bits_come_back_in_an_eighth_of_a_byte_each(shape):
    bits = draw(shape) > 0
    packed = pack_bits(bits)
    assert packed.dtype == jnp.uint8 and packed.size == -(-bits.size // 8)
    np.testing.assert_array_equal(packed, np.packbits(np.asarray(bits)))
    np.testing.assert_array_equal(packed, pack_bits(np.asarray(bits)))
    found = jax.jit(unpack_bits, static_argnums=1)(packed, shape)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, bits)
    with pytest.raises(ValueError, match=rf"for {bits.size + 8} bits of shape"):
        unpack_bits(packed, (bits.size + 8,))


def test_straight_through_is_exactly_hard():
    """Written as `real + (hard - real)` it rounds, and bits would merge otherwise."""
    real = np.asarray(draw((1000,))) * np.logspace(-9, 9, 1000, dtype=np.float32)
    hard = np.float32(real > 0)
    assert (real + (hard - real) != hard).any()
    for how in (straight_through, jax.jit(straight_through)):
        np.testing.assert_array_equal(how(hard, jnp.asarray(real)), hard)
    gradient = jax.jit(jax.grad(lambda r: (3 * straight_through(r > 0, r)).sum()))
    np.testing.assert_array_equal(gradient(real), np.full(1000, 3.0))
