"""Task files: exact round trips, and every way a file can be wrong."""

import hashlib
import json
import os
import subprocess
import sys
import time
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load, save

from ftn_jax import (
    Task,
    make_delta,
    make_eval_step,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.atomic import write_atomic
from ftn_jax.checkpoint import TaskFileError, fingerprint
from ftn_jax.nodes import CP, Replace

RULES = {
    "conv/kernel": partial(CP.init, rank=2, init="normal", scale=0.1 + 0.2),
    "scalar|conv/bias": Replace.init,
    "head/kernel": partial(Replace.init, group="head", shape=(..., 3)),
}
DESCRIPTION = {
    "name": "leaves é",
    "class_names": ("ash", "beech", "oak"),
    "preprocessing": [{"name": "resize", "size": [8, 8], "antialias": True}],
    "metadata": {"accuracy": 0.1 + 0.2, "nested": {"seeds": [1, 2]}, "none": None},
}


def backbone():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return {
        "conv": {"kernel": draw(3, 3, 3, 4), "bias": draw(4)},
        "head": {"kernel": draw(4, 10)},
        "scalar": draw(),
    }


def task(seed=0):
    rng = np.random.default_rng(seed)
    state = {
        "batch_stats": {
            "stem": {"bn": {"mean": jnp.asarray(rng.normal(size=4), jnp.float32)}},
            "steps": jnp.asarray(seed + 7, jnp.int32),
        },
        "cache": {"low": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)},
    }
    return Task(make_delta(jax.random.key(seed), backbone(), RULES), state)


def apply(params, model_state, batch, *, train, key=None):
    x = jax.lax.conv_general_dilated(
        batch["image"],
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean = model_state["batch_stats"]["stem"]["bn"]["mean"]
    x = jnp.tanh(x.mean((1, 2)) + (params["conv"]["bias"] - mean)[None])
    return x @ params["head"]["kernel"] * params["scalar"], model_state


@pytest.fixture
def folder(tmp_path):
    """A saved task, to be damaged."""
    return save_task(tmp_path / "task", task(), shared=backbone(), **DESCRIPTION)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder, change):
    manifest = manifest_of(folder)
    manifest = change(manifest) or manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))


def tensors_of(folder):
    return folder / manifest_of(folder)["tensors"]["file"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


# Round trips ----------------------------------------------------------------------


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


# The folder -----------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=f"leaves: {where} has NaN or infinity"):
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


# Another backbone -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "why"),
    [
        ("conv/kernel", lambda w: w.at[2, 1, 0, 3].add(1e-6), "values, shape or dtype"),
        ("conv/kernel", lambda w: w.reshape(3, 3, 4, 3), "values, shape or dtype"),
        ("conv/kernel", lambda w: w.astype(jnp.bfloat16), "values, shape or dtype"),
        ("head/kernel", lambda w: None, "this backbone has no such leaf"),
        ("head/more", lambda _: jnp.ones(2), "the task's backbone has no such leaf"),
    ],
)
def test_another_backbone_is_refused_by_its_first_leaf(folder, path, change, why):
    shared = backbone()
    room, leaf = path.split("/")
    shared[room][leaf] = change(shared[room].get(leaf))
    with pytest.raises(
        TaskFileError, match=f"first leaf that differs is {path}: .*{why}"
    ):
        restore_task(folder, shared)


def test_leaves_that_the_task_replaces_may_differ(folder):
    shared = backbone()
    shared["conv"]["bias"] += 1
    shared["head"]["kernel"] = jnp.ones((4, 7))  # the backbone with another head
    assert_same(
        restore_task(folder, shared).task, restore_task(folder, backbone()).task
    )


def test_of_several_differences_the_first_is_named(folder):
    shared = jax.tree.map(lambda w: w + 1, backbone())
    with pytest.raises(TaskFileError, match="differs is conv/kernel:"):
        restore_task(folder, shared)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.float32([1, 2]), np.float32([1, np.nextafter(np.float32(2), 3)])),
        (np.float32([0.0]), np.float32([-0.0])),
        (np.ones((2, 3)), np.ones((3, 2))),
        (np.ones(()), np.ones(1)),
        (np.ones(6), np.ones((1, 6))),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros(4, np.float16), np.zeros(4, jnp.bfloat16)),
        (np.zeros((0, 2)), np.zeros((2, 0))),
        (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)[::-1]),
    ],
)
def test_fingerprint_sees(a, b):
    assert fingerprint({"w": a}) != fingerprint({"w": b})
    assert fingerprint({"w": a}) == fingerprint({"w": a.copy()})


def test_fingerprint_is_of_values_not_of_memory_or_container():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    turned = np.asfortranarray(x)
    assert fingerprint({"w": x}) == fingerprint({"w": turned})
    assert fingerprint({"w": x}) == fingerprint({"w": jnp.asarray(x)})
    assert fingerprint({"w": x}) == fingerprint(nnx.State({"w": nnx.Param(x)}))
    assert fingerprint({"w": x}) != fingerprint({"v": x})


def test_fingerprint_of_100_megabytes_is_quick():
    tree = {"w": np.zeros((25, 1024, 1024), np.float32)}
    start = time.perf_counter()
    fingerprint(tree)
    assert time.perf_counter() - start < 2


# Damage ---------------------------------------------------------------------------


def test_no_task_in_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no task.*manifest.json"):
        restore_task(tmp_path, backbone())
    with pytest.raises(FileNotFoundError, match="nowhere holds no task"):
        restore_task(tmp_path / "nowhere", backbone())


def flip(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda c: c[:-1], lambda c: c[:20], lambda c: b"", lambda c: c + b"0"],
)
def test_damaged_tensors_are_noticed(folder, damage):
    path = tensors_of(folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TaskFileError, match=r"task-\w+.safetensors is damaged: .*SHA"):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    "content", [b"", b"x" * 40, b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]"]
)
def test_what_is_no_safetensors_file_is_called_so(folder, content):
    tensors_of(folder).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(folder, lambda m: m["tensors"].update(sha256=digest))
    with pytest.raises(TaskFileError, match="is no safetensors file"):
        restore_task(folder, backbone())


def test_a_missing_tensor_file_is_named(folder):
    tensors_of(folder).unlink()
    with pytest.raises(TaskFileError, match=r"task-\w+.safetensors is missing"):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[: len(c) // 2],
        lambda c: b"",
        lambda c: b"\xff\xfe\x00",
        lambda c: b"[]",
        lambda c: b"3",
        lambda c: b"{}",
        lambda c: b'{"format_version": "one"}',
    ],
)
def test_a_damaged_manifest_is_called_so(folder, damage):
    path = folder / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        TaskFileError, match=r"manifest.json (is no task manifest|has format)"
    ):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    "entry",
    ["name", "class_names", "preprocessing", "metadata", "tensors", "nodes", "shared"],
)
@pytest.mark.parametrize("value", ["absent", None, 3])
def test_a_manifest_that_lacks_an_entry_names_it(folder, entry, value):
    def change(manifest):
        manifest.pop(entry)
        if value != "absent":
            manifest[entry] = value

    rewrite(folder, change)
    with pytest.raises(TaskFileError, match=f"manifest.json lacks.*{entry}"):
        restore_task(folder, backbone())


@pytest.mark.parametrize("entry", ["file", "sha256", "arrays"])
def test_a_manifest_that_lacks_a_part_of_tensors_names_it(folder, entry):
    rewrite(folder, lambda m: m["tensors"].pop(entry) and None)
    with pytest.raises(TaskFileError, match=f"manifest.json lacks.*{entry}"):
        restore_task(folder, backbone())


@pytest.mark.parametrize("entry", ["path", "type", "module", "static", "arrays"])
def test_a_manifest_that_lacks_a_part_of_a_node_names_it(folder, entry):
    rewrite(folder, lambda m: m["nodes"][1].pop(entry) and None)
    with pytest.raises(TaskFileError, match=f"manifest.json lacks.*{entry}"):
        restore_task(folder, backbone())


def test_a_newer_format_is_refused(folder):
    rewrite(folder, lambda m: m.update(format_version=2))
    with pytest.raises(TaskFileError, match="format version 2, .* up to 1: upgrade"):
        restore_task(folder, backbone())


def node_at(manifest, path="conv/kernel"):
    return next(n for n in manifest["nodes"] if n["path"] == path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: n.update(type="Magic"),
            "conv/kernel is a Magic, known.*'CP', .*ftn_jax.nodes",
        ),
        (
            lambda n: n["static"].update(colour="red"),
            "rebuild the CP at conv/kernel.*colour",
        ),
        (lambda n: n["static"].pop("axes"), "rebuild the CP at conv/kernel.*axes"),
        (lambda n: n["static"].update(axes=[[0], [1], [2]]), None),
        (
            lambda n: n["static"].update(axes=[[0], [1]]),
            "rebuild the CP.*3 factors for 2",
        ),
        (lambda n: n["static"].update(axes=3), "rebuild the CP at conv/kernel"),
        (
            lambda n: n["arrays"].update(factors="delta/nothing"),
            "rebuild.*delta/nothing",
        ),
        (lambda n: n["arrays"].update(factors=7), "rebuild the CP at conv/kernel"),
        (lambda n: n["arrays"].update(factors=[]), "rebuild the CP at conv/kernel"),
        (lambda n: n.update(path="conv/renamed"), "nothing takes .*conv/renamed"),
    ],
)
def test_a_node_that_cannot_be_rebuilt_is_named(folder, change, message):
    rewrite(folder, lambda m: change(node_at(m)) and None)
    if message is None:  # a file of the right shape for another weight: merge refuses
        delta = restore_task(folder, backbone()).task.delta
        with pytest.raises(ValueError, match="conv/kernel: CP factors have sizes"):
            materialize(backbone(), delta)
        return
    with pytest.raises(TaskFileError, match=message):
        restore_task(folder, backbone())


def test_a_node_struck_from_the_manifest_is_missed(folder):
    rewrite(folder, lambda m: m["nodes"].remove(node_at(m)))
    with pytest.raises(
        TaskFileError, match="nothing takes .*delta/conv/kernel/factors/0"
    ):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/{}", "..", "", ".", "a\0b"]
)
def test_a_tensor_file_outside_the_folder_is_never_read(folder, name):
    outside = folder.parent / "outside.safetensors"
    tensors_of(folder).rename(outside)  # the right content, in the wrong place
    rewrite(folder, lambda m: m["tensors"].update(file=name.format(outside)))
    with pytest.raises(TaskFileError, match="is missing, the manifest names it"):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "delta/x": np.ones(2, np.float32)},
            "delta/x is .*nothing of it",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "bias" not in k},
            "bias/value is missing",
        ),
        (lambda t: {k: v.T for k, v in t.items()}, "is .*shape.* the manifest says"),
        (lambda t: {k: v.astype(np.float16) for k, v in t.items()}, "float16.*float32"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest(folder, change, message):
    """Also when the checksum was put right: the file and its list must agree."""
    state = {"batch_stats": {"mean": jnp.ones(4)}}
    save_task(folder, Task(task().delta, state), shared=backbone(), name="plain")
    path = tensors_of(folder)
    tensors = {
        k: np.asarray(v, order="C") for k, v in change(load(path.read_bytes())).items()
    }
    path.write_bytes(save(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, lambda m: m["tensors"].update(sha256=digest))
    with pytest.raises(TaskFileError, match=message):
        restore_task(folder, backbone())
