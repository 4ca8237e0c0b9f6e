"""Sums, multiples and lower ranks of deltas, against the updates multiplied out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import FORMULAS
from weights import randomized

from ftn_jax import make_delta
from ftn_jax.algebra import combine
from ftn_jax.lower_rank import recompress
from ftn_jax.node import is_node
from ftn_jax.nodes import CP, DoRA, LoRA, Replace

SHARED = {
    "conv": jnp.zeros((3, 3, 6, 8)),
    "dense": jnp.zeros((6, 7)),
    "lora": jnp.zeros((3, 3, 5, 4)),
    "torch": jnp.zeros((2, 2, 3, 4)),
    "norm": jnp.ones(5),
    "head": jnp.ones(4),
}
LOW_RANK = ["conv", "dense", "lora", "torch"]


def delta(seed, rank=2, head=3):
    rules = {
        "conv": partial(CP.init, rank=rank, scale=1.3 + seed),
        "dense": partial(CP.init, rank=rank, scale=0.5),
        "lora": partial(LoRA.init, rank=rank, alpha=3 + seed),
        "torch": partial(LoRA.init, rank=rank, form="reshape"),
        "norm": Replace.init,
        "head": partial(Replace.init, group="head", shape=(head,)),
    }
    shapes = jax.eval_shape(partial(make_delta, rules=rules), jax.random.key(0), SHARED)
    seeds = iter(range(10 * seed, 10 * seed + 9))
    return jax.tree.map(
        lambda node: randomized(node, next(seeds)), shapes, is_leaf=is_node
    )


def updates(delta):
    """What the low-rank nodes add, by the papers' formulas in float64."""

    def update(node, w):
        return FORMULAS[type(node).__name__](w, node) if node else np.zeros(w.shape)

    return {name: update(delta[name], SHARED[name]) for name in LOW_RANK}


def near(found, expected, tolerance=1e-6):
    return np.abs(found - expected).max() < tolerance * np.abs(expected).max()


CHOICES = {"norm": "mean", "head": "first"}


def add(first, second, replaced=CHOICES):
    both = {"first": first, "second": second}
    return combine(both, {"first": 1.0, "second": 1.0}, replaced=replaced)


def scale(delta, factor):
    return combine({"it": delta}, {"it": factor}, replaced="it")


def test_a_sum_is_the_sum_of_the_updates():
    a, b = delta(1), delta(2, rank=3)
    total = add(a, b)
    found, one, two = updates(total), updates(a), updates(b)
    for name in LOW_RANK:
        assert near(found[name], one[name] + two[name]), name
        assert not near(found[name], one[name], 0.1)
    assert total["conv"].rank == 5
    assert total["lora"].a.shape == (45, 5)


def test_factors_of_two_tasks_are_never_multiplied():
    """Adding the factor matrices would give (a1 + a2)(b1 + b2), cross terms and all."""
    a, b = delta(1), delta(2)
    lora = add(a, b)["lora"]
    mixed = LoRA(a["lora"].a + b["lora"].a, a["lora"].b + b["lora"].b)
    w = SHARED["lora"]
    expected = a["lora"].merge(w) + b["lora"].merge(w)
    assert near(np.asarray(lora.merge(w)), np.asarray(expected))
    assert not near(np.asarray(mixed.merge(w)), np.asarray(expected), 0.1)


def test_multiples():
    a = delta(1)
    for factor in (-2.0, 0.3, 0.0):
        found = updates(scale(a, factor))
        for name, update in updates(a).items():
            assert np.abs(found[name] - factor * update).max() < 1e-5
    halved = scale(a, 0.5)
    np.testing.assert_array_equal(updates(halved)["conv"], updates(a)["conv"] / 2)
    assert halved["norm"] is a["norm"] and halved["conv"].rank == 2
    nothing = updates(add(a, scale(a, -1)))
    assert all(np.abs(x).max() < 1e-5 for x in nothing.values())


def test_weighted_combinations():
    deltas = {"x": delta(1), "y": delta(2, rank=1), "z": delta(3), "none": delta(4)}
    weights = {"x": 0.25, "y": -1.5, "z": 2.0, "none": 0.0}
    replaced = {"norm": "mean", "head": "z"}
    found = combine(deltas, weights, replaced=replaced)
    each = {name: updates(d) for name, d in deltas.items()}
    for name in LOW_RANK:
        expected = sum(weights[n] * each[n][name] for n in deltas)
        assert near(updates(found)[name], expected), name
    assert found["conv"].rank == 2 + 1 + 2  # nothing of weight 0
    mean = sum(weights[n] * deltas[n]["norm"].value for n in deltas) / 0.75
    np.testing.assert_allclose(found["norm"].value, mean, rtol=1e-5)
    assert found["head"] is deltas["z"]["head"]
    halves = {name: {"norm": Replace(jnp.ones(3, jnp.bfloat16))} for name in "xy"}
    even = dict.fromkeys(halves, np.float64(0.5))  # not weakly typed
    kept = combine(halves, even, replaced="mean")["norm"].value
    np.testing.assert_array_equal(kept, halves["x"]["norm"].value, strict=True)
    only = combine(
        deltas, dict.fromkeys(deltas, 0.0), replaced={"norm": "x", "head": "x"}
    )
    assert all((x == 0).all() for x in updates(only).values())


def test_a_task_without_a_node_adds_nothing():
    a, b = delta(1), delta(2)
    b["conv"] = None
    total = add(a, b)
    np.testing.assert_array_equal(updates(total)["conv"], updates(a)["conv"])
    a["conv"] = None
    assert add(a, b)["conv"] is None


def test_what_cannot_be_added_is_refused_by_path():
    a, b = delta(1), delta(2, head=4)
    with pytest.raises(
        ValueError, match=r"head: Replace .* \['head'\] cannot be added"
    ):
        add(a, b, replaced={"norm": "mean"})
    with pytest.raises(ValueError, match="head: a mean needs a Replace of one shape"):
        add(a, b, replaced={"norm": "mean", "head": "mean"})
    with pytest.raises(ValueError, match="'third'.*expected 'mean' or one of"):
        add(a, b, replaced={"norm": "third"})
    with pytest.raises(ValueError, match="one number for each"):
        combine({"a": a}, {"b": 1.0})
    with pytest.raises(ValueError, match="weights must be finite"):
        combine({"a": a}, {"a": float("nan")})
    with pytest.raises(ValueError, match="do not add up to 0"):
        combine(
            {"a": a, "b": b}, {"a": 1, "b": -1}, replaced={"norm": "mean", "head": "a"}
        )
    with pytest.raises(ValueError, match=r"head: .*replaced=\{group: 'mean'"):
        combine({"a": a}, {"a": 2.0})
    with pytest.raises(ValueError, match="different paths"):
        add(a, {"conv": b["conv"]})
    other = {
        "conv": CP.init(
            jax.random.key(0), SHARED["conv"], rank=1, axes=((0, 1, 2), (3,))
        )
    }
    with pytest.raises(ValueError, match="conv: the factors span the axes"):
        add({"conv": a["conv"]}, other)
    mixed = {"conv": LoRA.init(jax.random.key(0), SHARED["conv"], rank=1)}
    with pytest.raises(
        ValueError, match=r"conv: updates of the types \['CP', 'LoRA'\]"
    ):
        add({"conv": a["conv"]}, mixed)
    dora = {"conv": DoRA.init(jax.random.key(0), SHARED["conv"], rank=1)}
    with pytest.raises(ValueError, match="conv: a DoRA is no sum"):
        scale(dora, 2.0)
    with pytest.raises(ValueError, match="conv: a DoRA is no sum"):
        recompress(dora, 1)
    with pytest.raises(ValueError, match="rank must be an integer >= 1"):
        recompress(a, 0)
    lost = jax.tree.map(lambda x: x * jnp.nan, {"conv": a["conv"]})
    with pytest.raises(ValueError, match="conv: the factors hold NaN"):
        recompress(lost, 1)


def test_two_factors_are_recompressed_as_well_as_can_be():
    total = add(delta(1, rank=3), delta(2, rank=3))
    found = recompress(total, 4)
    matrices = {"dense": (6, 7), "lora": (45, 4)}
    for name, shape in matrices.items():
        full = updates(total)[name].reshape(shape)
        s = np.linalg.svd(full, compute_uv=False)
        best = np.sqrt((s[4:] ** 2).sum() / (s**2).sum())
        gap = np.linalg.norm(updates(found.delta)[name].reshape(shape) - full)
        assert abs(found.errors[name] - best) < 1e-6
        assert abs(gap / np.linalg.norm(full) - best) < 1e-6
        assert best > 0.01 or name == "lora"  # its matrix has rank 4
    assert found.delta["torch"].a.shape == (4, 6)
    assert found.delta["norm"] is total["norm"]
    assert "norm" not in found.errors and {*found.errors} == {*LOW_RANK}


def test_three_factors_are_recompressed_by_least_squares():
    total = add(delta(1, rank=3), delta(2, rank=3))
    full = updates(total)["conv"]
    errors = []
    for rank in (1, 3, 5):
        found = recompress(total, rank)
        gap = np.linalg.norm(updates(found.delta)["conv"] - full) / np.linalg.norm(full)
        assert abs(found.errors["conv"] - gap) < 1e-5  # the error is the real one
        assert found.delta["conv"].rank == rank
        errors.append(gap)
        node = total["conv"]
        size = np.prod([np.linalg.norm(f, axis=0) for f in node.factors], axis=0)
        keep = np.argsort(-size)[:rank]
        cut = node.replace(factors=tuple(f[:, keep] for f in node.factors))
        truncated = np.asarray(cut.merge(SHARED["conv"])) - full
        assert gap < 0.95 * np.linalg.norm(truncated) / np.linalg.norm(full)
    assert errors[0] > errors[1] > errors[2] > 0.01
    again = recompress(total, 3).delta["conv"]
    for x, y in zip(
        again.factors, recompress(total, 3).delta["conv"].factors, strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_what_is_there_twice_comes_back_once():
    a = delta(1, rank=2)
    twice = combine(
        {"p": a, "q": a}, {"p": 1, "q": 1}, replaced={"norm": "p", "head": "p"}
    )
    twice["torch"] = None  # its inner axis is not its rank
    found = recompress(twice, 2)
    assert max(found.errors.values()) < 1e-5
    for name in ("conv", "dense", "lora"):
        assert near(updates(found.delta)[name], 2 * updates(a)[name], 1e-4), name
    small = recompress({**a, "torch": None}, 2)
    assert small.delta["conv"] is a["conv"] and {*small.errors.values()} == {0.0}


def test_one_factor_is_summed_up():
    node = randomized(CP.init(jax.random.key(0), jnp.zeros(6), rank=4))
    found = recompress({"bias": node}, 2)
    assert found.delta["bias"].rank == 1 and found.errors["bias"] < 1e-6
    expected = node.merge(jnp.zeros(6))
    np.testing.assert_allclose(
        found.delta["bias"].merge(jnp.zeros(6)), expected, rtol=1e-5
    )
