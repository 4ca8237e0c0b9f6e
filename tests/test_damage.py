"""Every way a task file can be wrong, and what is said of it."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save
from saved import (
    backbone,
    rewrite,
    task,
    tensors_of,
)

from ftn_jax import (
    Task,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.checkpoint import TaskFileError


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
    rewrite(folder, lambda m: m.update(format_version=4))
    with pytest.raises(TaskFileError, match="format version 4, .* up to 3: upgrade"):
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


def test_a_manifest_whose_content_was_changed_is_refused(folder):
    """One flipped bit in a scale or a class's name is no damage to JSON."""
    path = folder / "manifest.json"
    text = path.read_text()
    for old, new in (("0.30000000000000004", "0.70000000000000004"), ("ash", "asi")):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(TaskFileError, match="manifest.json is damaged: its check"):
            restore_task(folder, backbone())


def test_a_manifest_cannot_ask_for_memory(folder):
    """A trillion parameters are compared with what is there, never allocated."""

    def claim(manifest):
        for entry in manifest["tensors"]["arrays"].values():
            entry["shape"] = [10**6, 10**6]

    rewrite(folder, claim)
    with pytest.raises(TaskFileError, match="the manifest says .*1000000, 1000000"):
        restore_task(folder, backbone())


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]}},
        {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
            for name in ("x", "y")  # two tensors on the same bytes
        },
    ],
)
def test_a_header_cannot_ask_for_memory(folder, header):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    tensors_of(folder).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(folder, lambda m: m["tensors"].update(sha256=digest))
    with pytest.raises(TaskFileError, match="is no safetensors file"):
        restore_task(folder, backbone())


def test_a_manifest_too_deep_or_too_large_is_refused(folder):
    path = folder / "manifest.json"
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(TaskFileError, match="is no task manifest"):
        restore_task(folder, backbone())
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(TaskFileError, match="is no task manifest: over"):
        restore_task(folder, backbone())
