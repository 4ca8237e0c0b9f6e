"""One contract for every node type, and the layers that run on what it merges."""

import dataclasses
import importlib
import inspect
import pkgutil
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from formulas import (
    EXTRAS,
    FORMULAS,
    STARTS,
    STARTS_ELSEWHERE,
    STARTS_WITHIN_ROUNDING,
    VARIANTS,
)
from weights import WEIGHTS, randomized, weight

import ftn_jax.nodes
from ftn_jax import (
    Task,
    extend,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import complete
from ftn_jax.node import Node, is_node
from ftn_jax.paths import path_name

for found in pkgutil.iter_modules(ftn_jax.nodes.__path__):
    importlib.import_module(f"ftn_jax.nodes.{found.name}")
TYPES = {n: t for n, t in Node.types.items() if t.__module__.startswith("ftn_jax.")}

# Every type with its default start, and the options that deserve the same care.
KINDS = {name: (name, STARTS.get(name)) for name in TYPES} | VARIANTS


def start(kind, key, w):
    """Return a complete node: what lies beside the backbone is in its fields."""
    node, extra = begin(kind, key, w)
    return node.replace(**{n: extra[k][n] for n, k in node.beside_fields.items()})


def begin(kind, key, w):
    """Return a node as it stands in a delta, and what lies beside the backbone."""
    name, init = KINDS[kind]
    extra = EXTRAS[name](w) if name in EXTRAS else {}
    if init is not None:
        return init(key, w, extra), extra
    init = TYPES[name].init
    known = {"rank": 2, "extra": extra}
    options = {k: known[k] for k in inspect.signature(init).parameters if k in known}
    return init(key, w, **options), extra


def formula(kind, w, node):
    return FORMULAS[KINDS[kind][0]](np.asarray(w, np.float64), node)


def floats(node):
    return [x for x in jax.tree.leaves(node) if jnp.issubdtype(x.dtype, jnp.floating)]


# Options need fewer kinds of weights than types do.
PAIRS = [
    (kind, name)
    for kind in sorted(KINDS)
    for name in WEIGHTS
    if kind in TYPES or name in ("dense", "attention", "conv2d")
]


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    kind, name = request.param
    return kind, weight(name)


@pytest.fixture
def node(pair, key):
    kind, w = pair
    try:
        return start(kind, key, w)
    except ValueError as refusal:
        pytest.skip(f"{kind} is not for a weight of shape {w.shape}: {refusal}")


# The contract ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_family_is_here(name, key):
    assert {"CP", "Replace"} <= set(TYPES)
    assert name in FORMULAS, f"add {name}'s float64 formula to tests/formulas"
    assert TYPES[name].__doc__ and name in ftn_jax.nodes.__all__
    assert start(name, key, weight("conv2d")).merge(weight("conv2d")).shape


def test_merge_agrees_with_the_formula_and_keeps_shape_and_dtype(pair, node):
    kind, w = pair
    node = randomized(node)
    merged = node.merge(w)
    assert merged.shape == w.shape and merged.dtype == w.dtype
    expected = formula(kind, w, node)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(merged, expected, atol=tolerance, rtol=0)
    assert np.abs(merged - w).max() > 100 * tolerance


def test_merge_runs_under_jit_vmap_and_strict_promotion(pair, node):
    _, w = pair
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


def test_starts_at_the_pretrained_weight(pair, node):
    kind, w = pair
    error = np.abs(np.asarray(node.merge(w)) - w).max()
    if KINDS[kind][0] in STARTS_ELSEWHERE or kind in STARTS_ELSEWHERE:
        assert error > 1e-4
    elif KINDS[kind][0] in STARTS_WITHIN_ROUNDING:
        assert error < 1e-6 * np.abs(w).max()
    else:
        assert error == 0


def test_gradient_is_finite_and_reaches_every_array_after_one_step(pair, node):
    _, w = pair
    target = w + jnp.asarray(np.random.default_rng(1).normal(size=w.shape), w.dtype)
    fixed = {n: getattr(node, n) for n in node.frozen_fields}
    own = node.replace(**dict.fromkeys(fixed))
    loss = jax.jit(
        jax.grad(lambda n: ((n.replace(**fixed).merge(w) - target) ** 2).sum())
    )
    first = loss(own)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, own, first)
    second = loss(moved)
    for grads in (first, second):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(second))


def test_compact_merges_the_same_bytes(pair, node):
    _, w = pair
    node = randomized(node)
    if type(node).compact is Node.compact:
        assert node.compact() is node
        return
    small = node.compact()
    found = w if small is None else jax.jit(lambda n, w: n.merge(w))(small, w)
    expected = jax.jit(lambda n, w: n.merge(w))(node, w)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_trap_1_a_node_owns_its_buffers(kind, key, how):
    """Donating or deleting a task must not take the backbone's weight with it."""
    w = weight("conv2d")
    before = np.array(w)
    node = how(lambda key, w: begin(kind, key, w)[0])(key, w)
    places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(node)}
    assert w.unsafe_buffer_pointer() not in places
    double = jax.jit(lambda n: jax.tree.map(lambda x: 2 * x, n), donate_argnums=0)
    for leaf in jax.tree.leaves(double(node)):
        leaf.delete()
    assert all(x.is_deleted() for x in jax.tree.leaves(node))
    assert not w.is_deleted()
    np.testing.assert_array_equal(w, before)


def test_trap_1_a_numpy_weight_is_copied_too(kind, key):
    w = np.array(weight("conv2d"))
    node, _ = begin(kind, key, w)
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
    assert {x.dtype for x in floats(node)} <= {jnp.dtype(jnp.float32)}
    once = jnp.asarray(formula(kind, w, node), dtype)
    eps = float(jnp.finfo(dtype).eps)
    found, once = (np.asarray(x, np.float64) for x in (node.merge(w), once))
    np.testing.assert_allclose(found, once, rtol=eps, atol=1e-5 * np.abs(once).max())
    low = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, node
    )
    with jax.numpy_dtype_promotion("strict"):
        assert low.merge(w).dtype == w.dtype


def test_saved_and_restored_exactly(kind, key, tmp_path):
    w = weight("conv2d")
    try:
        node, extra = begin(kind, key, w)
    except ValueError as refusal:
        pytest.skip(f"{kind} is not for a weight of shape {w.shape}: {refusal}")
    place = node.share or "layer/w"
    beside = {k: {place: arrays} for k, arrays in extra.items()}
    shared = extend({"layer": {"w": w}}, **beside)
    delta = {"layer": {"w": randomized(node)}}
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
    # Each kernel under a label of its own: what nodes share is tested elsewhere.
    extras = {}

    def init(path, key, w):
        node, extra = begin(kind, key, w)
        if node.share is not None:
            node = dataclasses.replace(node, share=path)
        for beside, arrays in extra.items():
            extras.setdefault(beside, {})[path] = arrays
        return node

    kernels = [
        path_name(p)
        for p, _ in jax.tree_util.tree_leaves_with_path(shared)
        if path_name(p).endswith("kernel")
    ]
    try:
        delta = make_delta(key, shared, {p: partial(init, p) for p in kernels})
    except ValueError as refusal:
        pytest.skip(f"{kind} is not for this layer: {refusal}")
    delta = jax.tree.map(randomized, delta, is_leaf=is_node)
    shared = extend(shared, **extras)
    by_hand = jax.tree.structure(shared.params).unflatten(
        w if node is None else jnp.asarray(formula(kind, w, node), w.dtype)
        for _, w, node in complete(shared, delta)
    )
    found, expected, frozen = (
        np.asarray(run({"params": params}, x), np.float64)
        for params in (materialize(shared, delta), by_hand, shared.params)
    )
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance * size, rtol=0)
    assert np.abs(found - frozen).max() > min(100 * tolerance, 0.2) * size


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_with_the_merged_kernel(name, key):
    check_layer("CP", name, key, dtype=jnp.float32, tolerance=1e-5)


# What a layer makes of its kernel does not depend on the node: a few will do.
@pytest.mark.parametrize("name", ["explicit", "groups", "attention"])
def test_layer_runs_with_any_nodes_kernel(kind, name, key):
    check_layer(kind, name, key, dtype=jnp.float32, tolerance=1e-5)


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_layer_in_bfloat16(kind, name, key):
    check_layer(kind, name, key, dtype=jnp.bfloat16, tolerance=2e-2)
