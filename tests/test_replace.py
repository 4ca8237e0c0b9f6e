"""What is special to Replace: shapes, initializers, groups."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.nodes import Replace


@pytest.mark.parametrize(
    ("found", "shape", "expected"),
    [
        ((64, 1000), (..., 10), (64, 10)),
        ((1000,), (..., 10), (10,)),
        ((3, 3, 8, 16), (..., 2, 7), (3, 3, 2, 7)),
        ((4, 5), (...,), (4, 5)),
        ((4, 5), (6,), (6,)),
        ((5,), (..., 2, 3), (2, 3)),
        ((), (..., 3), (3,)),
    ],
)
def test_replace_shape(key, found, shape, expected):
    w = jax.ShapeDtypeStruct(found, jnp.float32)
    node = jax.eval_shape(lambda k, w: Replace.init(k, w, shape=shape), key, w)
    assert node.value.shape == expected
    assert jax.eval_shape(Replace.merge, node, w).shape == expected


def test_replace_starts_fresh_heads_at_zero_bias_and_lecun_kernel(key):
    kernel = Replace.init(key, jnp.ones((400, 10)), shape=(..., 300))
    np.testing.assert_allclose(kernel.value.std(), 400**-0.5, rtol=0.02)
    bias = Replace.init(key, jnp.ones(10), shape=(..., 300))
    np.testing.assert_array_equal(bias.value, np.zeros(300))


def test_replace_initializer(key):
    ones = Replace.init(key, jnp.zeros((2, 3)), initializer=jax.nn.initializers.ones)
    np.testing.assert_array_equal(ones.value, np.ones((2, 3)))
    normal = partial(Replace.init, w=jnp.zeros(3), initializer=jax.random.normal)
    np.testing.assert_array_equal(normal(key).value, jax.random.normal(key, (3,)))
    assert np.abs(normal(key).value - normal(jax.random.key(1)).value).max() > 1e-2


def test_replace_group(key):
    assert Replace.init(key, jnp.ones(2)).group == "norm"
    assert Replace.init(key, jnp.ones(2), group="head").group == "head"


@pytest.mark.parametrize("shape", [(3, ...), (..., 0), (-1,), (2.0,), (..., ..., 2)])
def test_replace_refuses(key, shape):
    with pytest.raises(ValueError, match="sizes >= 1 after an optional leading"):
        Replace.init(key, jnp.ones((4, 5)), shape=shape)
