"""One contract for every node type, then what is special to each."""

import importlib
import inspect
import math
import pkgutil
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ftn_jax.nodes
from ftn_jax import Node, Task, make_delta, materialize, restore_task, save_task
from ftn_jax.nodes import CP, Replace

for found in pkgutil.iter_modules(ftn_jax.nodes.__path__):
    importlib.import_module(f"ftn_jax.nodes.{found.name}")
TYPES = {n: t for n, t in Node.types.items() if t.__module__.startswith("ftn_jax.")}

WEIGHTS = {
    "bias": (5,),
    "dense": (4, 6),
    "conv1d": (3, 4, 5),
    "attention": (6, 2, 4),
    "conv2d": (3, 3, 4, 5),
    "depthwise": (3, 3, 1, 6),
    "conv3d": (2, 3, 2, 3, 4),
}


def cp_formula(w, node):
    """w[i, j, ..] + scale * sum_r f1[row1, r] f2[row2, r] .., entry by entry."""
    merged = np.array(w, np.float64)
    for index in np.ndindex(*w.shape):
        product = np.ones(node.rank)
        for factor, span in zip(node.factors, node.axes, strict=True):
            row = 0
            for axis in span:
                row = row * w.shape[axis] + index[axis]
            product *= np.asarray(factor[row], np.float64)
        merged[index] += node.scale * product.sum()
    return merged


# A new type of node joins the contract by adding its formula here.
FORMULAS = {"CP": cp_formula, "Replace": lambda w, node: np.array(node.value, float)}
# Types whose default start is not the pretrained network, and why.
STARTS_ELSEWHERE: dict[str, str] = {}


def weight(name, dtype=jnp.float32):
    rng = np.random.default_rng(sum(map(ord, name)))
    return jnp.asarray(rng.normal(size=WEIGHTS[name]), dtype)


def start(kind, key, w):
    init = TYPES[kind].init
    options = {"rank": 2} if "rank" in inspect.signature(init).parameters else {}
    return init(key, w, **options)


def randomized(node, seed=0):
    """Every array drawn anew: a zero factor would hide what the others do."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), node)


@pytest.fixture(params=sorted(TYPES))
def kind(request):
    return request.param


@pytest.fixture(params=WEIGHTS)
def w(request):
    return weight(request.param)


@pytest.fixture
def node(kind, w, key):
    try:
        return start(kind, key, w)
    except ValueError as refusal:
        pytest.skip(f"{kind} is not for a weight of shape {w.shape}: {refusal}")


# The contract ---------------------------------------------------------------------


def test_every_family_is_here(kind):
    assert {"CP", "Replace"} <= set(TYPES)
    assert kind in FORMULAS, f"add {kind}'s float64 formula to FORMULAS"
    assert TYPES[kind].__doc__ and kind in ftn_jax.nodes.__all__


def test_merge_agrees_with_the_formula_and_keeps_shape_and_dtype(kind, node, w):
    node = randomized(node)
    merged = node.merge(w)
    assert merged.shape == w.shape and merged.dtype == w.dtype
    expected = FORMULAS[kind](np.asarray(w), node)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(merged, expected, atol=tolerance, rtol=0)
    assert np.abs(merged - w).max() > 100 * tolerance


def test_merge_runs_under_jit_vmap_and_strict_promotion(node, w):
    tasks = [randomized(node, seed) for seed in range(3)]
    loop = jnp.stack([task.merge(w) for task in tasks])
    jitted = jax.jit(lambda task, w: task.merge(w))(tasks[0], w)
    np.testing.assert_allclose(jitted, loop[0], atol=1e-5)
    stack = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    mapped = jax.jit(jax.vmap(lambda task: task.merge(w)))(stack)
    np.testing.assert_allclose(mapped, loop, atol=1e-5)
    assert np.abs(loop[0] - loop[1]).max() > 1e-2
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(tasks[0].merge(w), loop[0])


def test_starts_at_the_pretrained_weight(kind, node, w):
    same = np.array_equal(node.merge(w), w)
    assert same == (kind not in STARTS_ELSEWHERE)


def test_gradient_is_finite_and_reaches_every_array_after_one_step(node, w):
    target = w + jnp.asarray(np.random.default_rng(1).normal(size=w.shape), w.dtype)
    loss = jax.jit(jax.grad(lambda n: ((n.merge(w) - target) ** 2).sum()))
    first = loss(node)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, node, first)
    for grads in (first, loss(moved)):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(loss(moved)))


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_trap_1_a_node_owns_its_buffers(kind, key, how):
    """Donating or deleting a task must not take the backbone's weight with it."""
    w = weight("conv2d")
    before = np.array(w)
    node = how(partial(start, kind))(key, w)
    places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(node)}
    assert w.unsafe_buffer_pointer() not in places
    double = jax.jit(lambda n: jax.tree.map(lambda x: 2 * x, n), donate_argnums=0)
    for leaf in jax.tree.leaves(double(node)):
        leaf.delete()
    assert all(x.is_deleted() for x in jax.tree.leaves(node))
    assert not w.is_deleted()
    np.testing.assert_array_equal(w, before)


def test_trap_1_a_numpy_weight_is_copied_too(kind, key):
    w = np.array(weight("dense"))
    node = start(kind, key, w)
    before = jax.tree.map(np.array, node)
    w[:] = np.nan
    chex.assert_trees_all_equal(node, before)


def test_same_key_same_start_and_vmapped_starts(kind, key):
    w = weight("conv2d")
    chex.assert_trees_all_equal(start(kind, key, w), start(kind, key, w))
    keys = jax.random.split(key, 3)
    stack = jax.jit(jax.vmap(lambda k: start(kind, k, w)))(keys)
    last = jax.tree.map(lambda x: x[2], stack)
    chex.assert_trees_all_close(last, start(kind, keys[2], w), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_arrays_are_float32_even_for_a_low_precision_weight(kind, key, dtype):
    w = weight("conv2d", dtype)
    node = randomized(start(kind, key, w))
    assert {x.dtype for x in jax.tree.leaves(node)} == {jnp.dtype(jnp.float32)}
    once = jnp.asarray(FORMULAS[kind](np.asarray(w, np.float64), node), dtype)
    eps = float(jnp.finfo(dtype).eps)
    found = np.asarray(node.merge(w), np.float64)
    low = jax.tree.map(lambda x: x.astype(dtype), node)
    with jax.numpy_dtype_promotion("strict"):
        assert low.merge(w).dtype == w.dtype
    np.testing.assert_allclose(found, np.asarray(once, np.float64), rtol=eps)


def test_saved_and_restored_exactly(node, w, tmp_path):
    shared, delta = {"layer": {"w": w}}, {"layer": {"w": randomized(node)}}
    save_task(tmp_path, Task(delta, {}), shared=shared, name="one")
    found = restore_task(tmp_path, shared).task.delta
    assert jax.tree.structure(found) == jax.tree.structure(delta)
    chex.assert_trees_all_equal(found, delta)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, delta)


# Layers, end to end ---------------------------------------------------------------

conv = partial(nn.Conv, 4, (3, 3))
LAYERS = {
    "conv": (conv(), (7, 6, 4)),
    "no bias": (conv(use_bias=False), (7, 6, 4)),
    "stride 2": (conv(strides=2), (8, 7, 4)),
    "stride (2, 1) valid": (conv(strides=(2, 1), padding="VALID"), (8, 7, 4)),
    "dilation": (conv(kernel_dilation=(2, 1)), (9, 8, 4)),
    "explicit": (conv(strides=2, padding=((1, 2), (0, 1))), (8, 8, 4)),
    "circular": (conv(padding="CIRCULAR"), (7, 6, 4)),
    "reflect": (conv(padding="REFLECT"), (7, 6, 4)),
    "groups": (conv(feature_group_count=2), (7, 6, 4)),
    "depthwise": (conv(feature_group_count=4, kernel_dilation=2), (9, 8, 4)),
    "1x1": (nn.Conv(5, (1, 1)), (4, 4, 4)),
    "causal": (nn.Conv(5, (3,), padding="CAUSAL", kernel_dilation=2), (9, 4)),
    "1d": (nn.Conv(5, (4,), strides=3), (9, 4)),
    "3d": (nn.Conv(3, (2, 3, 2), strides=(1, 2, 1)), (4, 5, 4, 2)),
    "transposed": (nn.ConvTranspose(3, (3, 3), strides=(2, 2)), (4, 5, 2)),
    "dense": (nn.Dense(6), (4,)),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 3)),
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=8), (5, 6)),
}


@cache
def layer(name, dtype=jnp.float32):
    """Random weights, an input, and the network compiled once for every node type."""
    module, shape = LAYERS[name]
    module = module.copy(param_dtype=dtype, dtype=dtype)
    rng = np.random.default_rng(3)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)  # noqa: E731
    x = jnp.asarray(rng.normal(size=(2, *shape)), dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(draw, shapes["params"]), x, jax.jit(module.apply)


def check_layer(kind, name, key, *, dtype, tolerance):
    shared, x, run = layer(name, dtype)
    delta = make_delta(key, shared, {"(.*/)?kernel": partial(start, kind)})
    delta = randomized(delta)
    by_hand = jax.tree.map(
        lambda w, node: (
            w
            if node is None
            else jnp.asarray(FORMULAS[kind](np.asarray(w, np.float64), node), w.dtype)
        ),
        shared,
        delta,
        is_leaf=lambda x: x is None or isinstance(x, Node),
    )
    found, expected, frozen = (
        np.asarray(run({"params": params}, x), np.float64)
        for params in (materialize(shared, delta), by_hand, shared)
    )
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance * size, rtol=0)
    assert np.abs(found - frozen).max() > min(100 * tolerance, 0.2) * size


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_with_the_merged_kernel(kind, name, key):
    check_layer(kind, name, key, dtype=jnp.float32, tolerance=1e-5)


@pytest.mark.parametrize("name", ["conv", "groups", "reflect", "attention"])
def test_layer_in_bfloat16(kind, name, key):
    check_layer(kind, name, key, dtype=jnp.bfloat16, tolerance=2e-2)


# CP -------------------------------------------------------------------------------


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
    expected = cp_formula(np.asarray(w), node)
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


# Replace --------------------------------------------------------------------------


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
