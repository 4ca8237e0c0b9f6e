"""LoRA: its two layers one after the other, its layouts, starts, counts, errors."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import compact, count, make_delta
from ftn_jax.nodes.lora import LoRA


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(x, w, *, strides=(1, 1), padding="VALID", dilation=(1, 1), groups=1):
    found = jax.lax.conv_general_dilated(
        np.asarray(x),
        np.asarray(w),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )
    return np.asarray(found)


# One program for each shape, where eager merges would compile every operation.
merge = jax.jit(lambda node, w: node.merge(w))


def drawn(w, **options):
    """A node with all arrays random, none zero."""
    init = partial(LoRA.init, **options)
    return randomized(jax.eval_shape(init, jax.random.key(0), w))


def arrays(node):
    return np.asarray(node.a), np.asarray(node.b)


def assert_close(found, expected, frozen):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * size, rtol=0)
    assert np.abs(expected - frozen).max() > 1e-2 * size


# The method's own forward ---------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": (2, 2), "padding": ((1, 1), (1, 1))},
        {"strides": (2, 1), "padding": ((1, 2), (0, 1))},
        {"dilation": (2, 2), "padding": "SAME"},  # peft issue 3697: dropped there
    ],
    ids=["plain", "stride 2", "uneven", "dilation of peft 3697"],
)
def test_a_convolution_to_rank_channels_and_a_1x1(options):
    w, x = weight("conv2d"), draw(2, 8, 7, 4)
    node = drawn(w, rank=2, alpha=3)
    a, b = arrays(node)
    branch = conv(conv(x, a.reshape(3, 3, 4, 2), **options), b.reshape(1, 1, 2, 5))
    frozen = conv(x, w, **options)
    found = conv(x, merge(node, w), **options)
    assert_close(found, frozen + 1.5 * branch, frozen)


def test_reflect_padding_belongs_to_the_input():
    """Measured in peft: merged and unmerged differ by half the output's size."""
    w, x = weight("conv2d"), draw(2, 6, 6, 4)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    node = drawn(w, rank=2)
    a, b = arrays(node)
    branch = conv(x, a.reshape(3, 3, 4, 2)) @ b
    assert_close(conv(x, merge(node, w)), conv(x, w) + branch, conv(x, w))


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_groups_merge_at_any_rank(rank):
    """In peft a grouped LoRA reads all channels: it cannot merge."""
    groups, w, x = 4, draw(3, 3, 2, 8), draw(2, 6, 6, 8, seed=1)
    node = drawn(w, rank=rank)
    a, b = arrays(node)
    a, b = a.reshape(3, 3, 2, rank), b.reshape(rank, groups, 2)
    branches = [conv(x[..., 2 * g : 2 * g + 2], a) @ b[:, g] for g in range(groups)]
    frozen = conv(x, w, groups=groups)
    expected = frozen + np.concatenate(branches, axis=-1)
    assert_close(conv(x, merge(node, w), groups=groups), expected, frozen)


def test_depthwise_of_peft_2202_at_rank_one_is_smaller_than_the_kernel():
    w = weight("depthwise")
    node = drawn(w, rank=1)
    assert count({"w": node}).total == 9 + 6 < w.size
    update = np.asarray(merge(drawn(w, rank=6), w)) - np.asarray(w)
    assert np.linalg.matrix_rank(update.reshape(9, 6)) == 6


def test_dense_and_attention_go_through_rank_numbers():
    x = draw(3, 6)
    w = weight("attention")  # (6, 2, 4): a query kernel
    query = drawn(w, rank=2, inputs=1)
    assert query.a.shape == (6, 2) and query.b.shape == (2, 8)
    (a, b), merged = arrays(query), np.asarray(merge(query, w))
    frozen = np.einsum("bd,dhe->bhe", x, w)
    branch = (x @ a @ b).reshape(3, 2, 4)
    assert_close(np.einsum("bd,dhe->bhe", x, merged), frozen + branch, frozen)

    x, w = draw(3, 2, 4), draw(2, 4, 6, seed=1)  # (heads, head_dim, width)
    out = drawn(w, rank=2)
    assert out.a.shape == (8, 2) and out.b.shape == (2, 6)
    (a, b), merged = arrays(out), np.asarray(merge(out, w))
    frozen = np.einsum("bhe,hed->bd", x, w)
    branch = x.reshape(3, 8) @ a @ b
    assert_close(np.einsum("bhe,hed->bd", x, merged), frozen + branch, frozen)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 4, 3)])
def test_reshape_is_the_view_of_loralib(shape):
    torch = pytest.importorskip("torch")
    k, _, c_in, c_out = shape
    w = draw(*shape)
    node = drawn(w, rank=2, form="reshape", alpha=8)
    assert node.a.shape == (2 * k, c_in * k) and node.b.shape == (c_out * k, 2 * k)
    a, b = (torch.from_numpy(np.array(f)) for f in (node.a, node.b))
    update = 4 * (b @ a).view(c_out, c_in, k, k)
    x = draw(2, 7, 7, c_in, seed=1)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(w.transpose(3, 2, 0, 1)) + update,
        stride=2,
        padding=1,
    ).numpy()
    options = {"strides": (2, 2), "padding": ((1, 1), (1, 1))}
    found = conv(x, merge(node, w), **options)
    assert_close(found, theirs.transpose(0, 2, 3, 1), conv(x, w, **options))


def test_the_two_forms_are_two_families():
    """A 3 x 3 update of rank 2 on 6 channels, made by one form, is out of the other."""
    w = np.zeros((3, 3, 6, 6), np.float32)
    nodes = [drawn(w, rank=2, form=form) for form in ("conv", "reshape")]
    one, other = (np.asarray(merge(node, w)) for node in nodes)
    ranks = [np.linalg.matrix_rank(u.reshape(54, 6)) for u in (one, other)]
    assert ranks == [2, 6]
    views = [u.transpose(3, 2, 0, 1).reshape(18, 18) for u in (one, other)]
    assert [np.linalg.matrix_rank(v) for v in views] == [6, 6]


# Starts, counts, files ------------------------------------------------------------


def test_kaiming_start_is_uniform_with_the_first_layers_fan_in(key):
    w = jax.ShapeDtypeStruct((3, 3, 64, 32), jnp.float32)
    for form, fan_in in (("conv", 9 * 64), ("reshape", 3 * 64)):
        node = LoRA.init(key, w, rank=16, form=form)
        a, b = arrays(node)
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.05)
        assert not b.any() and abs(a.mean()) < 0.1 * bound


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_normal_start_has_its_std(key, std):
    w = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    a, b = arrays(LoRA.init(key, w, rank=16, init="normal", std=std))
    np.testing.assert_allclose(a.std(), std, rtol=0.05)
    assert np.abs(a).max() > 2.5 * std and not b.any()


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 128}, 32.0),  # PEViT's
        ({"alpha": 128, "rank_stabilised": True}, 64.0),
        ({"rank_stabilised": True}, 2.0),
        ({"alpha": np.float32(2)}, 0.5),
    ],
)
def test_scale_is_alpha_over_rank(key, options, scale):
    node = LoRA.init(key, weight("dense"), rank=4, **options)
    assert type(node.scale) is float and node.scale == scale


def test_trap_both_factors_zero_kills_the_gradient(key):
    w = weight("conv2d")
    node = LoRA.init(key, w, rank=2)
    gradient = jax.jit(jax.grad(lambda n: (n.merge(w) ** 2).sum()))
    alive, dead = gradient(node), gradient(jax.tree.map(jnp.zeros_like, node))
    assert np.abs(alive.b).max() > 0 and not np.any(alive.a)
    assert not any(np.any(x) for x in jax.tree.leaves(dead))


def test_count_of_vit_is_pevits_and_not_the_papers(key):
    kernel = jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)
    names = ("query", "key", "value")
    shared = {f"blocks_{i}": {n: {"kernel": kernel} for n in names} for i in range(12)}
    rules = {".*/(query|value)/kernel": partial(LoRA.init, rank=4, inputs=1)}
    delta = jax.eval_shape(lambda k, s: make_delta(k, s, rules), key, shared)
    found = count(delta)
    assert found.total == 147_456 == 176_979 - 29_523  # PEViT's README, head taken off
    assert found.by_group == {"factors": 147_456}
    assert round(found.total, -2) != 147_200  # printed: 147.2K, 0.2 % less


def test_compact_keeps_the_node(key):
    delta = {"w": LoRA.init(key, weight("dense"), rank=2)}
    assert compact(delta)["w"] is delta["w"]


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rank": r}, "rank must be an integer >= 1") for r in (0, 1.5, True, "2")),
        ({"alpha": math.nan}, "alpha must be a finite number, found nan"),
        ({"init": "zeros"}, "init must be kaiming or normal, found 'zeros'"),
        ({"form": "view"}, "form must be conv or reshape, found 'view'"),
        ({"inputs": 4}, r"inputs must be 1 to 3 leading axes of the shape.*found 4"),
        ({"inputs": 0}, "inputs must be 1 to 3"),
    ],
)
def test_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        LoRA.init(key, weight("conv2d"), **{"rank": 2, **options})


@pytest.mark.parametrize("name", ["dense", "attention", "conv1d", "conv3d"])
def test_reshape_is_for_square_2d_kernels(key, name):
    with pytest.raises(ValueError, match=r"square 2-d kernels.*use form='conv'"):
        LoRA.init(key, weight(name), rank=2, form="reshape")
    with pytest.raises(ValueError, match=r"found the shape \(3, 1, 4, 4\)"):
        LoRA.init(key, jnp.ones((3, 1, 4, 4)), rank=2, form="reshape")


def test_a_bias_is_refused_with_its_path(key):
    shared = {"a": {"bias": jnp.ones(5)}}
    with pytest.raises(ValueError, match=r"a/bias: needs a weight with inputs and.*5,"):
        make_delta(key, shared, {"a/bias": partial(LoRA.init, rank=1)})


@pytest.mark.parametrize("form", ["conv", "reshape"])
@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (3, 3, 4, 6), (1, 1, 4, 5)])
def test_merge_names_both_sides_of_a_misfit(key, form, shape):
    node = LoRA.init(key, weight("conv2d"), rank=2, form=form)
    with pytest.raises(ValueError, match=r"make a matrix \(.*has shape \(., ., ., ."):
        node.merge(jnp.ones(shape))
    node.merge(weight("conv2d"))


def test_a_transposed_layer_is_a_misfit_too(key):
    node = LoRA.init(key, jnp.ones((4, 6)), rank=2)
    with pytest.raises(ValueError, match=r"\(4, 6\), the weight has shape \(6, 4\)"):
        node.merge(jnp.ones((6, 4)))


def test_factors_without_a_common_rank_are_no_node():
    with pytest.raises(ValueError, match=r"one common rank.*\(4, 2\) and \(3, 5\)"):
        LoRA(jnp.ones((4, 2)), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="common rank >= 1"):
        LoRA(jnp.ones((4, 0)), jnp.ones((0, 5)))
