"""How a delta is built, labelled and counted."""

import os
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from trees import RULES, Shift, backbone, far, random_cp

from ftn_jax import count, groups, make_delta, materialize
from ftn_jax.core import iter_nodes
from ftn_jax.nodes import CP, Replace


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


def test_two_leaves_of_one_path_are_refused(key):
    shared = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"two leaves of one path: \['a/b'\]"):
        make_delta(key, shared, {"a/b": Replace.init})


def test_groups_refuse_what_is_no_node():
    with pytest.raises(TypeError, match="w: a delta holds nodes and None"):
        groups({"w": jnp.ones(2)})
