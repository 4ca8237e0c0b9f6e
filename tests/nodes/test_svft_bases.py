"""SVFT's bases: the weight's decomposition, beside the backbone and in files."""

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
from ftn_jax.extras import restore_extras, save_extras
from ftn_jax.manifest import TaskFileError
from ftn_jax.nodes.svft import SVFT, svd_bases


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
