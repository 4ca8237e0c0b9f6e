"""DoRA: direction and magnitude, its exact start, columns of zeros, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import count
from ftn_jax.nodes.lora import DoRA, LoRA

merge = jax.jit(lambda node, w: node.merge(w))


def test_direction_is_loras_and_magnitude_is_trained_apart(key):
    w = weight("conv2d")
    node = randomized(DoRA.init(key, w, rank=2, alpha=3))
    lora = LoRA(node.a, node.b, scale=node.scale)
    v, merged, w = (
        np.asarray(x, np.float64).reshape(-1, 5)
        for x in (merge(lora, w), merge(node, w), w)
    )
    wanted = np.linalg.norm(w, axis=0) + np.asarray(node.magnitude)
    directions = v / np.linalg.norm(v, axis=0)
    np.testing.assert_allclose(merged, wanted * directions, atol=1e-5)
    assert np.abs(merged - v).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.abs(wanted), 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((129, 67), jnp.float32),
        ((3, 3, 16, 33), jnp.float32),
        ((48, 4, 13), jnp.bfloat16),
    ],
)
def test_starts_exactly_at_the_weight_under_jit(key, shape, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape) / 7, dtype)
    node = DoRA.init(key, w, rank=2, inputs=1)
    np.testing.assert_array_equal(merge(node, w), w)
    np.testing.assert_array_equal(node.b, 0)
    np.testing.assert_array_equal(node.magnitude, 0)
    assert np.any(np.asarray(merge(randomized(node), w)) != np.asarray(w))


def test_a_column_of_zeros_stays_finite_and_can_move(key):
    """A dead channel has no direction: peft divides 0 by 0 there."""
    w = weight("dense").at[:, 2].set(0)
    node = DoRA.init(key, w, rank=2)
    np.testing.assert_array_equal(merge(node, w), w)
    target = weight("dense")
    loss = lambda n: ((n.merge(w) - target) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    grads = gradient(node)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads.b[:, 2]).max() > 0
    moved = jax.tree.map(lambda x, g: x - 0.01 * g, node, grads)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(moved)))


def test_one_magnitude_for_each_output(key):
    w = weight("attention")
    for inputs, outputs in ((1, 8), (None, 4)):
        init = partial(DoRA.init, rank=2, inputs=inputs)
        assert jax.eval_shape(init, key, w).magnitude.shape == (outputs,)
    node = DoRA.init(key, weight("conv2d"), rank=2)
    lora = LoRA.init(key, weight("conv2d"), rank=2)
    assert count({"w": node}).total == count({"w": lora}).total + 5
    np.testing.assert_array_equal(node.a, lora.a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, found 0"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"init": "ones"}, "init must be kaiming or normal"),
        ({"inputs": 9}, "inputs must be 1 to 3"),
    ],
)
def test_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        DoRA.init(key, weight("conv2d"), **{"rank": 2, **options})


def test_what_does_not_fit_is_named(key):
    with pytest.raises(ValueError, match="needs a weight with inputs and outputs"):
        DoRA.init(key, weight("bias"), rank=2)
    node = DoRA.init(key, weight("conv2d"), rank=2)
    with pytest.raises(ValueError, match=r"DoRA's arrays make a matrix \(36, 5\)"):
        node.merge(jnp.ones((3, 3, 5, 4)))
    with pytest.raises(ValueError, match=r"one value for each column, \(5,\), found"):
        DoRA(node.a, node.b, jnp.ones(4))
