"""Task files: a folder with safetensors and a JSON manifest, bound to its backbone.

A task's file holds only what the task owns. The backbone is named by a fingerprint,
so a task cannot be loaded onto other weights by mistake, and nothing is pickled.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

import ftn_jax.nodes  # noqa: F401  task files may hold any of them
from ftn_jax.core import complete, split_extras
from ftn_jax.digest import digests_of
from ftn_jax.manifest import (
    FORMAT_VERSION,
    TaskFileError,
    check_name,
    read_manifest,
    write_folder,
)
from ftn_jax.nodes.stacked import Stacked
from ftn_jax.paths import path_name
from ftn_jax.task_layers import (
    single_leaves,
    single_nodes,
    stacks_for,
    stacks_of,
    take_node,
)
from ftn_jax.task_parts import pack, unpack
from ftn_jax.train import Task


@dataclass(frozen=True)
class SavedTask:
    """A task read back from its folder.

    Attributes:
        task: delta and model_state, ready for an evaluation or a training step.
        name: the task's name.
        class_names: of the head's outputs, in order.
        preprocessing: JSON description of the input transform
            (`ftn_jax.data.from_description` builds it).
        metadata: whatever else the saver wrote down.
    """

    task: Task
    name: str
    class_names: tuple[str, ...] = ()
    preprocessing: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def fingerprint(shared: Any, *, format_version: int = FORMAT_VERSION) -> dict[str, str]:
    """Hash every leaf of a tree, by path: dtype, shape and bits.

    Sharded arrays are hashed where their parts lie; the processes of a job call this
    together.

    Args:
        shared: the tree.
        format_version: of the task files to compare with.
    """
    return _fingerprint(shared, (), format_version)


def _fingerprint(
    params: Any, stacks: Sequence[str], version: int = FORMAT_VERSION
) -> dict[str, str]:
    leaves = dict(single_leaves(params, stacks))
    hashes = digests_of(version)([*leaves.values()])
    return dict(zip(leaves, hashes, strict=True))


def save_task(
    directory: str | os.PathLike[str],
    task: Task,
    *,
    shared: Any,
    name: str,
    class_names: Sequence[str] = (),
    preprocessing: Sequence[Mapping[str, Any]] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a task's folder: `manifest.json` and one `.safetensors` file.

    Of a network that scans over its layers (a stack `blocks`) the file holds the single
    layers (`blocks_0`, ...), as if the network did not: it opens on either form.

    Args:
        directory: the task's folder, made if absent; a task in it is replaced.
        task: what to save.
        shared: the backbone that the task was trained on, with what lies beside it
            (fingerprinted, not saved).
        name: the task's name.
        class_names: of the head's outputs.
        preprocessing: JSON description of the input transform.
        metadata: anything JSON can hold.

    Returns:
        The folder.

    Raises:
        OSError: if the folder cannot be written; an older task in it is untouched.
        ValueError: if the task holds NaN or infinity (names the tensor), something
            to be written as JSON cannot be, or the name has slashes.
    """
    directory = Path(directory)
    check_name(name)
    params, _ = split_extras(shared)
    nodes = dict(single_nodes(task.delta))
    leaves = jax.tree_util.tree_leaves_with_path(task.model_state)
    tensors, parts = pack(nodes, {path_name(path): x for path, x in leaves})
    replaced = [p for p, n in nodes.items() if not n.reads_weight]
    write_folder(
        directory,
        "task",
        tensors,
        {
            "name": name,
            "class_names": list(class_names),
            "preprocessing": [dict(step) for step in preprocessing],
            "metadata": dict(metadata or {}),
            **parts,
            # A leaf that the task replaces need not be the same elsewhere.
            "shared": _fingerprint(params, stacks_of(params, task.delta))
            | dict.fromkeys(replaced),
            "beside": _beside(shared, task.delta),
        },
    )
    return directory


def restore_task(
    directory: str | os.PathLike[str], shared: Any, *, model_state: Any = None
) -> SavedTask:
    """Read a task's folder and check that it belongs to this backbone.

    Args:
        directory: a folder that `save_task` wrote.
        shared: the backbone, with what lies beside it; the delta gets its tree
            structure.
        model_state: a tree whose structure the saved state is put in, needed where
            it is not made of nested dicts (an `nnx.State`, for example).

    Raises:
        FileNotFoundError: if there is no task in the folder.
        TaskFileError: if the files are damaged or incomplete, were written by a newer
            release, hold an unknown node type, or belong to another backbone (names
            the first leaf that differs; leaves that the task replaces may differ).
        ValueError: if a tensor is of 64 bits and JAX is not set to use them.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    params, _ = split_extras(shared)
    stacks = stacks_for(manifest["shared"], params)
    check_backbone(directory, manifest, params, stacks)
    nodes, state = unpack(directory, manifest)
    try:
        delta = jax.tree_util.tree_map_with_path(
            lambda path, w: take_node(nodes, path_name(path), w, stacks), params
        )
    except TaskFileError as error:
        raise TaskFileError(f"{directory}: {error}") from error
    if nodes:
        raise TaskFileError(
            f"{directory}: nothing takes {sorted(nodes)}: the manifest's list of nodes "
            "is damaged; restore the file from a copy"
        )
    _check_beside(directory, manifest, shared, delta)
    return SavedTask(
        task=Task(delta, _restore_state(directory, state, model_state)),
        name=manifest["name"],
        class_names=tuple(manifest["class_names"]),
        preprocessing=manifest["preprocessing"],
        metadata=manifest["metadata"],
    )


def _beside(
    shared: Any, delta: Any, version: int = FORMAT_VERSION
) -> dict[str, dict[str, str]]:
    """Hash what each node reads beside the backbone, by the weight's path and name."""
    found: dict[str, dict[str, str]] = {}

    def hashes(arrays: dict[str, Any]) -> dict[str, str]:
        values = digests_of(version)([*arrays.values()])
        return dict(zip(arrays, values, strict=True))

    for path, _, node in complete(shared, delta):
        if node is None or not node.beside_fields:
            continue
        if not isinstance(node, Stacked):
            found[path] = hashes(node.reads())
            continue
        for i, layer in enumerate(node.paths()):
            found[layer] = hashes({k: x[i] for k, x in node.reads().items()})
    return found


def _check_beside(
    directory: Path, manifest: dict[str, Any], shared: Any, delta: Any
) -> None:
    expected = manifest["beside"]
    try:
        found = _beside(shared, delta, manifest["format_version"])
    except ValueError as error:
        raise TaskFileError(f"{directory}: {error}") from error
    for path in sorted({*expected, *found}):
        if found.get(path) != expected.get(path):
            raise TaskFileError(
                f"{directory}: what the task reads of {path} beside the backbone "
                "differs from what it was trained with; load the extras that were "
                "saved with it (ftn_jax.restore_extras)"
            )


def check_backbone(
    directory: Path,
    manifest: dict[str, Any],
    shared: Any,
    stacks: Sequence[str] = (),
) -> None:
    """Compare fingerprints, leaf by leaf and layer by layer; `None` fits any value.

    Raises:
        TaskFileError: names the first leaf that differs.
    """
    expected: dict[str, str | None] = manifest["shared"]
    version = manifest["format_version"]
    found: dict[str, str | None] = {**_fingerprint(shared, stacks, version)}
    found |= {p: None for p in expected if expected[p] is None and p in found}
    for path in [*expected, *(p for p in found if p not in expected)]:
        if (path in expected, expected.get(path)) != (path in found, found.get(path)):
            why = (
                "the task's backbone has no such leaf"
                if path not in expected
                else "this backbone has no such leaf"
                if path not in found
                else "its values, shape or dtype differ"
            )
            raise TaskFileError(
                f"{directory} belongs to another backbone; the first leaf that differs "
                f"is {path}: {why}. Load the weights that it was made with"
            )


def _restore_state(directory: Path, saved: dict[str, Any], like: Any) -> Any:
    if like is None:
        state: dict[str, Any] = {}
        for path, value in saved.items():
            *parents, last = path.split("/")
            place = state
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = value
        return state
    entries, treedef = jax.tree_util.tree_flatten_with_path(like)
    paths = [path_name(path) for path, _ in entries]
    if set(paths) != set(saved):
        raise TaskFileError(
            f"{directory}: the saved model_state has {sorted(set(saved) - set(paths))}"
            f" beyond, and lacks {sorted(set(paths) - set(saved))} of, the one given"
        )
    return treedef.unflatten([saved[p] for p in paths])
