"""Stacks of layers: the nodes of the single ones, their labels, files, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import (
    Task,
    count,
    extend,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import perturb
from ftn_jax.manifest import TaskFileError
from ftn_jax.models import stack_layers, unstack_layers
from ftn_jax.nodes import CP, SVFT, Kronecker, Piggyback, Replace, Stacked
from ftn_jax.nodes.adapter_svd import SharedBasisAdapter
from ftn_jax.nodes.scale import scale_rules
from ftn_jax.nodes.stacked_rules import (
    layer_leaves,
    layer_place,
    stack_entries,
    stacked_rules,
)
from ftn_jax.nodes.svft import svd_bases

LAYERS = 3


@pytest.fixture(scope="module")
def plain():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {
        f"blocks_{i}": {
            "query": {"kernel": draw(4, 2, 4), "bias": draw(2, 4)},
            "value": {"kernel": draw(4, 2, 4), "bias": draw(2, 4)},
        }
        for i in range(LAYERS)
    }
    return {"body": blocks, "head": {"kernel": draw(4, 2)}}


def rules_of(name, leaves):
    label = {"share": "qv"}
    inits = {
        "CP": partial(CP.init, rank=2, init="normal"),
        "Kronecker": partial(Kronecker.init, n=2, inputs=1, init="glorot", **label),
        "Piggyback": Piggyback.init,
        "SVFT": partial(SVFT.init, inputs=1, init="kaiming"),
        "Replace": Replace.init,
    }
    head = {"head/kernel": partial(Replace.init, group="head", shape=(..., 5))}
    if name == "Scale":
        pattern = r"body/blocks_\d+/(query|value)"
        return {**scale_rules(leaves, pattern, inputs=1, init="normal"), **head}
    return {r"body/blocks_\d+/(query|value)/kernel": inits[name], **head}


def both(name, plain):
    """The delta of separate layers and of stacked ones, with their backbones."""
    stacked = stack_layers(plain)
    rules = rules_of(name, layer_leaves(plain))
    if name == "SVFT":
        pattern = r"body/blocks_\d+/\w+/kernel"
        bases = svd_bases(layer_leaves(plain), pattern, inputs=1)
        extended = extend(plain, svd=stack_entries(plain, bases))
        over = extend(stacked, svd=stack_entries(stacked, bases))
    else:
        extended, over = plain, stacked
    key = jax.random.key(7)
    return (
        (extended, make_delta(key, extended, rules)),
        (over, make_delta(key, over, stacked_rules(stacked, rules))),
    )


NAMES = ["CP", "Kronecker", "Piggyback", "SVFT", "Replace", "Scale"]


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_start_merge_and_are_saved_as_single_ones(name, plain, tmp_path):
    (shared, single), (over, stacked) = both(name, plain)
    assert count(stacked).total == count(single).total
    assert count(stacked).by_group == count(single).by_group
    expected = materialize(shared, single)
    found = unstack_layers(materialize(over, stacked))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)
    if name not in ("Piggyback", "Replace"):  # those start at the weight
        before = plain["body"]["blocks_2"]["query"]["kernel"]
        moved = expected["body"]["blocks_2"]["query"]["kernel"]
        assert np.abs(moved - before).max() > 1e-4

    save_task(tmp_path / "stack", Task(stacked, {}), shared=over, name="x")
    save_task(tmp_path / "single", Task(single, {}), shared=shared, name="x")
    bytes_of = [
        next((tmp_path / kind).glob("*.safetensors")).read_bytes()
        for kind in ("stack", "single")
    ]
    assert bytes_of[0] == bytes_of[1]
    for kind in ("stack", "single"):
        for backbone, delta in ((over, stacked), (shared, single)):
            back = restore_task(tmp_path / kind, backbone).task.delta
            assert jax.tree.structure(back) == jax.tree.structure(delta)
            jax.tree.map(np.testing.assert_array_equal, back, delta)


def test_what_layers_have_in_common_lies_once(plain):
    _, (_, stacked) = both("Kronecker", plain)
    query = stacked["body"]["blocks"]["query"]["kernel"]
    value = stacked["body"]["blocks"]["value"]["kernel"]
    assert [x.shape for x in query.slow] == [(2, 2), (2, 2)] and value.slow is None
    assert query.u.shape == (LAYERS, 2, 2, 1) and query.group == "factors"
    nodes = query.nodes()
    assert [n.slow is None for n in nodes] == [False, True, True]
    again = Stacked.of(nodes, place=query.place)
    jax.tree.map(np.testing.assert_array_equal, again, query)


def test_labels_of_layers_become_one_pattern(plain):
    _, (_, stacked) = both("Scale", plain)
    bias = stacked["body"]["blocks"]["query"]["bias"]
    assert bias.share == "body/blocks_{}/query" and bias.gamma.shape == (LAYERS, 2, 4)
    assert stacked["body"]["blocks"]["query"]["kernel"].gamma is None
    labels = [n.share for n in bias.nodes()]
    assert labels == [f"body/blocks_{i}/query" for i in range(LAYERS)]
    odd = [n.replace(share=s) for n, s in zip(bias.nodes(), "abc", strict=True)]
    with pytest.raises(ValueError, match=r"share labels.*found \['a', 'b', 'c'\]"):
        Stacked.of(odd, place=bias.place)


def test_dropout_differs_from_layer_to_layer():
    w = jnp.zeros((LAYERS, 8, 8))
    make = partial(Kronecker.init, n=2, init="glorot", dropout=0.5, share="k")
    rules = {r"blocks_\d/k": make}
    shared = {"blocks": {"k": w}}
    delta = make_delta(jax.random.key(0), shared, stacked_rules(shared, rules))
    dropped = materialize(shared, perturb(delta, jax.random.key(1)))["blocks"]["k"]
    zeros = np.asarray(dropped) == 0
    assert (0.2 < zeros.mean(axis=(1, 2))).all() and (zeros[0] != zeros[1]).any()
    assert (np.asarray(materialize(shared, delta)["blocks"]["k"]) != 0).all()


def test_masks_are_compact_layer_by_layer(plain):
    _, (over, stacked) = both("Piggyback", plain)
    node = stacked["body"]["blocks"]["query"]["kernel"]
    node = node.replace(mask=node.mask.at[:, 0].set(0.0))
    small = node.compact()
    assert isinstance(small, Stacked)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(n)) for n in (small, node)]
    assert sizes[0] < sizes[1] / 4
    w = over["body"]["blocks"]["query"]["kernel"]
    np.testing.assert_array_equal(small.merge(w), node.merge(w))


def test_a_head_alone_is_saved_for_both_forms(plain, tmp_path):
    head = {"head/kernel": partial(Replace.init, group="head", shape=(..., 5))}
    stacked = stack_layers(plain)
    delta = make_delta(jax.random.key(0), stacked, stacked_rules(stacked, head))
    save_task(tmp_path, Task(delta, {}), shared=stacked, name="x")
    back = restore_task(tmp_path, plain).task.delta
    np.testing.assert_array_equal(
        back["head"]["kernel"].value, delta["head"]["kernel"].value
    )
    other = jax.tree.map(lambda x: x, stacked)
    kernel = other["body"]["blocks"]["value"]["kernel"]
    other["body"]["blocks"]["value"]["kernel"] = kernel.at[1, 0].add(1.0)
    with pytest.raises(TaskFileError, match="differs is body/blocks_1/value/kernel"):
        restore_task(tmp_path, other)


def test_a_task_of_some_layers_opens_only_on_separate_ones(plain, tmp_path):
    rules = {r"body/blocks_[02]/query/kernel": partial(CP.init, rank=1)}
    delta = make_delta(jax.random.key(0), plain, rules)
    save_task(tmp_path, Task(delta, {}), shared=plain, name="x")
    restore_task(tmp_path, plain)
    with pytest.raises(TaskFileError, match="2 nodes for the 3 layers of body/blocks/"):
        restore_task(tmp_path, stack_layers(plain))
    with pytest.raises(ValueError, match="found none for .*blocks_1/query"):
        stacked_rules(stack_layers(plain), rules)


def test_layers_that_differ_cannot_be_stacked(plain, tmp_path):
    rules = {
        r"body/blocks_0/query/kernel": partial(CP.init, rank=1),
        r"body/blocks_\d/query/kernel": partial(CP.init, rank=2),
    }
    stacked = stack_layers(plain)
    with pytest.raises(ValueError, match="query/kernel: layer 1 has the node"):
        make_delta(jax.random.key(0), stacked, stacked_rules(stacked, rules))
    delta = make_delta(jax.random.key(0), plain, rules)
    save_task(tmp_path, Task(delta, {}), shared=plain, name="x")
    with pytest.raises(TaskFileError, match="one type, configuration and rank"):
        restore_task(tmp_path, stacked)


def test_bad_stacks_are_refused(key):
    w = jnp.ones((LAYERS, 4, 4))
    make = partial(CP.init, rank=1)
    start = partial(Stacked.init, place="blocks_{}/w", keys=lambda path: key)
    with pytest.raises(ValueError, match="2 inits for layers of the shape"):
        start(key, w, inits=[make] * 2)
    with pytest.raises(ValueError, match="what lies beside.*cannot be stacked"):
        start(key, w, inits=[SharedBasisAdapter.init] * LAYERS)
    node = start(key, w, inits=[make] * LAYERS)
    with pytest.raises(ValueError, match=r"nodes of 3 layers for .*\(2, 4, 4\)"):
        node.merge(w[:2])
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = node.colour


def test_rules_that_fit_nothing_are_still_told_of(plain):
    stacked = stack_layers(plain)
    rules = {"body/nowhere": Replace.init, ".*/bias": Replace.init}
    with pytest.raises(ValueError, match="match no leaf.*nowhere"):
        make_delta(jax.random.key(0), stacked, stacked_rules(stacked, rules))
    assert stacked_rules(plain, rules) == rules
    fitted = stacked_rules(stacked, {".*/bias": None, ".*": Replace.init})
    delta = make_delta(jax.random.key(0), stacked, fitted)
    assert delta["body"]["blocks"]["query"]["bias"] is None
    assert isinstance(delta["body"]["blocks"]["query"]["kernel"], Stacked)
    assert isinstance(delta["head"]["kernel"], Replace)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("blocks/fc/kernel", "blocks_{}/fc/kernel"),
        ("body/blocks/w", "body/blocks_{}/w"),
        ("blocks_0/w", None),
        ("my_blocks/w", None),
        ("blocks", None),
    ],
)
def test_paths_of_stacks(path, place):
    assert layer_place(path) == place
