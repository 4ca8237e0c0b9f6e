"""The kinds of fields a node may have, through every function of the core."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import Net, batch
from toy import setup as toy_setup

from ftn_jax import (
    Extended,
    Node,
    Task,
    TaskState,
    beside,
    compact,
    count,
    extend,
    frozen,
    groups,
    make_delta,
    make_train_step,
    materialize,
    restore_extras,
    restore_task,
    save_extras,
    save_task,
    static,
    tied,
)
from ftn_jax.apply import from_linen
from ftn_jax.core import complete, perturb, trainable, with_trained
from ftn_jax.manifest import TaskFileError
from ftn_jax.nodes import Replace


class Mixed(Node):
    """w + own * bits + common * base: one field of each kind."""

    own: jax.Array
    common: jax.Array = tied()
    bits: jax.Array = frozen()
    base: jax.Array = beside("bases")
    share: str | None = static(default="all")
    group: str = static(default="mixed")

    @classmethod
    def init(cls, key, w, *, share="all"):
        bits = (jnp.arange(w.shape[-1]) % 2).astype(jnp.uint8)
        return cls(jnp.ones(w.shape), jax.random.normal(key, (2,)), bits, share=share)

    def merge(self, w):
        return w + self.own * self.bits[None] + self.common.sum() * self.base

    def perturb(self, key):
        return self.replace(own=jax.random.normal(key, self.own.shape))

    def compact(self):
        return None if not np.any(self.own) else self.replace(own=self.own * 1)

    def reads(self):
        return {"base": self.base[:1]}


@pytest.fixture
def shared():
    rng = np.random.default_rng(0)
    tree = {n: {"kernel": jnp.asarray(rng.normal(size=(3, 4)))} for n in "abc"}
    base = {f"{n}/kernel": {"base": jnp.full((3, 4), float(ord(n)))} for n in "abc"}
    # A node with a share label finds what lies beside the backbone by its label.
    return extend(tree, bases=base | {"all": {"base": jnp.ones((3, 4))}})


@pytest.fixture
def delta(shared, key):
    rules = {"[ab]/kernel": Mixed.init, "c/kernel": Replace.init}
    return make_delta(key, shared, rules)


def test_merge_sees_all_of_them(shared, delta):
    assert delta["b"]["kernel"].common is None and delta["a"]["kernel"].base is None
    common = delta["a"]["kernel"].common.sum()
    found = materialize(shared, delta)
    for name in "ab":
        expected = shared.params[name]["kernel"] + np.array([[0, 1, 0, 1]]) + common
        np.testing.assert_allclose(found[name]["kernel"], expected, rtol=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(shared.params)


def test_only_what_is_trained_gets_gradient_label_and_count(shared, delta):
    trained = trainable(delta)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}

    def loss(t):
        params = materialize(shared, with_trained(delta, t))
        return sum((x**2).sum() for x in jax.tree.leaves(params))

    grads = jax.jit(jax.grad(loss))(trained)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    assert jax.tree.structure(groups(delta)) == jax.tree.structure(trained)
    # Both layers pull at the common factor.
    alone = jax.grad(lambda t: loss({**t, "b": trained["b"]}))(trained)
    assert not np.allclose(
        grads["a"]["kernel"].common, 2 * alone["a"]["kernel"].own.sum()
    )
    assert count(delta).by_group == {"mixed": 12 + 2 + 12, "norm": 12}
    assert count(delta).bytes == 4 * (12 + 2 + 12 + 12) + 2 * 4
    chex.assert_trees_all_equal(with_trained(delta, trained), delta)


def test_tied_gradients_add_up(shared, delta):
    def loss(common):
        tree = {
            **delta,
            "a": {"kernel": delta["a"]["kernel"].replace(common=common)},
        }
        params = materialize(shared, tree)
        return params["a"]["kernel"].sum() + params["b"]["kernel"].sum()

    grad = jax.grad(loss)(delta["a"]["kernel"].common)
    np.testing.assert_allclose(grad, [24.0, 24.0])  # 12 entries in each of two


def test_labels_keep_apart_what_they_name(shared, key):
    rules = {
        "a/kernel": partial(Mixed.init, share=None),
        "b/kernel": partial(Mixed.init, share=None),
    }
    delta = make_delta(key, shared, rules)
    assert delta["a"]["kernel"].common is not None
    assert delta["b"]["kernel"].common is not None
    bases = [n.base[0, 0] for _, _, n in complete(shared, delta) if n]
    assert bases == [ord("a"), ord("b")]


def test_tied_fields_of_two_shapes_are_refused(key):
    class Own(Node):
        x: jax.Array = tied()
        share: str = static(default="one")

        @classmethod
        def init(cls, key, w):
            return cls(jnp.zeros(w.shape))

        def merge(self, w):
            return w + self.x

    tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"b: .*'one' share 'x'.*\(3,\).*\(2,\)"):
        make_delta(key, tree, {".*": Own.init})


def test_what_does_not_lie_beside_the_backbone_is_named(shared, delta):
    with pytest.raises(ValueError, match="a/kernel: a Mixed reads 'base' of 'bases'"):
        materialize(shared.params, delta)
    with pytest.raises(ValueError, match=r"already has \['bases'\]"):
        extend(shared, bases={})
    assert sorted(extend(shared, more={}).extras) == ["bases", "more"]


def test_an_init_that_asks_for_extras_gets_those_of_its_path(shared, key):
    class Asks(Node):
        x: jax.Array

        @classmethod
        def init(cls, key, w, *, extra):
            return cls(extra["bases"]["base"][0, 0] * jnp.ones(w.shape))

        def merge(self, w):
            return w + self.x

    delta = make_delta(key, shared, {".*": Asks.init})
    found = [n.x[0, 0] for _, _, n in complete(shared, delta) if n]
    assert found == [ord(n) for n in "abc"]


def test_perturb_draws_by_path_and_leaves_other_nodes_alone(delta, key):
    new = perturb(delta, key)
    assert not np.allclose(new["a"]["kernel"].own, new["b"]["kernel"].own)
    assert new["c"]["kernel"] is delta["c"]["kernel"]


def test_compact_drops_what_changes_nothing(delta):
    delta["a"]["kernel"] = delta["a"]["kernel"].replace(own=jnp.zeros((3, 4)))
    small = compact(delta)
    assert small["a"]["kernel"] is None and small["b"]["kernel"] is not None


def test_task_file_names_what_it_reads(shared, delta, tmp_path):
    save_task(tmp_path / "t", Task(delta, {}), shared=shared, name="t")
    found = restore_task(tmp_path / "t", shared).task.delta
    chex.assert_trees_all_equal(found, delta)
    assert jax.tree.structure(found) == jax.tree.structure(delta)
    unread = jax.tree.map(jnp.copy, shared)
    unread.extras["bases"]["all"]["base"] = jnp.ones((3, 4)).at[2].set(5)
    restore_task(tmp_path / "t", unread)  # `reads` says that only row 0 matters
    other = jax.tree.map(lambda x: x + 1, shared.extras)
    with pytest.raises(TaskFileError, match="reads of a/kernel beside the backbone"):
        restore_task(tmp_path / "t", Extended(shared.params, other))
    with pytest.raises(TaskFileError, match="found nothing at 'all'"):
        restore_task(tmp_path / "t", shared.params)


def test_extras_are_saved_and_bound_to_their_backbone(shared, tmp_path):
    save_extras(tmp_path, shared)
    found = restore_extras(tmp_path, shared.params)
    chex.assert_trees_all_equal(found, shared)
    with pytest.raises(TaskFileError, match="another backbone.*a/kernel"):
        restore_extras(tmp_path, jax.tree.map(lambda x: x + 1, shared.params))
    with pytest.raises(TaskFileError, match="'ftn_jax extras', expected 'ftn_jax task"):
        restore_task(tmp_path, shared)


class Noisy(Node):
    """A factor with frozen bits in a network that trains."""

    value: jax.Array
    bits: jax.Array = frozen()

    @classmethod
    def init(cls, key, w):
        return cls(jnp.zeros(w.shape), jnp.ones(w.shape, jnp.uint8))

    def merge(self, w):
        return w + self.value * self.bits

    def perturb(self, key):
        drop = jax.random.bernoulli(key, 0.5, self.value.shape)
        return self.replace(bits=self.bits * drop.astype(jnp.uint8))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_with_frozen_arrays_dropout_and_penalty(accumulate):
    shared, state, _ = toy_setup()
    delta = {
        **state.task.delta,
        "conv": {"kernel": Noisy.init(None, shared["conv"]["kernel"])},
    }
    tx = optax.multi_transform(
        dict.fromkeys(("factors", "norm", "head"), optax.sgd(0.1)), groups
    )
    start = TaskState.create(delta, state.task.model_state, tx=tx, key=state.key)

    def penalty(delta, step):
        return 0.5 * (delta["head"]["bias"].value ** 2).sum() + step

    def run(penalty):
        step = make_train_step(
            from_linen(Net()), tx, penalty=penalty, accumulate=accumulate
        )
        return jax.jit(step)(shared, start, batch())

    plain, sums = run(None)
    node = plain.task.delta["conv"]["kernel"]
    np.testing.assert_array_equal(node.bits, 1)  # dropout leaves the state's own alone
    moved = np.asarray(node.value) != 0
    assert 0.3 < moved.mean() < (0.7 if accumulate == 1 else 0.9)
    assert "penalty" not in sums
    bias = start.task.delta["head"]["bias"].replace(value=jnp.arange(3.0))
    start.task.delta["head"]["bias"] = bias
    plain, _ = run(None)
    pulled, sums = run(penalty)
    found = (
        plain.task.delta["head"]["bias"].value - pulled.task.delta["head"]["bias"].value
    )
    np.testing.assert_allclose(found, 0.1 * np.arange(3.0), atol=1e-6)
    assert float(sums["penalty"] / sums["count"]) == pytest.approx(2.5)
