"""Tasks go into a bank and come back out, bit for bit."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from banks import build
from weights import randomized

from ftn_jax import Node, Task, make_delta
from ftn_jax.bank import Bank
from ftn_jax.node import is_node
from ftn_jax.nodes import CP, Kronecker, LoRA, Replace
from ftn_jax.slots import LowRankSlots, ReplaceSlots

SHARED = {"conv": {"kernel": jnp.ones((3, 3, 4, 6))}, "head": {"bias": jnp.ones(7)}}
BIAS = partial(Replace.init, group="head")


def small(seed=0, state=None, **rules):
    """A task of a tiny backbone, with random nodes."""
    rules = {f"{name}/.*": init for name, init in rules.items()}
    delta = jax.eval_shape(
        lambda key: make_delta(key, SHARED, rules), jax.random.key(0)
    )
    delta = jax.tree.map(lambda n: randomized(n, seed), delta, is_leaf=is_node)
    return Task(delta, {} if state is None else state)


def heads(classes):
    return partial(Replace.init, group="head", shape=(classes,))


@pytest.mark.parametrize("network", ["resnet", "attention"])
def test_tasks_come_back_bit_for_bit(network):
    _, shared, tasks = build(network)
    bank = Bank.of(tasks, shared=shared, capacity=6, rank=7, classes=9)
    for name, task in tasks.items():
        taken = bank.take(name)
        chex.assert_trees_all_equal_structs(taken, task)  # ranks, scales, groups too
        chex.assert_trees_all_equal_shapes_and_dtypes(taken, task)
        chex.assert_trees_all_equal(taken, task)
    a, c = (jax.tree.leaves(bank.take(n).delta)[0] for n in "ac")
    assert a.shape != c.shape or bool((a != c).any())


def test_weights_that_are_not_finite_and_narrow_types_come_back_too():
    odd = jnp.array([-0.0, jnp.nan, jnp.inf, 1, 2, 3, 4])
    task = small(head=BIAS, conv=partial(LoRA.init, rank=2))
    task.delta["head"]["bias"] = Replace(odd, group="head")
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small(1, head=BIAS))
    bank = Bank.of({"odd": task, "half": halves}, shared=SHARED)
    found = bank.take("odd").delta["head"]["bias"].value
    assert np.asarray(found).tobytes() == np.asarray(odd).tobytes()
    chex.assert_trees_all_equal(bank.take("half"), halves)
    assert bank.take("half").delta["head"]["bias"].value.dtype == jnp.bfloat16
    number = Task({"scale": Replace(jnp.float32(3))}, {})
    bank = Bank.of({"a": number}, shared={"scale": jnp.float32(1)})
    chex.assert_trees_all_equal(bank.take("a"), number)


def test_a_path_without_a_node_stays_without():
    tasks = {
        "bare": small(),
        "conv": small(1, conv=partial(CP.init, rank=3)),
        "bias": small(2, head=BIAS),
    }
    bank = Bank.of(tasks, shared=SHARED, capacity=4)
    assert bank.take("bare").delta == {"conv": {"kernel": None}, "head": {"bias": None}}
    slots: ReplaceSlots = bank.stack.delta["head"]["bias"]
    merged = slots.merge(SHARED["head"]["bias"])
    np.testing.assert_array_equal(merged[:2], np.ones((2, 7)))  # the backbone's own
    assert (merged[2] != 1).all()


def test_padding_adds_exactly_nothing():
    task = small(1, conv=partial(CP.init, rank=2, scale=0.7))
    other = small(2, conv=partial(CP.init, rank=5))
    w = SHARED["conv"]["kernel"]

    def merged(**options):
        bank = Bank.of({"a": task, "b": other}, shared=SHARED, **options)
        slots: LowRankSlots = bank.stack.delta["conv"]["kernel"]
        assert slots.factors[0].shape[-1] == options.get("rank", 5)
        return slots.merge(w)

    tight, wide = merged(), merged(rank=16, capacity=8)
    np.testing.assert_allclose(tight, wide[:2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(wide[2:], jnp.broadcast_to(w, (6, *w.shape)))
    np.testing.assert_allclose(
        tight[0], task.delta["conv"]["kernel"].merge(w), rtol=1e-5, atol=1e-5
    )
    assert jnp.abs(tight[0] - w).max() > 0.1


def test_put_and_drop_within_the_capacity():
    bank = Bank.of({"a": small(1, head=heads(4))}, shared=SHARED, capacity=2)
    more = bank.put("b", small(2, head=heads(3)))
    assert bank.tasks == ["a"] and more.tasks == ["a", "b"]
    chex.assert_trees_all_equal(more.take("a"), bank.take("a"))
    chex.assert_trees_all_equal(more.take("b"), small(2, head=heads(3)))
    chex.assert_trees_all_equal_structs(more.stack, bank.stack)
    with pytest.raises(ValueError, match="no free slot for 'c' among 2"):
        more.put("c", small(3, head=heads(4)))
    again = more.put("a", small(4, head=heads(2)))
    assert again.ids(["b", "a"]).tolist() == [1, 0]
    chex.assert_trees_all_equal(again.take("a"), small(4, head=heads(2)))
    rest = more.drop("a").put("c", small(3, head=heads(1)))
    assert rest.names == ("c", "b")
    with pytest.raises(ValueError, match=r"no tasks \['a'\] in the bank, it has"):
        rest.take("a")


def test_names_that_the_bank_does_not_have():
    bank = Bank.of({"a": small(), "b": small()}, shared=SHARED)
    assert bank.ids(["b", "a", "b"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"no tasks \['z'\] .* it has \['a', 'b'\]"):
        bank.ids(["a", "z"])


REFUSED = {
    "type": (
        {"conv": partial(CP.init, rank=2)},
        {"conv": partial(LoRA.init, rank=2)},
        r"conv/kernel: the tasks' nodes are of types \['CP', 'LoRA'\]",
    ),
    "kind": (
        {"conv": partial(Kronecker.init, rank=1, n=2)},
        {},
        r"conv/kernel: .*cannot hold a Kronecker; it holds CP, LoRA",
    ),
    "form": (
        {"conv": partial(LoRA.init, rank=2, form="reshape")},
        {},
        "conv/kernel: .*use form='conv'",
    ),
    "axes": (
        {"conv": partial(CP.init, rank=2)},
        {"conv": partial(CP.init, rank=2, axes=((0, 1, 2), (3,)))},
        "conv/kernel: the tasks' factors span the axes",
    ),
    "group": (
        {"conv": partial(CP.init, rank=2)},
        {"conv": partial(CP.init, rank=2, group="slow")},
        r"conv/kernel: .*optimizer groups \['factors', 'slow'\]",
    ),
    "headless": (
        {"head": heads(3)},
        {},
        "'b': head/bias: the task has no node where others replace",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stacked_is_refused_by_path(case):
    one, two, message = REFUSED[case]
    tasks = {"a": small(1, **one), "b": small(2, **two)}
    with pytest.raises(ValueError, match=message):
        Bank.of(tasks, shared=SHARED)


def test_tasks_that_do_not_fit_later():
    rules = {"conv": partial(CP.init, rank=2)}
    bank = Bank.of({"a": small(1, **rules)}, shared=SHARED, capacity=3)
    with pytest.raises(ValueError, match="conv/kernel: .*more room"):
        bank.put("b", small(2, conv=partial(CP.init, rank=3)))
    with pytest.raises(ValueError, match="head/bias: the bank has no nodes here"):
        bank.put("b", small(2, head=BIAS))
    with pytest.raises(ValueError, match="head/bias: .*all \\(7,\\) here"):
        even = Bank.of({"a": small(1, head=BIAS)}, shared=SHARED, capacity=2)
        even.put("b", small(2, head=heads(4)))  # its absent classes would get logits
    with pytest.raises(ValueError, match="conv/kernel: found a LoRA .* holds CP"):
        bank.put("b", small(2, conv=partial(LoRA.init, rank=2)))
    with pytest.raises(ValueError, match="model_state differs .* at \\[batch"):
        bank.put("b", small(2, {"batch_stats": jnp.ones(3)}, **rules))
    with pytest.raises(ValueError, match="task 'b': .*CP factors have sizes"):
        bank.put("b", Task({"conv": {"kernel": _misfit()}, "head": {"bias": None}}, {}))
    with pytest.raises(ValueError, match="found 1 tasks for 0 slots"):
        Bank.of({"a": small(1)}, shared=SHARED, capacity=0)
    with pytest.raises(ValueError, match="not of the bank's structure and shapes"):
        bank.trained(Bank.of({"a": small(1, **rules)}, shared=SHARED).stack)


def _misfit():
    return CP.init(jax.random.key(0), jnp.ones((3, 3, 4, 5)), rank=2)


def test_slots_are_no_node_types_of_task_files():
    assert not {"LowRankSlots", "ReplaceSlots"} & {*Node.types}
