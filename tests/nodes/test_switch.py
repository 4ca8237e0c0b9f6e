"""ChannelSwitch: gated layers, the budget, and its counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import weight

from ftn_jax import compact, count, make_delta
from ftn_jax.models import RESNETS
from ftn_jax.nodes.replace import Replace
from ftn_jax.nodes.switch import ChannelSwitch, active_share, budget

CONVS = {
    "stride 1": (1, "SAME", 1),
    "stride 2, torch's padding": (2, [(1, 1), (1, 1)], 1),
    "explicit": (1, [(0, 2), (1, 0)], 1),
    "groups": (1, "SAME", 2),
}


def conv(x, w, stride, padding, groups):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("how", CONVS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_switches_gate_the_channels_of_the_layer(key, side, how):
    """Gated before or behind the convolution, as an adapter around it would."""
    groups = CONVS[how][2]
    w, x = draw((3, 3, 4 // groups, 6), 1), draw((2, 7, 6, 4))
    node = ChannelSwitch.init(key, w, side=side)
    real = np.resize([0.5, -0.5, 0.0, 2.0], node.switch.shape)
    node = node.replace(switch=jnp.asarray(real, jnp.float32))
    gates = (real > 0).astype(np.float32)
    if side == "input":
        expected = conv(np.asarray(x) * np.tile(gates, groups), w, *CONVS[how])
    else:
        expected = np.asarray(conv(x, w, *CONVS[how])) * gates
    found = conv(x, node.merge(w), *CONVS[how])
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * size, rtol=0)
    assert np.abs(expected - conv(x, w, *CONVS[how])).max() > 1e-2 * size
    np.testing.assert_array_equal(node.compact().merge(w), node.merge(w))


def test_a_switch_at_zero_is_off_and_the_gradient_goes_through(key):
    w, pull = weight("conv2d"), draw((3, 3, 4, 5), 2)
    node = ChannelSwitch(jnp.array([0.0, 1e-9, -1.0, 2.0, 1.0]), axes=(3,))
    assert node.active.tolist() == [0, 1, 0, 1, 1]
    found = jax.jit(jax.grad(lambda n: (n.merge(w) * pull).sum()))(node).switch
    expected = (np.asarray(pull) * np.asarray(w)).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (found != 0).all()


def test_axes_of_attention_switch_heads(key):
    """A query kernel is (d_model, heads, head_dim), an out kernel (h, d, d_model)."""
    q, out = draw((6, 3, 4)), draw((3, 4, 6), 1)
    heads = jnp.array([1.0, -1.0, 1.0])
    for w, axis in ((q, 1), (out, 0)):
        node = ChannelSwitch.init(key, w, axes=(axis,)).replace(switch=heads)
        merged = np.moveaxis(np.asarray(node.merge(w)), axis, 0)
        expected = np.moveaxis(np.asarray(w), axis, 0) * [[[1]], [[0]], [[1]]]
        np.testing.assert_array_equal(merged, expected)
    both = ChannelSwitch.init(key, q, axes=(-1, 1))
    assert both.axes == (1, 2) and both.switch.shape == (3, 4)
    both = both.replace(switch=draw((3, 4), 3))
    expected = np.asarray(q) * (np.asarray(both.switch) > 0)
    np.testing.assert_array_equal(both.merge(q), expected)


def test_an_output_that_is_off_is_a_constant_behind_batch_norm(key):
    """It adds BatchNorm's bias, unless the switch is on scale and bias too."""
    x, w = draw((2, 5, 5, 4)), draw((3, 3, 4, 2))
    scale, bias = draw((2,), 1), draw((2,), 2)
    off = ChannelSwitch.init(key, w).replace(switch=jnp.array([-1.0, 1.0]))
    convolved = np.asarray(conv(x, off.merge(w), 1, "SAME", 1))
    y = convolved * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_array_equal(y[..., 0], np.full(y.shape[:-1], bias[0]))
    assert np.std(y[..., 1]) > 0.1 and bias[0] != 0
    gone = off.replace(axes=(0,))
    y = convolved * np.asarray(gone.merge(scale)) + np.asarray(gone.merge(bias))
    assert (y[..., 0] == 0).all() and np.std(y[..., 1]) > 0.1


# The budget -------------------------------------------------------------------------


def some(*switches):
    """A delta of one layer for each list of switches, and one that is no switch."""
    nodes = [ChannelSwitch(jnp.array(s, jnp.float32), axes=(1,)) for s in switches]
    return {"head": Replace(jnp.ones(3)), "layers": nodes, "none": None}


def test_budget_counts_all_switches_alike():
    delta = some([1, 1, -1, -1], [1, -1], [2, 2])
    assert float(active_share(delta)) == 5 / 8
    penalty = jax.jit(jax.value_and_grad(partial(budget, share=0.5, weight=4.0)))
    found, pull = penalty(delta)
    np.testing.assert_allclose(found, 4 * (5 / 8 - 0.5), rtol=1e-6)
    for node in pull["layers"]:
        np.testing.assert_allclose(node.switch, np.full(node.switch.shape, 4 / 8))
    assert (pull["head"].value == 0).all()


@pytest.mark.parametrize("share", [5 / 8, 0.7, 1.0])
def test_budget_leaves_alone_what_keeps_within_it(share):
    delta = some([1, 1, -1, -1], [1, -1], [2, 2])
    penalty = jax.jit(jax.value_and_grad(partial(budget, share=share, weight=4.0)))
    found, pull = penalty(delta)
    assert float(found) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(pull))


def test_budget_turns_switches_off_until_it_is_kept():
    delta = some(np.linspace(0.1, 1, 10), np.linspace(0.15, 0.95, 10))
    loss = jax.jit(jax.grad(lambda d: budget(d, share=0.5, weight=1.0)))
    for _ in range(40):
        delta = jax.tree.map(lambda x, g: x - 0.5 * g, delta, loss(delta))
    assert 0.4 < float(active_share(delta)) <= 0.5
    weakest = np.concatenate([n.switch for n in delta["layers"]])
    assert (np.sort(weakest) > 0).sum() == round(20 * float(active_share(delta)))


def test_budget_and_report_refuse():
    with pytest.raises(ValueError, match="holds no ChannelSwitch"):
        budget({"a": Replace(jnp.ones(2))}, share=0.5, weight=1.0)
    with pytest.raises(ValueError, match="holds no ChannelSwitch"):
        active_share({"a": None})
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], found 50"):
        budget(some([1, 1]), share=50, weight=1.0)


# Starts, counts and bits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5,), {"side": "input"}, r"shape \(5,\) has no input channels"),
        ((), {}, r"shape \(\) has no output channels"),
        ((3, 3, 1, 6), {"side": "input"}, r"axes \(2,\) .* are a single channel"),
        ((4, 1), {}, "single channel"),
        ((4, 5), {"side": "both"}, "side must be input or output, found 'both'"),
        ((4, 5), {"axes": (2,)}, r"some of the weight's 2 axes, found \(2,\)"),
        ((4, 5), {"axes": ()}, "some of the weight's 2 axes"),
        ((4, 5), {"axes": (1, -1)}, r"an axis once, found \(1, -1\)"),
    ],
)
def test_init_refuses(key, shape, options, message):
    with pytest.raises(ValueError, match=message):
        ChannelSwitch.init(key, jnp.ones(shape), **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (5,), (3, 3, 5, 4)])
def test_merge_names_both_sides_of_a_misfit(key, shape, packed):
    node = ChannelSwitch(draw((5,)), axes=(3,))
    node = node.compact() if packed else node
    found = r"shape \(5,\) over axes \(3,\), the weight has shape \(" + str(shape[0])
    with pytest.raises(ValueError, match=found):
        node.merge(jnp.ones(shape))


def test_counts_of_resnet50(key):
    model = RESNETS["resnet50"](num_classes=None)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shared = jax.eval_shape(model.init, key, x)["params"]

    def switches(side):
        init = lambda k, w: ChannelSwitch.init(k, w, side=side)  # noqa: E731
        delta = jax.eval_shape(
            lambda k: make_delta(k, shared, {".*/kernel": init}), key
        )
        return count(delta).total

    assert switches("output") == 26_560
    # Stem, then each stage's first, second, third and shortcut convolutions.
    stages = [
        (64 + 2 * 256) + 3 * 64 + 3 * 64 + 64,
        (256 + 3 * 512) + 4 * 128 + 4 * 128 + 256,
        (512 + 5 * 1024) + 6 * 256 + 6 * 256 + 512,
        (1024 + 2 * 2048) + 3 * 512 + 3 * 512 + 1024,
    ]
    assert switches("input") == 3 + sum(stages)


def test_compact_keeps_one_bit_a_channel_and_drops_whole_layers():
    delta = some([1, 1, -1, -1], [1, -1, *[1] * 10], [2, 2])
    small = compact(delta)
    assert count(delta).bytes == 4 * (4 + 12 + 2) + 12
    assert count(small).bytes == 1 + 2 + 12
    assert small["layers"][2] is None
    np.testing.assert_array_equal(small["layers"][0].active, [1, 1, 0, 0])
    assert compact(small)["layers"][0] is small["layers"][0]
    assert float(active_share(small)) == 13 / 16
