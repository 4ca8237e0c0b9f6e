"""Latent Tucker: kernels read off a stack that factors multiply, and the penalty."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import (
    Task,
    count,
    extend,
    groups,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import complete
from ftn_jax.nodes import Replace
from ftn_jax.nodes.tucker import Tucker, orthogonality
from ftn_jax.nodes.tucker_core import tucker_cores, tucker_groups, tucker_rules

from .convolution import ONES, conv, draw, gap
from .stages import PATTERN, network, perturbed


@pytest.fixture(scope="module")
def shared():
    return network()


@pytest.fixture(scope="module")
def prepared(shared):
    found = tucker_groups(shared, PATTERN)
    cores = tucker_cores(shared, found)
    return extend(shared, tucker=cores), found, cores


# Stacks and factors ---------------------------------------------------------------


def test_starts_at_the_pretrained_network_bit_for_bit(prepared, shared, key):
    extended, found, cores = prepared
    delta = make_delta(key, extended, tucker_rules(found, cores))
    chex.assert_trees_all_equal(materialize(extended, delta), shared)
    assert delta["layer1_0"]["bn1"]["scale"] is None


def test_a_label_has_its_factors_once(prepared, key):
    extended, found, cores = prepared
    delta = make_delta(key, extended, tucker_rules(found, cores))
    sizes = [(3, 2, 3, 3, 4, 4), (2, 2, 3, 3, 8, 8)]
    assert count(delta).total == sum(n * n for size in sizes for n in size)
    held = [n for n in jax.tree.leaves(delta, is_leaf=lambda x: isinstance(x, Tucker))]
    assert sum(n.factors is not None for n in held) == 2 and len(held) == 10
    assert {*jax.tree.leaves(groups(delta))} == {"factors"}


def test_every_kernel_is_read_off_the_multiplied_stack(prepared, key):
    extended, found, cores = prepared
    delta = perturbed(make_delta(key, extended, tucker_rules(found, cores)))
    params = materialize(extended, delta)
    nodes = {path: node for path, _, node in complete(extended, delta) if node}
    for label, grid in found.items():
        whole = np.asarray(cores[label]["core"], np.float64)
        for axis, f in enumerate(nodes[grid[0][0]].factors):
            f = np.asarray(f, np.float64)
            whole = np.moveaxis(np.tensordot(f, whole, (1, axis)), 0, axis)
        for b, block in enumerate(grid):
            for c, path in enumerate(block):
                name, conv_name, _ = path.split("/")
                merged = params[name][conv_name]["kernel"]
                assert gap(merged, whole[b, c]) < 1e-5
                assert gap(extended.params[name][conv_name]["kernel"], merged) > 1e-2


def test_the_factor_of_blocks_mixes_them(key):
    w, other = jnp.ones((3, 4)), 2 * jnp.ones((3, 4))
    stack = {"core": jnp.stack([w, other])[:, None]}
    node = Tucker.init(key, w, share="s", index=(0, 0), stack=stack)
    factors = (jnp.asarray([[1.0, 10.0], [0.0, 1.0]]), *node.factors[1:])
    merged = node.replace(core=stack["core"], factors=factors).merge(w)
    np.testing.assert_array_equal(merged, 21 * w)


def test_parity_with_tensorly(prepared, key):
    tucker_tensor = pytest.importorskip("tensorly.tucker_tensor")
    extended, found, cores = prepared
    delta = perturbed(make_delta(key, extended, tucker_rules(found, cores)))
    nodes = {path: node for path, _, node in complete(extended, delta) if node}
    node = nodes["layer2_1/conv2/kernel"]
    arrays = np.asarray(node.core), [np.asarray(f) for f in node.factors]
    whole = tucker_tensor.tucker_to_tensor(arrays)
    w = extended.params["layer2_1"]["conv2"]["kernel"]
    assert gap(node.merge(w), whole[1, 1]) < 1e-5
    assert gap(w, whole[1, 1]) > 1e-2


@pytest.mark.parametrize("stride", [1, 2])
def test_channel_factors_are_1x1_convolutions_around(stride, key):
    """F on C_in before the kernel and F on C_out after it: two series adapters."""
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 7, 4, seed=1)
    stack = {"core": w[None, None]}
    node = Tucker.init(key, w, share="s", index=(0, 0), stack=stack)
    before, after = jnp.asarray(draw(4, 4)), jnp.asarray(draw(8, 8, seed=2))
    factors = (*node.factors[:4], before, after)
    node = node.replace(core=stack["core"], factors=factors)
    options = {"padding": ONES, "stride": stride}
    mixed = conv(x, before[None, None])
    expected = conv(conv(mixed, w, **options), after.T[None, None])
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(conv(x, w, **options), expected) > 1e-1


def test_tap_factors_move_taps(key):
    w = weight("conv2d")
    stack = {"core": w[None, None]}
    node = Tucker.init(key, w, share="s", index=(0, 0), stack=stack)
    flip = jnp.eye(3)[::-1]
    factors = list(node.factors)
    factors[2] = flip
    merged = node.replace(core=stack["core"], factors=tuple(factors)).merge(w)
    np.testing.assert_array_equal(merged, w[::-1])


def test_a_low_precision_backbone_starts_exactly(key):
    shared = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), network({"layer1_0": (3, 3, 4, 4)})
    )
    found = tucker_groups(shared, PATTERN)
    cores = tucker_cores(shared, found)
    assert cores["layer1"]["core"].dtype == jnp.float32
    extended = extend(shared, tucker=cores)
    delta = make_delta(key, extended, tucker_rules(found, cores))
    assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(materialize(extended, delta), shared)


# The penalty ----------------------------------------------------------------------


def test_orthogonality(prepared, key):
    extended, found, cores = prepared
    delta = make_delta(key, extended, tucker_rules(found, cores))
    assert float(orthogonality(delta)) == 0
    delta = perturbed(delta)
    expected = sum(
        ((f.T @ f - np.eye(len(f))) ** 2).sum()
        for f in map(np.float64, jax.tree.leaves(delta))
    )
    np.testing.assert_allclose(orthogonality(delta, weight=0.1), 0.1 * expected, 1e-5)
    step = jax.jit(
        lambda d: jax.tree.map(lambda x, g: x - 0.01 * g, d, jax.grad(orthogonality)(d))
    )
    before = float(orthogonality(delta))
    for _ in range(100):
        delta = step(delta)
    assert float(orthogonality(delta)) < 1e-2 * before
    with pytest.raises(ValueError, match="no Tucker node.*leave the penalty out"):
        orthogonality({"a": Replace(jnp.ones(2))})


# Files and refusals ---------------------------------------------------------------


def test_saved_with_the_core_and_refused_with_another(prepared, key, tmp_path):
    extended, found, cores = prepared
    delta = perturbed(make_delta(key, extended, tucker_rules(found, cores)))
    save_task(tmp_path, Task(delta, {}), shared=extended, name="one")
    again = restore_task(tmp_path, extended).task.delta
    chex.assert_trees_all_equal(again, delta)
    chex.assert_trees_all_equal_structs(again, delta)
    other = jax.tree.map(lambda x: x + 1, cores)
    with pytest.raises(ValueError, match="beside the backbone differs"):
        restore_task(tmp_path, extend(extended.params, tucker=other))


def test_nodes_refuse(key):
    w = weight("conv2d")
    stack = {"core": jnp.stack([jnp.stack([w, w])])}

    def start(w, index=(0, 1)):
        return Tucker.init(key, w, share="g", index=index, stack=stack)

    with pytest.raises(ValueError, match=r"found the shape \(5,\).*Replace"):
        start(jnp.ones(5))
    for bad in ((1, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=re.escape(f"no kernel {bad}")):
            start(w, bad)
    with pytest.raises(ValueError, match=r"weight of shape \(3, 3, 4, 6\)"):
        start(jnp.ones((3, 3, 4, 6)))
    with pytest.raises(ValueError, match="not filled in|neither is filled in"):
        start(w).merge(w)
    whole = randomized(start(w)).replace(core=stack["core"][:, :1])
    with pytest.raises(ValueError, match=r"core of shape \(1, 1, .*sizes \(1, 2,"):
        whole.merge(w)
