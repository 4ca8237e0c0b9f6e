"""The start of a packed state: which weights the base gives up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.nodes.packing import prune, start_packing
from ftn_jax.nodes.packnet import PackNet

KERNELS = ".*/kernel"


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def backbone():
    return {
        "a": {"kernel": draw((3, 3, 4, 5)), "bias": draw((5,), 1)},
        "b": {"kernel": draw((5, 8), 2)},
    }


def mine(node):
    return np.unpackbits(np.asarray(node.mine)).tolist()


def test_the_base_gives_up_the_smallest_half_of_each_layer():
    shared = backbone()
    state = start_packing(shared, KERNELS, prune=0.5)
    assert set(state) == {"a/kernel", "b/kernel"}
    for path, x in state.items():
        w = np.asarray(shared[path[0]]["kernel"])
        kept = np.abs(w) > np.median(np.abs(w))
        np.testing.assert_array_equal(x["owner"], kept)
        np.testing.assert_array_equal(x["values"], np.where(kept, w, 0))
        assert x["owner"].dtype == jnp.uint8 and x["values"].dtype == w.dtype
    one, two = (start_packing(shared, KERNELS, prune=p) for p in (0, 0.25))
    assert one["b/kernel"]["owner"].sum() == 40 and two["b/kernel"]["owner"].sum() == 30


def test_the_state_has_buffers_of_its_own():
    shared = backbone()
    state = start_packing(shared, KERNELS, prune=None)
    np.testing.assert_array_equal(state["b/kernel"]["values"], shared["b"]["kernel"])
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert not shared["b"]["kernel"].is_deleted()


def test_prune_frees_exactly_its_share_even_among_equals():
    """kthvalue, in the released code, frees all equals of the k-th as well."""
    w = {"w": jnp.array([1.0, -1, 1, 1, 2, -1, 1, 3])}
    state = start_packing(w, "w", prune=0.5)
    assert state["w"]["owner"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    node = PackNet.init(
        jax.random.key(0), w["w"], extra={"packnet": state["w"]}, task=2
    )
    delta = {"w": node.replace(value=jnp.full(8, -5.0))}
    assert mine(prune(delta, 0.5)["w"]) == [0, 0, 1, 1, 0, 0, 0, 0]
    assert mine(prune(delta, 0)["w"]) == mine(node) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match=r"'kernel' matches no leaf .* a/kernel"):
        start_packing(backbone(), "kernel", prune=0.5)
