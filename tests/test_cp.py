"""What is special to CP: axes, inits, gain, and what it refuses."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import FORMULAS
from weights import WEIGHTS, randomized, weight

from ftn_jax.nodes import CP


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("bias", ((0,),)),
        ("dense", ((0,), (1,))),
        ("attention", ((0,), (1,), (2,))),
        ("conv2d", ((0, 1), (2,), (3,))),
        ("conv3d", ((0, 1, 2), (3,), (4,))),
    ],
)
def test_cp_default_axes(key, name, axes):
    node = jax.eval_shape(lambda k: CP.init(k, weight(name), rank=3), key)
    assert node.axes == axes and node.rank == 3
    sizes = [math.prod(WEIGHTS[name][a] for a in span) for span in axes]
    assert [f.shape for f in node.factors] == [(size, 3) for size in sizes]


def test_cp_over_two_groups_is_lora(key):
    w = weight("conv2d")
    node = CP.init(key, w, rank=2, axes=[[0, 1, 2], [3]])
    np.testing.assert_array_equal(node.merge(w), w)
    node = randomized(node)
    a, b = (np.asarray(f, np.float64) for f in node.factors)
    expected = np.asarray(w) + (a @ b.T).reshape(w.shape)
    np.testing.assert_allclose(node.merge(w), expected, atol=1e-5)
    assert np.abs(expected - w).max() > 1e-2


@pytest.mark.parametrize(
    "axes",
    [
        ((0, 2), (1,), (3,)),
        ((2, 0), (3, 1)),
        ((3,), (1,), (2,), (0,)),
        ((3, 2, 1, 0),),
    ],
)
def test_cp_over_any_groups_of_axes(key, axes):
    w, sizes = weight("conv2d"), WEIGHTS["conv2d"]
    rng = np.random.default_rng(0)
    shapes = [(math.prod(sizes[a] for a in span), 3) for span in axes]
    factors = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    node = CP(factors, axes=axes, scale=0.5)
    expected = FORMULAS["CP"](np.asarray(w), node)
    np.testing.assert_allclose(node.merge(w), expected, atol=1e-5)
    assert np.abs(expected - w).max() > 1e-2
    made = jax.eval_shape(lambda k: CP.init(k, w, rank=3, axes=axes), key)
    chex.assert_trees_all_equal_shapes_and_dtypes(made.factors, factors)
    assert made.axes == axes


@pytest.mark.parametrize(
    ("shape", "centre"), [((3, 3), 4), ((5, 5), 12), ((2, 3, 3), 4), ((1, 3), 1)]
)
def test_cp_taps_put_the_centre_first_and_wrap(key, shape, centre):
    w, taps = jnp.ones((*shape, 4, 5)), math.prod(shape)
    node = jax.jit(partial(CP.init, rank=taps + 2))(key, w)
    first = 3 * np.asarray(node.factors[0])
    np.testing.assert_allclose(first.sum(axis=0), np.ones(taps + 2), rtol=1e-6)
    assert set(np.unique(np.round(first, 5))) <= {0.0, 1.0}
    order = list(np.argmax(first, axis=0))
    assert order[0] == centre
    assert sorted(order[:taps]) == list(range(taps))
    assert order[taps:] == order[:2]
    away = np.indices(shape).reshape(len(shape), -1).T - (np.array(shape) - 1) / 2
    distance = (away[order[:taps]] ** 2).sum(axis=1)
    assert (np.diff(distance) >= 0).all()
    np.testing.assert_array_equal(node.merge(w), w)


@pytest.mark.parametrize("init", ["taps", "identity", "xavier", "normal"])
def test_cp_gain_leaves_the_function_unchanged(key, init):
    w = weight("conv2d")
    plain, fast = (
        CP.init(key, w, rank=2, init=init, gain=g, scale=0.5) for g in (1, 3)
    )
    last = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    merged = [
        CP((*n.factors[:2], last), axes=n.axes, scale=n.scale).merge(w)
        for n in (plain, fast)
    ]
    np.testing.assert_allclose(*merged, atol=1e-6)
    assert np.abs(merged[0] - w).max() > 1e-3
    np.testing.assert_allclose(fast.factors[1] * 3, plain.factors[1], rtol=1e-6)
    assert (plain.scale, fast.scale) == (0.5, 4.5)


def test_cp_gain_is_three_for_taps_alone(key):
    w = weight("conv2d")
    assert CP.init(key, w, rank=2).scale == 9.0
    assert CP.init(key, w, rank=2, init="identity").scale == 1.0
    assert CP.init(key, weight("bias"), rank=2, gain=3).scale == 1.0


def test_cp_xavier_is_uniform_with_fans_of_size_and_rank(key):
    node = CP.init(key, jnp.ones((3, 3, 512, 256)), rank=64, init="xavier")
    for factor in node.factors:
        bound = math.sqrt(6 / sum(factor.shape))
        assert 0.98 * bound < np.abs(factor).max() <= bound
        np.testing.assert_allclose(factor.std(), bound / math.sqrt(3), rtol=0.05)
        assert abs(float(factor.mean())) < 4 * bound / math.sqrt(3 * factor.size)


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_cp_normal_has_its_std_on_every_factor(key, std):
    node = CP.init(key, jnp.ones((512, 8, 64)), rank=64, init="normal", std=std)
    for factor in node.factors:
        np.testing.assert_allclose(factor.std(), std, rtol=0.1)
        assert np.abs(factor).max() > 2 * std
    default = CP.init(key, jnp.ones((512, 8, 64)), rank=64, init="normal")
    np.testing.assert_allclose(default.factors[0].std(), 0.05, rtol=0.05)


def test_cp_factors_differ_from_each_other(key):
    a, b = CP.init(key, jnp.ones((4, 4)), rank=2, init="xavier").factors
    assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("scale", [2.0, -0.5, 0, np.float32(0.25), jnp.float32(4)])
def test_cp_scale_multiplies_the_update_and_is_a_plain_number(key, scale):
    w = weight("attention")
    one, scaled = (
        CP.init(key, w, rank=2, init="normal", std=1.0, scale=s) for s in (1.0, scale)
    )
    expected = np.asarray(w) + float(scale) * np.asarray(one.merge(w) - w)
    np.testing.assert_allclose(scaled.merge(w), expected, atol=1e-5)
    assert type(scaled.scale) is float


def test_cp_group_is_chosen_by_instance(key):
    assert CP.init(key, weight("dense"), rank=1).group == "factors"
    assert CP.init(key, weight("dense"), rank=1, group="slow").group == "slow"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rank": r}, "rank must be an integer >= 1") for r in (0, -1, 1.5, True)),
        ({"rank": "2"}, "rank must be an integer >= 1, found '2'"),
        ({"axes": ((0, 1), (2,))}, r"each of the weight's 4 axes once, found \(\(0, 1"),
        ({"axes": ((0, 1), (2,), (3,), (3,))}, "axes once"),
        ({"axes": ((0, 1), (2,), (3,), (4,))}, "axes once"),
        ({"axes": ((0, 1), (2,), (-1,))}, "axes once"),
        ({"axes": ()}, "axes once"),
        ({"init": "tapz"}, "taps, identity, xavier or normal, found 'tapz'"),
        ({"init": "taps", "axes": ((0, 1, 2), (3,))}, "taps.*spatial.*use 'identity'"),
        *(({"gain": g}, "gain must be positive") for g in (0, -1.0, math.nan)),
    ],
)
def test_cp_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        CP.init(key, weight("conv2d"), **{"rank": 2, **options})


def test_cp_refuses_a_scalar(key):
    with pytest.raises(ValueError, match="0 axes"):
        CP.init(key, jnp.ones(()), rank=1)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (9, 4, 5), (3, 3, 5, 4), (1, 9, 4, 6)])
def test_cp_merge_names_both_sides_of_a_misfit(key, shape):
    node = CP.init(key, weight("conv2d"), rank=2)
    found = r"sizes \(9, 4, 5\) over axes .*shape \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=found):
        node.merge(jnp.ones(shape))


def test_cp_over_one_axis_group_of_equal_size_keeps_its_place(key):
    """A square layer hides a swap of axes from every check of shapes."""
    w = jnp.zeros((4, 4))
    node = CP((jnp.eye(4)[:, :1], jnp.eye(4)[:, 2:3]), axes=((0,), (1,)))
    assert node.merge(w)[0, 2] == 1 and node.merge(w).sum() == 1
    turned = CP(node.factors, axes=((1,), (0,)))
    assert turned.merge(w)[2, 0] == 1 and turned.merge(w).sum() == 1
