"""Task files: exact round trips, a folder that is always whole."""

import hashlib
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saved import (
    DESCRIPTION,
    RULES,
    apply,
    assert_same,
    backbone,
    names,
    task,
    tensors_of,
)

from ftn_jax import (
    Task,
    make_delta,
    make_eval_step,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.atomic import write_atomic
from ftn_jax.checkpoint import TaskFileError
from ftn_jax.nodes import CP, Replace


def test_everything_comes_back_bit_for_bit(folder):
    saved, original = restore_task(folder, backbone()), task()
    assert_same(saved.task, original)
    for field, value in DESCRIPTION.items():
        assert getattr(saved, field) == value
    image = np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype(np.float32)
    logits = [
        make_eval_step(apply, metrics=None)(backbone(), t, {"image": image})
        for t in (original, saved.task, task(seed=1))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert logits[0].shape == (5, 3) and np.abs(logits[0] - logits[2]).max() > 1e-2


def test_a_frozen_task_and_defaults(tmp_path):
    empty = Task(make_delta(jax.random.key(0), backbone(), {}), {})
    save_task(tmp_path, empty, shared=backbone(), name="frozen")
    saved = restore_task(tmp_path, backbone())
    assert_same(saved.task, empty)
    assert (saved.class_names, saved.preprocessing, saved.metadata) == ((), [], {})
    assert_same(materialize(backbone(), saved.task.delta), backbone())


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float32", "int8", "int32", "uint8", "uint32", "bool"],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 1)])
def test_arrays_of_every_dtype_and_shape(tmp_path, dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 3
    x = jnp.asarray(values).astype(dtype)
    state = {"extra": {"x": x, "turned": x.T}}
    save_task(tmp_path, Task({"w": None}, state), shared={"w": jnp.ones(2)}, name="x")
    found = restore_task(tmp_path, {"w": jnp.ones(2)}).task.model_state
    assert_same(found, state)


def test_subnormals_and_negative_zero_are_kept(tmp_path):
    x = jnp.asarray([-0.0, 1e-45, np.finfo(np.float32).max], jnp.float32)
    save_task(tmp_path, Task({"w": Replace(x)}, {}), shared={"w": x}, name="x")
    found = restore_task(tmp_path, {"w": x}).task.delta["w"].value
    assert np.asarray(found).tobytes() == np.asarray(x).tobytes()


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_nnx_state_with_its_random_streams(tmp_path):
    _, shared, state = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    rules = {"conv/kernel": RULES["conv/kernel"], "bn/.*": Replace.init}
    original = Task(make_delta(jax.random.key(0), shared, rules), state)
    save_task(tmp_path, original, shared=shared, name="nnx")
    _, other, template = nnx.split(Block(nnx.Rngs(1)), nnx.Param, ...)
    found = restore_task(tmp_path, shared, model_state=template).task
    assert jax.tree.structure(found) == jax.tree.structure(original)
    chex.assert_trees_all_equal(found.delta, original.delta)
    bits = lambda t: [  # noqa: E731
        np.asarray(
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        for x in jax.tree.leaves(t)
    ]
    for a, b in zip(bits(found.model_state), bits(state), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(TaskFileError, match="another backbone.*conv/kernel"):
        restore_task(tmp_path, other, model_state=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"batch_stats": {"steps": 0}},
            r"has \['batch_stats/stem/bn/mean', 'cache/low'\]",
        ),
        ({**task().model_state, "more": 0}, r"has \[\] beyond, and lacks \['more'\]"),
    ],
)
def test_a_template_that_does_not_fit(folder, template, message):
    with pytest.raises(TaskFileError, match=message):
        restore_task(folder, backbone(), model_state=template)


def test_a_fresh_process_knows_the_librarys_nodes(tmp_path):
    """`import ftn_jax` alone must do: nobody imports the nodes to read a file."""
    w = jnp.ones((2, 3))
    delta = {"w": CP.init(jax.random.key(0), w, rank=1)}
    save_task(tmp_path, Task(delta, {}), shared={"w": w}, name="x")
    code = (
        "import jax, ftn_jax; shared = {'w': jax.numpy.ones((2, 3))}\n"
        f"print(ftn_jax.restore_task({str(tmp_path)!r}, shared).task.delta['w'].rank)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr


def test_only_a_manifest_and_safetensors_and_nothing_pickled(folder):
    digest = hashlib.sha256(tensors_of(folder).read_bytes()).hexdigest()
    assert names(folder) == ["manifest.json", f"task-{digest[:12]}.safetensors"]
    assert b"pickle" not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_overwriting_leaves_exactly_two_files(folder):
    for seed in (1, 2, 2):
        save_task(folder, task(seed), shared=backbone(), name=f"task {seed}")
        saved = restore_task(folder, backbone())
        assert_same(saved.task, task(seed))
        assert saved.name == f"task {seed}" and len(names(folder)) == 2


def test_files_of_others_are_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    save_task(folder, task(1), shared=backbone(), name="one")
    assert "notes.txt" in names(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "where", ["delta/conv/kernel/factors/1", "model_state/cache/low"]
)
def test_values_that_are_not_finite_are_refused_and_the_old_task_stays(
    folder, bad, where
):
    new = task(1)
    if where.startswith("delta"):
        node = new.delta["conv"]["kernel"]
        factors = (node.factors[0], node.factors[1].at[0, 0].set(bad), node.factors[2])
        new.delta["conv"]["kernel"] = CP(factors, axes=node.axes)
    else:
        new.model_state["cache"]["low"] = new.model_state["cache"]["low"].at[0].set(bad)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{where} has NaN or infinity"):
        save_task(folder, new, shared=backbone(), name="leaves")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    for bad in ({"f": object()}, {"nan": float("nan")}):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            save_task(tmp_path / "x", task(), shared=backbone(), name="x", metadata=bad)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("depth", ["file", "file/task"])
def test_a_file_in_the_way_leaves_nothing_behind(tmp_path, depth):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save_task(tmp_path / depth, task(), shared=backbone(), name="x")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("step", ["safetensors", "manifest.json"])
def test_a_crash_at_either_step_leaves_the_old_task(folder, monkeypatch, step):
    real = os.replace

    def crash(source, target):
        if str(target).endswith(step):
            raise OSError("no power")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no power"):
        save_task(folder, task(1), shared=backbone(), name="new")
    monkeypatch.undo()
    saved = restore_task(folder, backbone())
    assert_same(saved.task, task())
    assert saved.name == DESCRIPTION["name"]
    assert not [name for name in names(folder) if name.endswith(".partial")]
    save_task(folder, task(1), shared=backbone(), name="new")
    assert_same(restore_task(folder, backbone()).task, task(1))
    assert len(names(folder)) == 2


def test_write_atomic_replaces_or_keeps(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["x"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["x"]
