"""What a node is: a frozen dataclass, a pytree, a registered type."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import RULES, Shift, backbone

from ftn_jax import Bank, Node, Task, groups, make_delta, materialize, static
from ftn_jax.factored import polyadic
from ftn_jax.nodes import CP, Replace
from ftn_jax.runs import fill


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
    with pytest.raises(TypeError, match=r"Careless: declare `group = static"):

        class Careless(Node):
            group: str = "norm"


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


def test_a_node_without_merge_cannot_be_built(forget):
    class Idle(Node):
        value: jax.Array

    with pytest.raises(TypeError, match="abstract class Idle.*merge"):
        Idle(jnp.ones(2))


def test_subclass_of_a_node_inherits_fields(forget, key):
    class Louder(Replace):
        gain: float = static(default=2.0)

        def merge(self, w):
            return self.gain * super().merge(w)

    node = Louder.init(key, jnp.ones(3))
    assert type(node) is Louder and Louder.data_fields == ("value",)
    (merged,) = jax.tree.leaves(materialize([jnp.ones(3)], [node]))
    np.testing.assert_array_equal(merged, 2 * np.ones(3))


def test_a_subclass_that_merges_otherwise_is_not_taken_for_its_parent(forget, key):
    class Louder(CP):
        def merge(self, w):
            return w + 2 * (super().merge(w) - w)

    w = jnp.ones((3, 4))
    node = Louder.init(key, w, rank=2)
    assert polyadic(CP.init(key, w, rank=2), w.shape)
    assert polyadic(node, w.shape) is None  # the factored path merges it
    with pytest.raises(ValueError, match="w: a bank cannot hold a Louder"):
        Bank.of({"a": Task({"w": node}, {})}, shared={"w": w})
    with pytest.raises(ValueError, match="w: the runs' Louder nodes"):
        fill([{"w": Louder.init(key, w, rank=rank)} for rank in (1, 2)])


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
