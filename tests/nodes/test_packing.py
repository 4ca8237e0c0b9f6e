"""Packing tasks one after the other: capacity, order, and what later ones leave."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import (
    Extended,
    Task,
    compact,
    extend,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import trainable, with_trained
from ftn_jax.manifest import TaskFileError
from ftn_jax.nodes.packing import free_share, next_task, pack, prune, start_packing
from ftn_jax.nodes.packnet import PackNet
from ftn_jax.nodes.replace import Replace

KERNELS = ".*/kernel"


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def backbone(dtype=jnp.float32):
    return {
        "a": {"kernel": draw((3, 3, 4, 5), 0, dtype), "bias": draw((5,), 1, dtype)},
        "b": {"kernel": draw((5, 8), 2, dtype)},
    }


def base(dtype=jnp.float32):
    shared = backbone(dtype)
    return extend(shared, packnet=start_packing(shared, KERNELS, prune=0.5))


def begin(extended, task):
    rules = {KERNELS: partial(PackNet.init, task=task)}
    return make_delta(jax.random.key(0), extended, rules)


def trained(delta, seed):
    """The delta with any values, as training would leave it."""
    rng = np.random.default_rng(seed)
    values = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), trainable(delta)
    )
    return with_trained(delta, values)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def far(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs) > 0.1


class Story:
    """A base and the tasks packed onto it, in order: the state after each."""

    def __init__(self, dtype=jnp.float32, last=4):
        self.states, self.deltas, self.params = [base(dtype)], {}, {}
        for task in range(2, last + 1):
            state = self.states[-1]
            delta = trained(begin(state, task), task)
            if task < last:
                delta = trained(prune(delta, 0.75), 10 * task)
            self.deltas[task] = delta
            self.params[task] = materialize(state, delta)
            self.states.append(pack(state, delta))


@pytest.fixture(scope="module")
def story():
    return Story()


# The packed state -------------------------------------------------------------------


def test_prune_looks_at_the_tasks_own_positions_alone(story):
    delta = trained(begin(story.states[0], 2), 0)
    other = Replace(jnp.ones(5))
    pruned = prune({**delta, "other": other}, 0.75)
    assert pruned["other"] is other
    for name in ("a", "b"):
        before, after = delta[name]["kernel"], pruned[name]["kernel"]
        places, values = before.own
        kept, left = after.own
        assert kept.size == places.size - round(0.75 * places.size)
        assert set(kept) < set(places)
        gone = np.setdiff1d(places, kept)
        sizes = np.abs(np.asarray(before.value).ravel())
        assert sizes[gone].max() <= np.abs(left).min()
        assert sizes.min() < np.abs(left).min()
        assert values.size == places.size


def test_capacity_runs_out_by_the_papers_shares(story):
    """Half free, then 3/4 of it, then 3/4 of that; the last task keeps the rest."""
    free = [90 + 20, 68 + 15, 51 + 11, 0]
    assert [free_share(s) for s in story.states] == [n / 220 for n in free]
    assert [next_task(s) for s in story.states] == [2, 3, 4, 5]
    last = story.states[-1]
    with pytest.raises(ValueError, match="task 5 owns no position: nothing was free"):
        pack(last, begin(last, 5))


def test_pack_writes_the_task_and_leaves_the_old_state_alone(story):
    before, after = (s.extras["packnet"]["a/kernel"] for s in story.states[:2])
    old, values, owner = (
        np.asarray(x).ravel() for x in (before["values"], *after.values())
    )
    places, own = story.deltas[2]["a"]["kernel"].own
    assert (owner[places] == 2).all() and (values[places] == own).all()
    np.testing.assert_array_equal(owner == 1, np.asarray(before["owner"]).ravel())
    np.testing.assert_array_equal(values[owner == 1], old[owner == 1])
    assert (values[owner == 0] == 0).all() and (owner == 0).sum() == 68
    assert story.states[1].params is story.states[0].params
    more = Extended(story.states[0].params, {"x": {}, **story.states[0].extras})
    assert "x" in pack(more, story.deltas[2]).extras


def test_the_base_may_be_trained_too():
    """As task 1, from the pretrained weights; untrained, it is the pruned base."""
    shared = backbone()
    start = extend(shared, packnet=start_packing(shared, KERNELS, prune=None))
    assert next_task(start) == 1 and free_share(start) == 1
    delta = begin(start, 1)
    assert_equal(materialize(start, delta), shared)
    pruned = prune(delta, 0.5)
    assert_equal(pack(start, pruned).extras, base().extras)
    params = materialize(start, trained(pruned, 3))
    assert int((params["b"]["kernel"] == 0).sum()) == 20 and far(params, shared)
    packed = pack(start, trained(pruned, 3))
    assert_equal(materialize(packed, begin(packed, 2)), params)


# Later tasks ------------------------------------------------------------------------


def test_packing_later_tasks_leaves_earlier_ones_bit_equal(story):
    for task, delta in story.deltas.items():
        small = compact(delta)
        for state in story.states[task - 2 :]:
            assert_equal(materialize(state, delta), story.params[task])
            assert_equal(materialize(state, small), story.params[task])
    assert far(story.params[2], story.params[3])
    assert far(story.params[3], story.params[4])
    # An earlier state lacks what the task reads.
    assert far(materialize(story.states[0], story.deltas[3]), story.params[3])


def test_packing_in_bfloat16_leaves_earlier_tasks_bit_equal():
    """The state is rounded as the merged weights are: once."""
    story = Story(jnp.bfloat16, last=3)
    assert story.states[-1].extras["packnet"]["b/kernel"]["values"].dtype == "bfloat16"
    assert_equal(materialize(story.states[-1], story.deltas[2]), story.params[2])
    third = materialize(story.states[-1], begin(story.states[-1], 4))
    assert_equal(third, story.params[3])  # as packed: nothing is free to differ
    assert far(story.params[2], third)


def test_a_later_task_sees_earlier_ones_and_zeros(story):
    params = np.asarray(story.params[3]["a"]["kernel"])
    owner = np.asarray(story.states[2].extras["packnet"]["a/kernel"]["owner"])
    assert (params[owner == 0] == 0).all() and (owner == 0).any()
    w = np.asarray(backbone()["a"]["kernel"])
    np.testing.assert_array_equal(params[owner == 1], w[owner == 1])
    second = np.asarray(story.params[2]["a"]["kernel"])
    np.testing.assert_array_equal(params[owner == 2], second[owner == 2])


def test_an_early_tasks_file_opens_on_every_later_state(story, tmp_path):
    for task, delta in story.deltas.items():
        then = story.states[task - 2]
        folder = tmp_path / str(task)
        save_task(folder, Task(compact(delta), {}), shared=then, name=str(task))
        for state in story.states[task - 2 :]:
            found = restore_task(folder, state).task.delta
            assert_equal(materialize(state, found), story.params[task])
        for state in story.states[: task - 2]:
            with pytest.raises(TaskFileError, match="a/kernel beside the backbone"):
                restore_task(folder, state)


def test_a_tasks_file_knows_what_it_reads(story, tmp_path):
    """Of the packed state: the values before its time; of the backbone: no kernel."""
    delta, state = story.deltas[3], story.states[-1]
    folder = save_task(tmp_path, Task(compact(delta), {}), shared=state, name="third")
    for owner, opens in ((1, False), (2, False), (3, True), (4, True)):
        x = state.extras["packnet"]["a/kernel"]
        changed = jnp.where(x["owner"] == owner, x["values"] + 1, x["values"])
        entry = {"a/kernel": {**x, "values": changed}}
        other = Extended(
            state.params, {"packnet": {**state.extras["packnet"], **entry}}
        )
        if opens:
            found = restore_task(folder, other).task.delta
            assert_equal(materialize(other, found), story.params[3])
        else:
            with pytest.raises(TaskFileError, match="a/kernel beside the backbone"):
                restore_task(folder, other)
    moved = jax.tree.map(lambda w: w + 1, state.params)
    kernels = {"a": {**moved["a"], "bias": state.params["a"]["bias"]}, "b": moved["b"]}
    assert restore_task(folder, Extended(kernels, state.extras)).name == "third"
    with pytest.raises(TaskFileError, match="a/bias"):
        restore_task(folder, Extended(moved, state.extras))
    with pytest.raises(TaskFileError, match="found nothing at 'a/kernel'"):
        restore_task(folder, state.params)


def test_compact_tasks_pack_and_prune_alike(story):
    delta = trained(begin(story.states[0], 2), 5)
    early, late = prune(compact(delta), 0.75), compact(prune(delta, 0.75))
    assert_equal(early, late)
    assert early["a"]["kernel"].value.shape == (22,)
    packed = pack(story.states[0], early)
    assert_equal(packed.extras, pack(story.states[0], prune(delta, 0.75)).extras)


# Refusals ---------------------------------------------------------------------------


def test_pack_refuses_tasks_out_of_order(story):
    for state, task, expected in ((0, 3, 2), (1, 2, 3), (2, 2, 4)):
        message = rf"the tasks \[{task}\], expected task {expected}: .* order"
        with pytest.raises(ValueError, match=message):
            pack(story.states[state], story.deltas[task])
    mixed = {**story.deltas[2], "b": story.deltas[3]["b"]}
    with pytest.raises(ValueError, match=r"the tasks \[2, 3\], expected task 2"):
        pack(story.states[0], mixed)


def test_pack_refuses_positions_that_are_taken(story):
    stale = begin(story.states[0], 3)  # begun before task 2 was packed
    message = r"a/kernel: 22 positions of task 3 are owned by tasks \[2\] already"
    with pytest.raises(ValueError, match=message):
        pack(story.states[1], stale)


def test_pack_refuses_other_kernels(story):
    state = story.states[0]
    a, b = (state.extras["packnet"][f"{n}/kernel"] for n in "ab")
    only = Extended(state.params, {"packnet": {"b/kernel": b}})
    with pytest.raises(ValueError, match=r"a/kernel: not in .* has \[b/kernel\]"):
        pack(only, story.deltas[2])
    turned = {k: x.reshape(3, 3, 5, 4) for k, x in a.items()}
    other = Extended(state.params, {"packnet": {"a/kernel": turned, "b/kernel": b}})
    with pytest.raises(
        ValueError, match=r"a/kernel: the task has shape \(3, 3, 4, 5\)"
    ):
        pack(other, story.deltas[2])


def test_functions_refuse_what_holds_no_packed_state(story):
    for function in (free_share, next_task, partial(pack, delta=story.deltas[2])):
        for shared in (backbone(), Extended(backbone(), {"svd": {}})):
            with pytest.raises(ValueError, match="no packed state lies beside"):
                function(shared)
    with pytest.raises(ValueError, match="holds no PackNet node"):
        pack(story.states[0], {"a": Replace(jnp.ones(2))})
    with pytest.raises(ValueError, match="holds no PackNet node"):
        prune({"a": None}, 0.5)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_shares_to_prune_are_checked(share, story):
    message = r"share to prune must be in \[0, 1\)"
    with pytest.raises(ValueError, match=message):
        start_packing(backbone(), KERNELS, prune=share)
    with pytest.raises(ValueError, match=message):
        prune(story.deltas[2], share)
