"""SVFT: bases, patterns, the layer built from its decomposition, counts, files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import (
    Task,
    compact,
    count,
    extend,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import trainable
from ftn_jax.extras import restore_extras, save_extras
from ftn_jax.manifest import TaskFileError
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


# Bases ----------------------------------------------------------------------------


def test_bases_are_the_weights_decomposition():
    shared = {
        "conv": {"kernel": weight("conv2d"), "bias": weight("bias")},
        "query": {"kernel": weight("attention")},
        "low": {"kernel": weight("dense", jnp.bfloat16)},
    }
    bases = svd_bases(shared, "(conv|low)/kernel")
    bases |= svd_bases(shared, "query/kernel", inputs=1)
    assert {p: b["s"].shape for p, b in bases.items()} == {
        "conv/kernel": (5,),
        "low/kernel": (4,),
        "query/kernel": (6,),
    }
    for path, b in bases.items():
        w = shared[path.split("/")[0]]["kernel"]
        u, s, vt = (np.asarray(b[n], np.float64) for n in ("u", "s", "vt"))
        assert b["u"].dtype == jnp.float32
        again = (u * s) @ vt
        np.testing.assert_allclose(again, np.reshape(w, again.shape), atol=2e-6)
        np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-6)
        np.testing.assert_allclose(vt @ vt.T, np.eye(len(s)), atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("kernel", r"'kernel' matches no leaf .* leaves \[conv/bias, conv/kernel\]"),
        (".*", "conv/bias: needs a weight with inputs and outputs, found the shape"),
    ],
)
def test_bases_refuse(pattern, message):
    shared = {"conv": {"kernel": weight("conv2d"), "bias": weight("bias")}}
    with pytest.raises(ValueError, match=message):
        svd_bases(shared, pattern)


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


# Beside the backbone, and in files ------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    return {"a": {"kernel": weight("conv2d")}, "b": {"kernel": weight("dense")}}


@pytest.fixture(scope="module")
def extended(shared):
    return extend(shared, svd=svd_bases(shared, ".*/kernel"))


@pytest.fixture(scope="module")
def delta(extended):
    rules = {"a/kernel": partial(SVFT.init, random=6), "b/kernel": SVFT.init}
    delta = make_delta(jax.random.key(0), extended, rules)
    return {k: {"kernel": randomized(d["kernel"])} for k, d in delta.items()}


def test_the_bases_are_not_the_tasks(extended, delta):
    assert delta["a"]["kernel"].u is None and delta["a"]["kernel"].vt is None
    assert count(delta).total == 6 + 4
    assert count(delta).bytes == 4 * (6 + 4) + 4 * 12
    params = materialize(extended, delta)
    for name in ("a", "b"):
        assert (
            np.abs(params[name]["kernel"] - extended.params[name]["kernel"]).max() > 1
        )


def test_bases_and_task_files(shared, extended, delta, tmp_path):
    save_extras(tmp_path / "bases", extended)
    save_task(tmp_path / "task", Task(delta, {}), shared=extended, name="svft")
    again = restore_extras(tmp_path / "bases", shared)
    found = restore_task(tmp_path / "task", again).task.delta
    same = jax.tree.map(np.array_equal, found, delta)
    assert all(jax.tree.leaves(same)) and compact(found)["b"]["kernel"] is not None
    expected = materialize(extended, delta)
    for name, kernel in materialize(again, found).items():
        np.testing.assert_array_equal(kernel["kernel"], expected[name]["kernel"])


def test_another_librarys_signs_are_refused(shared, extended, delta, tmp_path):
    """They decompose the same weight, and make another network of the same task."""
    bases = dict(extended.extras["svd"])
    b = bases["b/kernel"]
    sign = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    bases["b/kernel"] = b | {"u": b["u"] * sign[None], "vt": b["vt"] * sign[:, None]}
    turned = extend(shared, svd=bases)
    node = {
        "a": {"kernel": None},
        "b": {
            "kernel": SVFT.init(
                jax.random.key(0), shared["b"]["kernel"], off_diagonals=1
            )
        },
    }
    node = jax.tree.map(jnp.ones_like, node)
    one, other = (materialize(s, node)["b"]["kernel"] for s in (extended, turned))
    assert np.abs(one - other).max() > 0.1
    save_task(tmp_path, Task(delta, {}), shared=extended, name="svft")
    with pytest.raises(TaskFileError, match="b/kernel beside the backbone differs"):
        restore_task(tmp_path, turned)


def test_bases_that_are_missing_or_cut_otherwise_are_named(key, shared, delta):
    with pytest.raises(ValueError, match=r"a/kernel: a SVFT reads 'u' of 'svd' beside"):
        materialize(shared, delta)
    with pytest.raises(ValueError, match=r"lay svd_bases beside the backbone"):
        delta["b"]["kernel"].merge(shared["b"]["kernel"])
    shared = {"w": weight("attention")}
    delta = make_delta(key, shared, {"w": partial(SVFT.init, inputs=1)})
    bases = svd_bases(shared, "w")
    with pytest.raises(ValueError, match="w: SVFT was made for 6 .* bases of 4; give"):
        materialize(extend(shared, svd=bases), delta)
    wrong = svd_bases({"w": jnp.ones((6, 6))}, "w")
    with pytest.raises(ValueError, match=r"w: SVFT's arrays make a matrix \(6, 6\)"):
        materialize(extend(shared, svd=wrong), delta)


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
