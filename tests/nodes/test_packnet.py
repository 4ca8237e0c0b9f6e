"""PackNet's node: where it starts, what it trains, and what it keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas.masks import packed_state
from weights import weight

from ftn_jax import count, extend, make_delta, make_optimizer, materialize
from ftn_jax.core import trainable, with_trained
from ftn_jax.models import RESNETS
from ftn_jax.nodes.packing import start_packing
from ftn_jax.nodes.packnet import PackNet


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def begin(w, task=3):
    """A complete node of random values on a state of two tasks and the base."""
    state = packed_state(w)
    node = PackNet.init(jax.random.key(0), w, extra={"packnet": state}, task=task)
    return node.replace(value=draw(w.shape, 5), **state)


def test_starts_at_the_packed_network_and_not_at_the_pretrained_weight(key):
    w = weight("conv2d")
    state = packed_state(w)
    node = PackNet.init(key, w, extra={"packnet": state}, task=4)
    assert node.values is None and node.owner is None
    np.testing.assert_array_equal(node.replace(**state).merge(w), state["values"])
    assert (node.value == 0).all() and np.abs(state["values"] - w).max() > 0.1
    earlier = np.where(np.asarray(state["owner"]) < 3, state["values"], 0)
    third = PackNet.init(key, w, extra={"packnet": state}, task=3)
    np.testing.assert_array_equal(third.replace(**state).merge(w), earlier)


def test_convolves_with_the_sum_of_the_masked_networks():
    """As the released code: the packed weights under the masks of tasks 1 .. t."""
    w, x = weight("conv2d"), draw((2, 7, 6, 4))
    node = begin(w)
    owner = np.asarray(node.owner)
    branches = [np.where(owner == t, node.values, 0) for t in (1, 2)]
    branches.append(np.where(owner == 0, node.value, 0))
    for stride, padding in ((1, "SAME"), (2, [(1, 1), (1, 1)]), (1, [(0, 2), (1, 0)])):
        conv = partial(
            jax.lax.conv_general_dilated,
            window_strides=(stride, stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        parts = [conv(x, jnp.asarray(b)) for b in branches]
        found = conv(x, node.merge(w))
        size = np.abs(found).max()
        np.testing.assert_allclose(found, sum(parts), atol=1e-5 * size, rtol=0)
        assert min(np.abs(p).max() for p in parts) > 1e-2 * size
        assert np.abs(found - conv(x, w)).max() > 1e-2 * size


@pytest.mark.parametrize("small", [False, True])
def test_the_gradient_reaches_own_positions_alone(small):
    w, pull = weight("conv2d"), draw((3, 3, 4, 5), 1)
    node = begin(w)
    own = np.asarray(node.owner) == 0
    node = node.compact() if small else node

    def loss(value):
        return (node.replace(value=value).merge(w) * pull).sum()

    found = jax.jit(jax.grad(loss))(node.value)
    expected = np.asarray(pull)[own] if small else np.where(own, pull, 0)
    np.testing.assert_array_equal(found, expected)
    assert own.sum() == 45


def test_momentum_and_weight_decay_do_not_leak():
    """Whatever the optimizer does to values elsewhere, merge does not see it."""
    shared = {"w": weight("conv2d"), "head": weight("dense")}
    extended = extend(shared, packnet={"w": packed_state(shared["w"])})
    start = partial(PackNet.init, task=3)
    delta = make_delta(jax.random.key(0), extended, {"w": start})
    delta["w"] = delta["w"].replace(value=draw(shared["w"].shape))
    tx = make_optimizer(
        {"weights": 0.1},
        steps=5,
        schedule="constant",
        weight_decay={"weights": 0.5},
        momentum=0.9,
    )

    @jax.jit
    def step(trained, state):
        def loss(trained):
            params = materialize(extended, with_trained(delta, trained))
            return ((params["w"] - 1) ** 2).sum()

        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    trained = trainable(delta)
    state = tx.init(trained)
    for _ in range(5):
        trained, state = step(trained, state)
    moved = np.abs(trained["w"].value - delta["w"].value)
    assert moved.min() > 1e-4  # decay and momentum moved every value
    before, after = (
        np.asarray(materialize(extended, d)["w"])
        for d in (delta, with_trained(delta, trained))
    )
    own = np.asarray(extended.extras["packnet"]["w"]["owner"]) == 0
    np.testing.assert_array_equal(after[~own], before[~own])
    assert np.abs(after - before)[own].min() > 1e-4


def test_merge_of_stacked_seeds_and_of_compact_nodes():
    w = weight("conv2d")
    nodes = [begin(w).replace(value=draw(w.shape, seed)) for seed in range(3)]
    one = jax.jit(PackNet.merge)
    loop = np.stack([one(n, w) for n in nodes])
    merge = jax.jit(jax.vmap(lambda n: n.merge(w)))
    for tasks in (nodes, [n.compact() for n in nodes]):
        stack = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
        np.testing.assert_array_equal(merge(stack), loop)
    assert np.abs(loop[0] - loop[1]).max() > 0.1


@pytest.mark.parametrize("free", [0, 1, 7, 24])
def test_compact_with_any_number_of_positions(key, free):
    w = weight("dense")
    owner = jnp.asarray(np.arange(24).reshape(4, 6) >= free, jnp.uint8)
    state = {"values": jnp.where(owner > 0, w, 0), "owner": owner}
    node = PackNet.init(key, w, extra={"packnet": state}, task=2)
    node = node.replace(value=draw(w.shape), **state)
    small = node.compact()
    assert small.value.shape == (free,) and small.compact() is small
    merged = jax.jit(PackNet.merge)(node, w)
    np.testing.assert_array_equal(jax.jit(PackNet.merge)(small, w), merged)
    np.testing.assert_array_equal(merged, np.where(owner > 0, w, node.value))
    kept = small.replace(values=None, owner=None)
    assert count({"w": kept}).total == free
    assert count({"w": kept}).bytes == 4 * free + 3


def test_reads_only_what_was_packed_before():
    w = weight("conv2d")
    node = begin(w, task=3)
    found = node.reads()
    owner = np.asarray(node.owner)
    earlier = (owner == 1) | (owner == 2)
    assert earlier.any() and (owner == 3).any()
    np.testing.assert_array_equal(found["owner"], np.where(earlier, owner, 0))
    np.testing.assert_array_equal(found["values"], np.where(earlier, node.values, 0))
    assert found["owner"].dtype == jnp.uint8
    assert (begin(w, task=1).reads()["values"] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extra": {"svd": {}}},
            r"nothing is packed .* \(found beside it: \['svd'\]\)",
        ),
        *(({"task": t}, "integer in 1 .. 255, found") for t in (0, 256, 1.5, "2")),
    ],
)
def test_init_refuses(key, options, message):
    w = weight("dense")
    defaults = {"extra": {"packnet": packed_state(w)}, "task": 2}
    with pytest.raises(ValueError, match=message):
        PackNet.init(key, w, **{**defaults, **options})


def test_make_delta_names_the_path_without_a_packed_state(key):
    shared = {"a": weight("dense"), "b": weight("dense")}
    extended = extend(shared, packnet=start_packing(shared, "a", prune=0.5))
    with pytest.raises(ValueError, match="b: nothing is packed beside"):
        make_delta(key, extended, {".": partial(PackNet.init, task=2)})


def test_merge_refuses_other_shapes_and_incomplete_nodes():
    node = begin(weight("dense"))
    for one in (node, node.compact()):
        with pytest.raises(ValueError, match=r"shape \(6, 4\), found \(\(4, 6\), \(4"):
            one.merge(jnp.ones((6, 4)))
        with pytest.raises(ValueError, match="not filled in; use materialize"):
            one.replace(values=None).merge(weight("dense"))


def test_counts_of_resnet50_and_a_figure_that_no_rule_gives(key):
    model = RESNETS["resnet50"](num_classes=None)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shared = jax.eval_shape(model.init, key, x)["params"]

    def begun(key, shared):
        state = {
            path: {"values": w, "owner": jnp.zeros(w.shape, jnp.uint8)}
            for path, w in (
                ("/".join(k.key for k in p), w)
                for p, w in jax.tree_util.tree_leaves_with_path(shared)
                if w.ndim == 4
            )
        }
        extended = extend(shared, packnet=state)
        rules = {".*/kernel": partial(PackNet.init, task=2)}
        return make_delta(key, extended, rules)

    found = count(jax.eval_shape(begun, key, shared))
    assert found.by_group == {"weights": 23_454_912}
    assert found.bytes == 4 * 23_454_912 + 2_931_864
    # Table 1 prints [1.60x] for five tasks; one byte of owner a weight gives 1.25.
    assert 1 + 1 / 4 == 1.25 != 1.60
