"""SVFT: patterns, the layer built from its decomposition, starts, counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import count, make_delta
from ftn_jax.core import trainable
from ftn_jax.nodes.svft import SVFT, banded_places, svd_bases


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(x, w, strides, padding):
    found = jax.lax.conv_general_dilated(
        x,
        np.asarray(w),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return np.asarray(found)


merge = jax.jit(lambda node, w: node.merge(w))


def made(w, **options):
    """A node from its shapes alone, but with real places."""
    node = jax.eval_shape(partial(SVFT.init, **options), jax.random.key(0), w)
    if node.places is not None:
        node = SVFT.init(jax.random.key(0), w, **options)
    return randomized(node)


def complete(node, w, inputs=None):
    """Fill a node's bases by hand."""
    bases = svd_bases({"w": w}, "w", inputs=inputs)["w"]
    return node.replace(u=bases["u"], vt=bases["vt"]), np.asarray(bases["s"])


def middle(node):
    """The matrix M, gated, from the node's places."""
    m = np.zeros((node.k, node.k))
    places = node.places
    if places is None:
        places = banded_places(node.k, node.off_diagonals)
    for i, j, x in zip(*np.asarray(places), np.asarray(node.m), strict=True):
        m[i, j] += x
    return m if node.gate is None else m / (1 + np.exp(-float(node.gate)))


PATTERNS = {
    "plain": {},
    "gate": {"gate": True},
    "banded": {"off_diagonals": 2, "gate": True},
    "random": {"random": 7},
}


# The layer of the original: singular vectors, new middle, singular vectors ---------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("strides", "padding"), [((1, 1), "SAME"), ((2, 2), ((1, 2), (0, 1)))]
)
def test_convolution_through_the_singular_directions(pattern, strides, padding):
    w, x = weight("conv2d"), draw(2, 8, 7, 4)
    node, s = complete(made(w, **PATTERNS[pattern]), w)
    directions = conv(x, np.reshape(node.u, (3, 3, 4, 5)), strides, padding)
    expected = directions @ (np.diag(s) + middle(node)) @ np.asarray(node.vt)
    found = conv(x, merge(node, w), strides, padding)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * size, rtol=0)
    assert np.abs(found - conv(x, w, strides, padding)).max() > 1e-2 * size


def test_attention_kernels_of_one_input_axis():
    w, x = weight("attention"), draw(3, 6)
    node, s = complete(made(w, inputs=1), w, inputs=1)
    assert node.u.shape == (6, 6) and node.vt.shape == (6, 8)
    new = np.diag(s) + np.diag(np.asarray(node.m))
    expected = (x @ np.asarray(node.u) @ new @ np.asarray(node.vt)).reshape(3, 2, 4)
    found = np.einsum("zd,dhe->zhe", x, merge(node, w))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_plain_moves_singular_values_and_a_band_turns_directions():
    w = draw(6, 4)
    node, s = complete(made(w), w)
    values = np.linalg.svd(merge(node.replace(m=np.full(4, 10.0, np.float32)), w))[1]
    np.testing.assert_allclose(values, s + 10, rtol=1e-5)
    node, _ = complete(made(w, off_diagonals=1), w)
    above = np.eye(10, dtype=np.float32)[4]  # the first place above the diagonal
    expected = w + np.outer(np.asarray(node.u)[:, 0], np.asarray(node.vt)[1])
    found = merge(node.replace(m=above), w)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# Patterns -------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "b"), [(5, 0), (5, 1), (6, 3), (4, 3)])
def test_banded_places_are_the_diagonals(k, b):
    places = banded_places(k, b)
    found = np.zeros((k, k), int)
    np.add.at(found, tuple(places), 1)
    expected = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) <= b
    np.testing.assert_array_equal(found, expected)
    assert places.shape[1] == k * (2 * b + 1) - b * (b + 1)
    w = np.ones((k, k), np.float32)
    node = jax.eval_shape(partial(SVFT.init, off_diagonals=b), jax.random.key(0), w)
    assert node.m.shape == places.shape[1:]


def test_random_places_differ_and_are_frozen(key):
    w = jnp.ones((9, 6))
    node = SVFT.init(key, w, random=30)
    places = np.asarray(node.places)
    assert places.shape == (2, 30) and places.min() >= 0 and places.max() < 6
    assert len({*zip(*places.tolist(), strict=True)}) == 30  # the code's may repeat
    other = SVFT.init(jax.random.key(1), w, random=30)
    assert (np.asarray(other.places) != places).any()
    own = trainable({"w": node})
    assert [x.shape for x in jax.tree.leaves(own)] == [(30,)]
    assert count({"w": node}).total == 30
    every = SVFT.init(key, w, random=36)
    assert {*np.ravel_multi_index(np.asarray(every.places), (6, 6))} == {*range(36)}


# Starts and counts ----------------------------------------------------------------


def test_kaiming_start_is_the_codes_and_not_the_weight(key):
    w = jax.ShapeDtypeStruct((3072, 3072), jnp.float32)
    node = SVFT.init(key, w, init="kaiming", gate=True)
    m = np.asarray(node.m)
    np.testing.assert_allclose(m.std(), np.sqrt(2 / 3072), rtol=0.05)
    assert float(node.gate) == 0
    w = weight("dense")
    elsewhere, _ = complete(SVFT.init(key, w, init="kaiming"), w)
    assert np.abs(np.asarray(merge(elsewhere, w)) - np.asarray(w)).max() > 1e-2


def test_a_gate_starts_at_one_half_and_learns_after_the_first_step(key):
    w = weight("dense")
    gated, _ = complete(SVFT.init(key, w, gate=True), w)
    plain, _ = complete(SVFT.init(key, w), w)
    ones = np.ones(4, np.float32)
    half, whole = (
        np.asarray(merge(node.replace(m=ones), w)) - np.asarray(w)
        for node in (gated, plain)
    )
    np.testing.assert_allclose(2 * half, whole, atol=1e-6)
    assert np.abs(whole).max() > 0.1
    gradient = jax.jit(
        jax.grad(lambda x: ((gated.replace(m=x[0], gate=x[1]).merge(w) + 1) ** 2).sum())
    )
    m, gate = gradient((gated.m, gated.gate))
    assert np.abs(m).max() > 1e-2 and gate == 0
    assert abs(gradient((gated.m - 0.1 * m, gated.gate))[1]) > 1e-4


def test_count_of_vit_is_the_papers_without_gates(key):
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (768, 12, 64)),
        "out": (12, 64, 768),
        "fc1": (768, 3072),
        "fc2": (3072, 768),
    }
    block = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    vit = {f"blocks_{i}": block for i in range(12)}
    for gate, total in ((False, 55_296), (True, 55_368)):
        init = partial(SVFT.init, gate=gate)
        rules = {".*/(query|key|value)": partial(init, inputs=1), ".*": init}
        delta = jax.eval_shape(lambda k, s, r=rules: make_delta(k, s, r), key, vit)
        assert count(delta).total == total
    assert f"{55_296 / 1000:.1f}" == "55.3" != f"{55_368 / 1000:.1f}"  # printed: 55.3K


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"off_diagonals": 5},
            "off_diagonals must be 0 to 4 for 5 singular .* found 5",
        ),
        ({"off_diagonals": -1}, "off_diagonals must be 0 to 4"),
        ({"random": 0}, "random must be 1 to 25 coefficients for 5 .* found 0"),
        ({"random": 26}, "random must be 1 to 25"),
        ({"random": 2.5}, "random must be 1 to 25 .* found 2.5"),
        ({"off_diagonals": True}, "off_diagonals must be 0 to 4 .* found True"),
        ({"random": 3, "off_diagonals": 1}, "choose off_diagonals or random"),
        ({"init": "ones"}, "init must be zeros or kaiming, found 'ones'"),
        ({"inputs": 4}, "inputs must be 1 to 3"),
    ],
)
def test_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        SVFT.init(key, weight("conv2d"), **options)


def test_a_bias_is_refused(key):
    with pytest.raises(ValueError, match="needs a weight with inputs and outputs"):
        SVFT.init(key, weight("bias"))
