"""What materialize does with two trees, and what it refuses."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from trees import RULES, Shift, backbone, far, in_tuples, random_cp

from ftn_jax import Node, count, make_delta, materialize
from ftn_jax.core import iter_nodes
from ftn_jax.nodes import Replace
from ftn_jax.paths import path_name


@pytest.mark.parametrize("container", [dict, FrozenDict, in_tuples])
def test_materialize_keeps_every_structure(key, container):
    shared = container(backbone())
    rules = RULES if container is not in_tuples else {".*0|.*/w": random_cp}
    delta = make_delta(key, shared, rules)
    params = materialize(shared, delta)
    assert jax.tree.structure(params) == jax.tree.structure(shared)
    leaves = zip(
        jax.tree.leaves(shared),
        jax.tree.leaves(delta, is_leaf=lambda x: x is None or isinstance(x, Node)),
        jax.tree.leaves(params),
        strict=True,
    )
    for w, node, merged in leaves:
        expected = w if node is None else node.merge(w)
        np.testing.assert_allclose(merged, expected, atol=1e-6)
        assert node is None or far(w, merged) == (node.group != "norm")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 4, 8, decode=False, rngs=rngs)
        self.head = nnx.List([nnx.Linear(4, 5, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x))).reshape(len(x), -1, 4)
        return self.head[0](self.attn(x).mean(axis=1))


def test_nnx_state_takes_rules_that_read_like_linens(key):
    shapes = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param, ...)
    rng = np.random.default_rng(0)
    graphdef, shared, rest = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), shapes
    )
    rules = {
        "conv/kernel|attn/(query|out)/kernel": partial(random_cp, std=0.7),
        "bn/(scale|bias)": Replace.init,
        "head/0/.*": partial(Replace.init, group="head", shape=(..., 2)),
    }
    delta = make_delta(key, shared, rules)
    assert set(count(delta).by_path) == {
        *("conv/kernel", "attn/query/kernel", "attn/out/kernel"),
        *("bn/scale", "bn/bias", "head/0/kernel", "head/0/bias"),
    }
    params = materialize(shared, delta)
    assert jax.tree.structure(params) == jax.tree.structure(shared)
    nodes = dict(iter_nodes(delta))
    by_hand = jax.tree_util.tree_map_with_path(
        lambda path, w: (
            nodes[name].merge(w) if (name := path_name(path)) in nodes else w
        ),
        shared,
    )
    run = jax.jit(lambda params, rest, x: nnx.merge(graphdef, params, rest)(x))
    x = jax.random.normal(key, (2, 4, 4, 3))
    found = run(params, rest, x)
    np.testing.assert_allclose(found, run(by_hand, rest, x), atol=1e-5)
    for name in ("conv", "attn"):
        assert far(
            found, run(nnx.State({**by_hand, name: shared[name]}), rest, x), 1e-3
        )


def test_linen_and_nnx_trees_of_one_layout_share_their_keys(key):
    shared = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}}
    rules = {"conv/kernel": random_cp}
    linen = make_delta(key, shared, rules)
    state = nnx.State({"conv": {"kernel": nnx.Param(shared["conv"]["kernel"])}})
    chex.assert_trees_all_equal(
        jax.tree.leaves(linen), jax.tree.leaves(make_delta(key, state, rules))
    )


def test_a_linen_leaf_called_value_keeps_its_name(key):
    delta = make_delta(
        key, {"query": {"value": jnp.ones(3)}}, {"query/value": Replace.init}
    )
    assert set(count(delta).by_path) == {"query/value"}


def test_none_leaves_in_shared_pass(key):
    shared = {"w": jnp.ones((2, 3)), "bias": None, "inner": {"none": None}}
    delta = make_delta(key, shared, {"w": random_cp})
    params = materialize(shared, delta)
    assert params["bias"] is None and params["inner"] == {"none": None}
    with pytest.raises(ValueError, match=r"only in delta: \[bias"):
        materialize(shared, {**delta, "bias": Replace(jnp.ones(3))})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_shared_in_low_precision_keeps_its_dtype_and_rounds_once(key, dtype):
    shared = jax.tree.map(lambda x: x.astype(dtype), backbone())
    delta = make_delta(key, shared, RULES)
    assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
    params = materialize(shared, delta)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), shared)
    once = jax.tree.map(lambda x: x.astype(dtype), materialize(wide, delta))
    chex.assert_trees_all_close(params, once, rtol=float(jnp.finfo(dtype).eps))
    assert far(params["b"], shared["b"])


def test_eager_equals_jit_and_composes(key):
    shared, delta = backbone(), make_delta(key, backbone(), RULES)
    params = materialize(shared, delta)
    with jax.disable_jit():
        chex.assert_trees_all_close(materialize(shared, delta), params, rtol=1e-5)
    inside = jax.jit(lambda s, d: materialize(s, d))(shared, delta)
    chex.assert_trees_all_close(inside, params, rtol=1e-6)
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), delta)
    mapped = jax.vmap(materialize, in_axes=(None, 0))(shared, stack)
    both = [
        materialize(shared, delta),
        materialize(shared, jax.tree.map(lambda x: 2 * x, delta)),
    ]
    chex.assert_trees_all_close(
        mapped, jax.tree.map(lambda *x: jnp.stack(x), *both), rtol=1e-5
    )
    assert far(*both)


def test_swapping_tasks_does_not_retrace(key):
    shared = {"x": jnp.ones((3, 2))}
    Shift.traces.clear()
    tasks = [make_delta(jax.random.key(n), shared, {"x": Shift.init}) for n in range(5)]
    results = [materialize(shared, task)["x"] for task in tasks]
    assert len(Shift.traces) == 1
    assert far(results[0], results[1])
    materialize({"x": jnp.ones((2, 3))}, {"x": Shift(jnp.ones((2, 3)))})
    assert len(Shift.traces) == 2


def test_gradient_reaches_every_node_and_only_the_delta(key):
    shared, delta = backbone(), make_delta(key, backbone(), RULES)

    @jax.jit
    def loss(delta):
        return sum((x**2).sum() for x in jax.tree.leaves(materialize(shared, delta)))

    grads = jax.grad(loss)(delta)
    chex.assert_trees_all_equal_structs(grads, delta)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads["a"]))
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)
    along = sum(
        (g * v).sum() for g, v in zip(*map(jax.tree.leaves, (grads, way)), strict=True)
    )
    step = lambda t: loss(jax.tree.map(lambda x, v: x + t * v, delta, way))  # noqa: E731
    np.testing.assert_allclose(along, (step(1e-2) - step(-1e-2)) / 2e-2, rtol=1e-2)


def test_unmerge_is_exact_and_shared_is_never_written(key):
    """Nothing is subtracted: dropping a delta gives the backbone back bit for bit."""
    shared = jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone())
    before = jax.tree.map(np.array, shared)
    nothing = make_delta(key, shared, {})
    for n in range(20):
        params = materialize(shared, make_delta(jax.random.key(n), shared, RULES))
        assert far(params, before)
        chex.assert_trees_all_equal(materialize(shared, nothing), before)
        chex.assert_trees_all_equal(shared, before)


def test_donating_params_deletes_neither_shared_nor_delta(key):
    shared, delta = backbone(), make_delta(key, backbone(), RULES)
    params = materialize(shared, delta)
    spent = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(
        params
    )
    assert any(x.is_deleted() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves((shared, delta, spent)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"extra": Replace(jnp.ones(3))},
            r"only in shared: \[\]; only in delta: \[extra",
        ),
        ({"b": {}}, r"only in shared: \[b/kernel\]"),
        ({"b": {"w": None}}, r"only in shared: \[b/kernel\]; only in delta: \[b/w\]"),
        ({"b": None}, r"only in shared: \[b/kernel\]; only in delta: \[b\]"),
        ({"b": {"kernel": jnp.ones((4, 2, 3))}}, "b/kernel: .*expected a node or None"),
        ({"b": {"kernel": {"x": Replace(jnp.ones(2))}}}, "b/kernel: .* delta a dict"),
        ({"b": {"kernel": Shift(jnp.ones((9, 9)))}}, "b/kernel: .*shapes"),
        ({"head": {"bias": None, "w": Shift(jnp.ones(5))}}, "head/w: .*rank"),
    ],
)
def test_trees_that_do_not_fit_are_named(key, change, message):
    delta = {**make_delta(key, backbone(), RULES), **change}
    with pytest.raises(ValueError, match=message):
        materialize(backbone(), delta)


def test_a_node_of_another_weight_names_both_shapes(key):
    node = random_cp(key, jnp.ones((4, 2, 4)))
    delta = {**make_delta(key, backbone(), {}), "b": {"kernel": node}}
    with pytest.raises(ValueError, match=r"b/kernel: .*\(4, 2, 4\).*\(4, 2, 3\)"):
        materialize(backbone(), delta)


def test_a_linen_module_runs_on_the_materialized_tree_unchanged(key):
    class Net(nn.Module):
        classes: int

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean(axis=(1, 2))
            return nn.Dense(self.classes, name="head")(x)

    x = jax.random.normal(key, (2, 5, 5, 3))
    shared = Net(10).init(key, x)["params"]
    rules = {"conv/kernel": random_cp, "head/.*": partial(Replace.init, shape=(..., 3))}
    delta = make_delta(key, shared, rules)
    params = materialize(shared, delta)
    assert Net(3).apply({"params": params}, x).shape == (2, 3)
