"""Blocks to a stack of layers and back, for parameters and for what mirrors them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftn_jax import make_delta
from ftn_jax.models.vit_family import vit_tiny_cifar
from ftn_jax.models.vit_layers import stack_layers, unstack_layers
from ftn_jax.nodes import CP


def parameters(**options):
    model = vit_tiny_cifar(width=12, depth=3, image_px=8, **options)
    x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def check_round_trip(tree):
    back = unstack_layers(stack_layers(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_parameters():
    params = parameters()
    stacked = stack_layers(params)
    assert set(stacked) == {n for n in params if "blocks" not in n} | {"blocks"}
    kernel = stacked["blocks"]["attention"]["query"]["kernel"]
    for i in range(3):
        expected = params[f"blocks_{i}"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(kernel[i], expected)
    assert stacked["class_token"] is params["class_token"]
    check_round_trip(params)
    check_round_trip({"params": params, "other": jnp.ones(2)})


def test_ten_blocks_and_more_keep_their_order():
    tree = {f"blocks_{i}": jnp.array([i]) for i in (11, 3, 0, 1, 2, 10, *range(4, 10))}
    found = stack_layers(tree)["blocks"]
    np.testing.assert_array_equal(found, jnp.arange(12)[:, None])


def test_deltas_and_optimizer_states():
    """A merge of stacked nodes, layer by layer, is the stack of the merged layers."""
    params = parameters()
    rules = {r"blocks_\d+/attention/(query|value)/kernel": partial(CP.init, rank=2)}
    delta = make_delta(jax.random.key(0), params, rules)
    rng = np.random.default_rng(1)
    delta = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), delta)
    check_round_trip(delta)
    check_round_trip(optax.adam(1e-3).init(params))
    node = stack_layers(delta)["blocks"]["attention"]["query"]["kernel"]
    w = stack_layers(params)["blocks"]["attention"]["query"]["kernel"]
    merged = jax.vmap(lambda node, w: node.merge(w))(node, w)
    for i in range(3):
        one, w = (t[f"blocks_{i}"]["attention"]["query"] for t in (delta, params))
        expected = one["kernel"].merge(w["kernel"])
        np.testing.assert_allclose(merged[i], expected, rtol=1e-6, atol=1e-6)
        assert np.abs(merged[i] - w["kernel"]).max() > 0.1


def test_shapes_without_arrays():
    params = parameters()
    shapes = jax.eval_shape(stack_layers, params)
    expected = jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), params["blocks_0"])
    assert jax.tree.map(jnp.shape, shapes["blocks"]) == jax.tree.map(
        jnp.shape, expected
    )


BLOCK = {"w": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"head": jnp.ones(3)}, "found no blocks_0"),
        ({"blocks_0": BLOCK, "blocks_2": BLOCK}, r"without \['blocks_1'\]"),
        ({"blocks_0": BLOCK, "blocks": BLOCK}, "already a stack"),
        ({"blocks_0": BLOCK, "blocks_1": BLOCK | {"b": 1.0}}, "another structure"),
        ({"blocks_0": BLOCK, "blocks_1": {"w": None}}, "another structure"),
        (
            {"blocks_0": BLOCK, "blocks_1": {"w": np.ones((2, 4), np.float32)}},
            r"blocks_1\['w'\] is .*\(2, 4\).*, blocks_0\['w'\] is .*\(2, 3\)",
        ),
        ({"blocks_0": BLOCK, "blocks_1": {"w": np.ones((2, 3), int)}}, "int32"),
    ],
)
def test_blocks_that_cannot_be_stacked(tree, words):
    with pytest.raises(ValueError, match=words):
        stack_layers(tree)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"blocks_0": BLOCK}, "found no blocks"),
        ({"blocks": BLOCK | {"b": np.ones(3)}}, "one common leading axis"),
        ({"blocks": {"b": np.float32(1)}}, "one common leading axis"),
        ({"blocks": {}}, "one common leading axis"),
        ({"blocks": BLOCK, "blocks_0": BLOCK}, "found both"),
    ],
)
def test_stacks_that_cannot_be_taken_apart(tree, words):
    with pytest.raises(ValueError, match=words):
        unstack_layers(tree)
