"""A mixed training batch moves each task as its own examples alone would."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from banks import build, classes_of, images
from flax import linen as nn

from ftn_jax import Task, TaskState, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.bank import Bank
from ftn_jax.metrics import classification
from ftn_jax.mixed import (
    create_mixed_state,
    make_mixed_eval_step,
    make_mixed_train_step,
    mixed,
)

pytestmark = pytest.mark.long

NAMES = [*"abacbbab"]  # one example of c: the variance of one image's places
LABELS = jnp.asarray(np.random.default_rng(3).integers(0, 3, 8), jnp.int32)
BATCH = {"image": images(8, seed=2), "label": LABELS}
SGD = optax.sgd(1.0)  # the step is the gradient
RATES = {"factors": 1e-3, "norm": 1e-2, "head": 1e-2}


@pytest.fixture(scope="module")
def trained():
    """The bank, and its state after one plain-gradient step on a mixed batch."""
    make, shared, tasks = build("resnet")
    tasks["idle"] = tasks["b"]
    bank = Bank.of(tasks, shared=shared, capacity=5)
    step = make_mixed_train_step(from_linen(make()), SGD)
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    state = create_mixed_state(bank.stack, tx=SGD, key=jax.random.key(0))

    def run(names=NAMES, batch=BATCH, state=state, ids=None):
        ids = bank.ids(names) if ids is None else ids
        found = counted(shared, state, ids, batch)
        assert len(traces) == 1  # whatever the mix
        return found

    return make, shared, tasks, bank, run, state


def own(batch, name, names=NAMES):
    rows = np.array([n for n, found in enumerate(names) if found == name])
    return {key: x[rows] for key, x in batch.items()}


@cache
def plain_step(model, tx):
    return jax.jit(make_train_step(from_linen(model), tx))


def alone(make, shared, task, batch, tx=SGD, steps=1):
    """Train one task on its own examples, in a network of its own head."""
    step = plain_step(make(classes_of(task)), tx)
    state = TaskState.create(*vars(task).values(), tx=tx, key=jax.random.key(0))
    for _ in range(steps):
        state, sums = step(shared, state, batch)
    return state.task, sums


def moves(new, old):
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs]


@pytest.mark.parametrize("name", [*"abc"])
def test_gradients_and_statistics_are_those_of_the_task_alone(trained, name):
    make, shared, tasks, bank, run, _ = trained
    state, sums = run()
    found = bank.trained(state.task).take(name)
    expected, alone_sums = alone(make, shared, tasks[name], own(BATCH, name))
    for part in ("delta", "model_state"):
        one, two, old = (getattr(t, part) for t in (found, expected, tasks[name]))
        size = max(np.abs(m).max() for m in moves(two, old))
        assert size > 1e-2
        for a, b in zip(moves(one, old), moves(two, old), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * size, rtol=1e-4)
    (slot,) = bank.ids([name]).tolist()
    for key, value in alone_sums.items():
        np.testing.assert_allclose(sums[key][slot], value, rtol=1e-5)
    others = alone(make, shared, tasks[name], own(BATCH, "b" if name != "b" else "a"))
    assert max(np.abs(m).max() for m in moves(others[0], expected)) > 1e-2


def test_tasks_that_are_not_in_the_batch_stay_bit_for_bit(trained):
    _, _, tasks, bank, run, _ = trained
    state, sums = run()
    new = bank.trained(state.task)
    chex.assert_trees_all_equal(new.take("idle"), tasks["idle"])
    assert state.step.tolist() == [1, 1, 1, 0, 0]
    assert sums["count"].tolist() == [3, 4, 1, 0, 0]
    state, _ = run([*"aaaaaaaa"], state=state)  # the same program
    chex.assert_trees_all_equal(bank.trained(state.task).take("b"), new.take("b"))
    assert (
        max(
            np.abs(m).max()
            for m in moves(bank.trained(state.task).take("a"), new.take("a"))
        )
        > 0
    )


def test_padding_stays_exactly_zero(trained):
    _, _, _, bank, run, _ = trained
    state, _ = run()
    kernel = state.task.delta["layer1_0"]["conv1"]["kernel"]
    (slot,) = bank.ids(["a"]).tolist()
    for factor in kernel.factors:
        assert (factor[slot, :, 1:] == 0).all() and (factor[slot, :, 0] != 0).any()
    bias = state.task.delta["head"]["bias"].value
    assert (bias[slot, 3:] == 0).all() and (bias[slot, :3] != 0).all()


def test_one_tasks_nan_stops_that_task_alone(trained):
    _, _, tasks, bank, run, _ = trained
    bad = {**BATCH, "image": BATCH["image"].at[0].set(jnp.nan)}  # of task a
    state, sums = run(batch=bad)
    clean, _ = run()
    chex.assert_trees_all_equal(bank.trained(state.task).take("a"), tasks["a"])
    assert state.finite.tolist() == [False, True, True, True, True]
    assert sums["nonfinite"].tolist() == [1, 0, 0, 0, 0]
    one, two = (bank.trained(s.task).take("b") for s in (state, clean))
    chex.assert_trees_all_close(one, two, atol=1e-5, rtol=1e-5)
    later, _ = run(state=state)
    chex.assert_trees_all_equal(bank.trained(later.task).take("a"), tasks["a"])


def test_examples_without_a_task_move_nothing(trained):
    _, _, _, bank, run, _ = trained
    ids = bank.ids(NAMES).at[3].set(77)  # c's only example
    state, sums = run(ids=ids)
    assert state.finite.all() and sums["count"].tolist() == [3, 4, 0, 0, 0]
    assert state.step.tolist() == [1, 1, 0, 0, 0]
    clean, _ = run()
    one, two = (bank.trained(s.task) for s in (state, clean))
    chex.assert_trees_all_close(one.take("a"), two.take("a"), atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_equal(one.take("c"), bank.take("c"))
    free, _ = run(ids=bank.ids(NAMES).at[3].set(4))  # an empty slot
    chex.assert_trees_all_equal(free.task, state.task)
    assert free.finite.all()


def test_each_task_has_its_own_optimizer():
    """Moments, schedule and clipping are the task's own, over steps of other mixes."""
    make, shared, tasks = build("attention", {"a": (1, 3), "b": (4, 5)})
    rates = {**RATES, "weights": 1e-2}
    tx = make_optimizer(rates, steps=5, clip_norm=0.1, weight_decay={"factors": 1e-2})
    bank = Bank.of(tasks, shared=shared)
    step = jax.jit(make_mixed_train_step(from_linen(make()), tx), donate_argnums=1)
    state = create_mixed_state(bank.stack, tx=tx, key=jax.random.key(0))
    mixes = [[*"abababab"], [*"bbbbbbbb"], [*"abababab"]]
    for names in mixes:
        state, _ = step(shared, state, bank.ids(names), BATCH)
    assert state.step.tolist() == [2, 3]
    assert not any(x.is_deleted() for x in jax.tree.leaves((bank.stack, shared)))
    found = bank.trained(state.task).take("a")
    expected, _ = alone(
        make, shared, tasks["a"], own(BATCH, "a", mixes[0]), tx=tx, steps=2
    )
    # Adam divides by the gradient's size: where that is rounding, so is the step.
    chex.assert_trees_all_close(found.delta, expected.delta, atol=1e-4)
    assert max(np.abs(m).max() for m in moves(expected.delta, tasks["a"].delta)) > 1e-3
    evaluate = jax.jit(make_mixed_eval_step(from_linen(make())))
    sums = evaluate(shared, state.task, bank.ids(mixes[0]), BATCH)
    assert sums["count"].tolist() == [4, 4]


BOXED = nn.with_partitioning(nn.initializers.ones, ("model",))


def test_statistics_as_flax_takes_them():
    """Both of BatchNorm's variances, and frozen ones."""
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(6, 4, 5)), jnp.float32)
    names = [*"abbaba"]
    for fast in (True, False):
        model = nn.BatchNorm(use_fast_variance=fast, momentum=0.7, scale_init=BOXED)
        variables = model.init(jax.random.key(0), x, use_running_average=True)
        stats = {"batch_stats": variables["batch_stats"]}
        bare = jax.tree.map(lambda _: None, variables["params"])
        both = {n: Task(bare, stats) for n in "ab"}
        bank = Bank.of(both, shared=variables["params"])
        apply = from_linen(
            model,
            train_options={"use_running_average": False},
            eval_options={"use_running_average": True},
        )
        run = partial(mixed, apply, variables["params"], bank.stack, bank.ids(names))
        outputs, state = jax.jit(partial(run, train=True))({"image": x})
        for slot, name in enumerate("ab"):
            rows = np.array([n for n, found in enumerate(names) if found == name])
            expected, new = model.apply(
                variables, x[rows], use_running_average=False, mutable=["batch_stats"]
            )
            np.testing.assert_allclose(outputs[rows], expected, atol=1e-5)
            for key in ("mean", "var"):
                found = state["batch_stats"][key][slot]
                np.testing.assert_allclose(found, new["batch_stats"][key], rtol=1e-5)
                assert jnp.abs(found - stats["batch_stats"][key]).max() > 0.1
        _, kept = run({"image": x}, train=False)
        chex.assert_trees_all_equal(kept, bank.stack.model_state)


def test_the_sums_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(4, 3))), jnp.array([0, 1, 2, 1])
    whole = classification(logits, {"label": labels})
    each = jax.vmap(lambda y, k: classification(y[None], {"label": k[None]}))(
        logits, labels
    )
    chex.assert_trees_all_close(jax.tree.map(jnp.sum, each), whole, rtol=1e-6)
