"""Two trees: how a delta is built, what materialize does with it, what a node is."""

import copy
import os
import pickle
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from ftn_jax import Node, count, groups, make_delta, materialize, static
from ftn_jax.core import iter_nodes, path_name
from ftn_jax.nodes import CP, Replace

random_cp = partial(CP.init, rank=2, init="normal")
RULES = {
    ".*/kernel": random_cp,
    ".*/bn/(scale|bias)": Replace.init,
    "head/.*": partial(Replace.init, group="head", shape=(..., 3)),
}


class Shift(Node):
    """Adds an array: the smallest node; counts how often it is traced."""

    value: jax.Array
    traces = []

    @classmethod
    def init(cls, key, w):
        return cls(jax.random.normal(key, w.shape))

    def merge(self, w):
        self.traces.append(w.shape)
        return w + self.value


def backbone():
    rng = np.random.default_rng(0)
    sizes = {
        "a": {"kernel": (3, 3, 2, 4), "bn": {"scale": (4,), "bias": (4,)}},
        "b": {"kernel": (4, 2, 3)},
        "head": {"bias": (5,), "w": (4, 5)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        sizes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def in_tuples(tree):
    return (tree["a"]["kernel"], [tree["b"]["kernel"], {"w": tree["head"]["w"]}])


def far(a, b, tolerance=1e-4):
    """True if some leaf moved by far more than a comparison would forgive."""
    return any(
        x.shape != y.shape or np.abs(x - y).max() > tolerance
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Building a delta -----------------------------------------------------------------


def test_first_match_wins_and_unmatched_leaves_stay_frozen(key):
    rules = {
        "a/kernel": partial(CP.init, rank=3),
        ".*/kernel": partial(CP.init, rank=1),
    }
    delta = make_delta(key, backbone(), rules)
    assert delta["a"]["kernel"].rank == 3
    assert delta["b"]["kernel"].rank == 1
    assert delta["head"] == {"bias": None, "w": None}


def test_a_rule_of_none_leaves_its_leaves_alone(key):
    delta = make_delta(key, backbone(), {"a/.*": None, ".*kernel": random_cp})
    assert [path for path, _ in iter_nodes(delta)] == ["b/kernel"]


def test_no_rules_no_nodes(key):
    delta = make_delta(key, backbone(), {})
    assert not jax.tree.leaves(delta) and count(delta).total == 0
    chex.assert_trees_all_equal(materialize(backbone(), delta), backbone())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"kernel": None}, r"match no leaf: \['kernel'\].*whole.*a/bn/bias"),
        ({"a/kerne": None}, "match no leaf"),
        ({".*": None, "head/w": Replace.init}, r"never apply: \['head/w'\]"),
        ({"head/bias": random_cp, "b/.*": None, "(head|b)/.*": None}, None),
        ({"b/kernel": CP.init}, "b/kernel: .*rank"),
        ({"b/kernel": partial(CP.init, rank=0)}, "b/kernel: rank must be .* found 0"),
        ({"b/kernel": partial(CP.init, rank=2, axes=((0,), (1,)))}, "b/kernel: axis"),
    ],
)
def test_wrong_rules_are_named(key, rules, message):
    if message is None:
        assert count(make_delta(key, backbone(), rules)).total == 10
        return
    with pytest.raises(ValueError, match=message):
        make_delta(key, backbone(), rules)


def test_a_long_list_of_leaves_is_cut(key):
    shared = {f"layer{n}": jnp.ones(2) for n in range(40)}
    with pytest.raises(ValueError, match=r"layer0, .*, \.\.\. \(40 in all\)") as error:
        make_delta(key, shared, {"none": None})
    assert len(str(error.value)) < 300


def test_trap_9_a_key_for_each_path(key):
    """Other layers, other rules and another order do not change a node's start."""
    shared = backbone()
    delta = make_delta(key, shared, RULES)
    more = {
        "0": {"kernel": jnp.ones((2, 2))},
        **shared,
        "zz": {"kernel": jnp.ones((3, 3))},
    }
    others = [
        make_delta(key, more, RULES),
        make_delta(key, shared, {"a/kernel": random_cp, "b/kernel": random_cp}),
        make_delta(key, shared, {"b/.*": random_cp, "a/kernel": random_cp}),
    ]
    for other in others:
        for name in ("a", "b"):
            chex.assert_trees_all_equal(delta[name]["kernel"], other[name]["kernel"])
    twins = make_delta(
        key, {"x": jnp.ones((2, 2)), "y": jnp.ones((2, 2))}, {".": random_cp}
    )
    assert far(twins["x"], twins["y"])
    assert far(delta, make_delta(jax.random.key(1), shared, RULES))


def test_trap_9_another_process_starts_the_same():
    code = """
import jax, numpy
from ftn_jax import make_delta
from ftn_jax.nodes import CP
shared = {"a": {"kernel": jax.numpy.ones((4, 2))}, "b": jax.numpy.ones((4, 2))}
delta = make_delta(
    jax.random.key(3), shared, {".*": lambda k, w: CP.init(k, w, rank=2, init="normal")}
)
found = b"".join(numpy.asarray(x).tobytes() for x in jax.tree.leaves(delta)).hex()
"""
    here: dict[str, str] = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(found)"],
        env={**os.environ, "PYTHONHASHSEED": "1234"},
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == here["found"], there.stderr


def test_make_delta_under_jit_and_eval_shape(key):
    shared = backbone()
    delta = make_delta(key, shared, RULES)
    jitted = jax.jit(lambda key, shared: make_delta(key, shared, RULES))(key, shared)
    chex.assert_trees_all_close(delta, jitted, rtol=1e-6)
    shapes = jax.eval_shape(lambda key: make_delta(key, shared, RULES), key)
    chex.assert_trees_all_equal_shapes_and_dtypes(delta, shapes)


# Materialize ----------------------------------------------------------------------


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


# Groups and counts ----------------------------------------------------------------


def test_groups_label_every_array_by_its_node(key):
    delta = make_delta(key, backbone(), RULES)
    labels = groups(delta)
    assert jax.tree.structure(labels) == jax.tree.structure(delta)
    assert labels["a"]["kernel"].factors == ("factors",) * 3
    assert labels["a"]["bn"]["scale"].value == "norm"
    assert labels["head"]["w"].value == "head"
    assert "group" not in Shift.static_fields
    assert groups({"x": Shift(jnp.ones(2))})["x"].value == "factors"


def test_count_by_group_and_path_before_any_allocation(key):
    shared = backbone()
    found = count(make_delta(key, shared, RULES))
    by_path = {
        "a/bn/bias": 4,
        "a/bn/scale": 4,
        "a/kernel": 2 * (9 + 2 + 4),
        "b/kernel": 2 * (4 + 2 + 3),
        "head/bias": 3,
        "head/w": 4 * 3,
    }
    assert found.by_path == by_path
    assert found.by_group == {"norm": 8, "factors": 48, "head": 15}
    assert found.total == 71
    huge = {"a": {"kernel": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)}}
    rules = {"a/kernel": random_cp}
    shapes = jax.eval_shape(lambda k, s: make_delta(k, s, rules), key, huge)
    assert count(shapes).total == 2 * 2 * (1 << 20)


def test_count_and_iter_refuse_what_is_no_node():
    with pytest.raises(TypeError, match="a/b: a delta holds nodes and None, found"):
        count({"a": {"b": jnp.ones(3)}})


# What a node is -------------------------------------------------------------------


def test_fields_are_sorted_in_data_and_configuration():
    assert CP.data_fields == ("factors",)
    assert set(CP.static_fields) == {"axes", "scale", "group"}
    assert Node.types["Shift"] is Shift and "Node" not in Node.types
    leaves, treedef = jax.tree.flatten(Replace(jnp.ones(2), group="head"))
    assert len(leaves) == 1
    assert treedef != jax.tree.structure(Replace(jnp.ones(2), group="norm"))
    path, _ = jax.tree_util.tree_leaves_with_path(Replace(jnp.ones(2)))[0]
    assert jax.tree_util.keystr(path) == ".value"


def test_a_group_that_is_no_static_field_is_refused(forget):
    with pytest.raises(TypeError, match=r"Careless: declare `group: str = static"):

        class Careless(Node):
            group: str = "norm"


def test_two_leaves_of_one_path_are_refused(key):
    shared = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"two leaves of one path: \['a/b'\]"):
        make_delta(key, shared, {"a/b": Replace.init})


def test_groups_refuse_what_is_no_node():
    with pytest.raises(TypeError, match="w: a delta holds nodes and None"):
        groups({"w": jnp.ones(2)})


def test_nodes_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        Replace(jnp.ones(2)).value = 3


@pytest.fixture
def forget():
    """Let a test define node types without leaving them behind."""
    known = dict(Node.types)
    yield
    Node.types.clear()
    Node.types.update(known)


def define(name, module, **fields):
    annotations = {k: jax.Array for k in fields}
    return type(Node)(
        name, (Node,), {"__module__": module, "__annotations__": annotations, **fields}
    )


def test_one_name_in_two_modules_is_refused_and_redefinition_is_not(forget):
    first = define("Twin", "here")
    again = define("Twin", "here")
    assert Node.types["Twin"] is again is not first
    with pytest.raises(TypeError, match="here.Twin and there.Twin.*rename"):
        define("Twin", "there")
    assert Node.types["Twin"] is again


def test_a_node_without_merge_says_so(forget):
    class Idle(Node):
        value: jax.Array

    with pytest.raises(NotImplementedError, match="Idle must define merge"):
        materialize({"w": jnp.ones(2)}, {"w": Idle(jnp.ones(2))})


def test_subclass_of_a_node_inherits_fields(forget, key):
    class Louder(Replace):
        gain: float = static(default=2.0)

        def merge(self, w):
            return self.gain * super().merge(w)

    node = Louder.init(key, jnp.ones(3))
    assert type(node) is Louder and Louder.data_fields == ("value",)
    (merged,) = jax.tree.leaves(materialize([jnp.ones(3)], [node]))
    np.testing.assert_array_equal(merged, 2 * np.ones(3))


def test_trap_3_tree_operations_bypass_the_checks(forget):
    """Placeholders, shapes, stacks and masks stand where arrays were."""
    built = []

    class Picky(Node):
        value: jax.Array

        def __post_init__(self):
            built.append(self)
            if self.value.ndim != 1:
                raise ValueError(f"wants a vector, found {self.value.shape}")

        def merge(self, w):
            return w + self.value

    delta = {"a": Picky(jnp.ones(3)), "b": None}
    jax.tree.map(lambda _: "label", delta)
    jax.tree.map(lambda *x: jnp.stack(x), delta, delta)
    jax.eval_shape(lambda d: jax.tree.map(lambda x: x[None], d), delta)
    jax.vmap(lambda d: materialize({"a": jnp.ones(3), "b": 1.0}, d))(
        jax.tree.map(lambda x: jnp.stack([x, x]), delta)
    )
    optax.masked(optax.sgd(1.0), jax.tree.map(lambda _: False, delta)).init(delta)
    optax.multi_transform({"factors": optax.adam(1.0)}, groups).init(delta)
    jax.tree.unflatten(jax.tree.structure(delta), [object()])
    assert len(built) == 1
    with pytest.raises(ValueError, match=r"wants a vector, found \(3, 1\)"):
        Picky(jnp.ones((3, 1)))


@pytest.mark.parametrize(
    ("ranks", "axes", "message"),
    [
        ((2, 3), ((0,), (1,)), r"one common rank >= 1, found ranks \[2, 3\]"),
        ((0, 0), ((0,), (1,)), r"found ranks \[0, 0\]"),
        ((2, 2), ((0,), (2,)), "axis groups"),
        ((2, 2), ((0,), (1,), (2,)), "2 factors for 3 axis groups"),
    ],
)
def test_trap_3_bad_ranks_raise_when_a_node_is_built(ranks, axes, message):
    with pytest.raises(ValueError, match=message):
        CP(tuple(jnp.ones((4, r)) for r in ranks), axes=axes)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_nodes_survive_copy_and_pickle_in_memory(key, clone):
    delta = make_delta(key, backbone(), RULES)
    chex.assert_trees_all_equal(clone(delta), delta)
    chex.assert_trees_all_equal_structs(clone(delta), delta)


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
