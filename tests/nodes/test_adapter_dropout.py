"""Residual adapters: dropout, starts, and what they refuse."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import make_delta, materialize
from ftn_jax.core import perturb
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter

from .convolution import ONES, conv, draw, gap

BOTH = [ParallelAdapter, SeriesAdapter]


# Dropout --------------------------------------------------------------------------


def test_dropout_leaves_out_input_channels_of_the_branch(key):
    w, x = jnp.asarray(draw(3, 3, 16, 8)), draw(2, 6, 6, 16, seed=1)
    node = randomized(ParallelAdapter.init(key, w, dropout=0.25))
    dropped = node.perturb(jax.random.key(3))
    kept = np.asarray((dropped.alpha != 0).any(axis=1))
    assert 0 < kept.sum() < 16
    branch = conv(x * kept / 0.75, np.asarray(node.alpha)[None, None], stride=2)
    options = {"stride": 2, "padding": ONES}
    expected = conv(x, w, **options) + branch
    assert gap(conv(x, dropped.merge(w), **options), expected) < 1e-5
    assert gap(conv(x, node.merge(w), **options), expected) > 1e-2


def test_dropout_is_right_on_average_and_differs_by_key(key):
    node = randomized(ParallelAdapter.init(key, jnp.ones((3, 3, 16, 8)), dropout=0.5))
    keys = jax.random.split(key, 1000)
    alphas = jax.jit(jax.vmap(lambda k: node.perturb(k).alpha))(keys)
    share = float((alphas == 0).all(axis=2).mean())
    assert abs(share - 0.5) < 0.02
    sd = np.abs(node.alpha).max() / math.sqrt(len(keys))
    np.testing.assert_allclose(alphas.mean(axis=0), node.alpha, atol=5 * sd)
    assert (alphas[0] != alphas[1]).any()


def test_dropout_only_in_the_step_that_perturbs(key):
    shared = {"a": {"kernel": weight("conv2d")}, "b": {"kernel": weight("conv2d")}}
    rules = {".*": partial(ParallelAdapter.init, init="normal", dropout=0.5)}
    delta = make_delta(key, shared, rules)
    before = jax.tree.map(np.array, delta)
    step = perturb(delta, jax.random.key(1))
    masks = [np.asarray((step[n]["kernel"].alpha == 0).all(axis=1)) for n in "ab"]
    assert any(m.any() for m in masks) and (masks[0] != masks[1]).any()
    chex.assert_trees_all_equal(delta, before)
    grads = jax.grad(
        lambda d: sum((w**2).sum() for w in jax.tree.leaves(materialize(shared, d)))
    )(step)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    plain = ParallelAdapter.init(key, weight("conv2d"))
    assert plain.perturb(key) is plain


# Starts and refusals --------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_the_released_codes_init(kind, key):
    w = jnp.ones((3, 3, 256, 128))
    alpha = kind.init(key, w, init="normal").alpha
    np.testing.assert_allclose(alpha.std(), math.sqrt(2 / 128), rtol=0.02)
    assert (kind.init(key, w).alpha == 0).all()
    assert kind.init(key, w).group == "adapters"
    assert kind.init(key, w, group="slow").group == "slow"


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8,), {}, r"found the shape \(8,\).*Replace"),
        ((3, 3, 4, 8), {"init": "ones"}, "zeros or normal, found 'ones'"),
    ],
)
def test_init_refuses(kind, key, shape, options, message):
    with pytest.raises(ValueError, match=message):
        kind.init(key, jnp.ones(shape), **options)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 4, 8), {}, r"even size 2 has no centre.*\(2, 3, 4, 8\); give the tap"),
        ((3, 3, 4, 8), {"tap": (1,)}, r"into the kernel's taps \(3, 3\), found \(1,\)"),
        ((3, 3, 4, 8), {"tap": (1, 3)}, r"found \(1, 3\)"),
        ((3, 3, 4, 8), {"tap": (-1, 0)}, r"found \(-1, 0\)"),
        ((3, 3, 4, 8), {"dropout": 1.0}, r"\[0, 1\), found 1.0"),
        ((3, 3, 4, 8), {"dropout": -0.1}, "found -0.1"),
    ],
)
def test_parallel_init_refuses(key, shape, options, message):
    with pytest.raises(ValueError, match=message):
        ParallelAdapter.init(key, jnp.ones(shape), **options)
    assert ParallelAdapter.init(key, jnp.ones((2, 3, 4, 8)), tap=(1, 0)).tap == (1, 0)


@pytest.mark.parametrize("inputs", [0, 4, -1])
def test_series_init_refuses_a_weight_without_inputs(key, inputs):
    with pytest.raises(ValueError, match=f"inputs must be .*found {inputs}"):
        SeriesAdapter.init(key, jnp.ones((3, 3, 4, 8)), inputs=inputs)


@pytest.mark.parametrize("kind", BOTH)
def test_merge_names_both_sides_and_the_path(kind, key):
    shared = {"conv": {"kernel": jnp.ones((3, 3, 4, 8))}}
    delta = make_delta(key, shared, {".*": kind.init})
    other = {"conv": {"kernel": jnp.ones((3, 3, 8, 4))}}
    message = r"conv/kernel: .*\(., 8\).*\(3, 3, 8, 4\)"
    with pytest.raises(ValueError, match=message):
        materialize(other, delta)
