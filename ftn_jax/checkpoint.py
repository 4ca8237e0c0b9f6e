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
import numpy as np

import ftn_jax.nodes  # noqa: F401  task files may hold any of them
from ftn_jax.core import complete, split_extras
from ftn_jax.manifest import (
    TaskFileError,
    digest,
    read_manifest,
    read_tensors,
    write_folder,
)
from ftn_jax.node import Node
from ftn_jax.nodes.stacked import Stacked
from ftn_jax.paths import path_name
from ftn_jax.task_layers import (
    single_leaves,
    single_nodes,
    stacks_for,
    stacks_of,
    take_node,
)
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


def fingerprint(shared: Any) -> dict[str, str]:
    """Hash every leaf of a tree: SHA-256 over shape, dtype and bytes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    return {path_name(path): digest(leaf) for path, leaf in leaves}


def _fingerprint(params: Any, stacks: Sequence[str]) -> dict[str, str]:
    return {path: digest(w) for path, w in single_leaves(params, stacks)}


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
        ValueError: if the task holds NaN or infinity (names the tensor), or
            something to be written as JSON cannot be.
    """
    directory = Path(directory)
    params, _ = split_extras(shared)
    tensors: dict[str, np.ndarray] = {}
    nodes = [
        {
            "path": path,
            "type": type(node).__name__,
            "module": type(node).__module__,
            "static": {n: getattr(node, n) for n in type(node).static_fields},
            "arrays": {
                n: _store(tensors, f"delta/{path}/{n}", getattr(node, n))
                for n in type(node).data_fields
            },
        }
        for path, node in single_nodes(task.delta)
    ]
    replaced = [p for p, n in single_nodes(task.delta) if not n.reads_weight]
    keys: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(task.model_state):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys[path_name(path)] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        _store(tensors, f"model_state/{path_name(path)}", leaf)
    write_folder(
        directory,
        "task",
        tensors,
        {
            "name": name,
            "class_names": list(class_names),
            "preprocessing": [dict(step) for step in preprocessing],
            "metadata": dict(metadata or {}),
            "nodes": nodes,
            "keys": keys,
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
    check_backbone(directory, manifest["shared"], params, stacks)
    tensors = read_tensors(directory, manifest["tensors"])
    nodes = {n["path"]: _build(directory, n, tensors) for n in manifest["nodes"]}
    try:
        delta = jax.tree_util.tree_map_with_path(
            lambda path, w: take_node(nodes, path_name(path), w, stacks), params
        )
    except TaskFileError as error:
        raise TaskFileError(f"{directory}: {error}") from error
    saved = {
        k.removeprefix("model_state/"): _to_device(k, tensors.pop(k))
        for k in list(tensors)
        if k.startswith("model_state/")
    }
    if nodes or tensors:
        raise TaskFileError(
            f"{directory}: nothing takes {sorted([*nodes, *tensors])}: the manifest's "
            "list of nodes is damaged; restore the file from a copy"
        )
    _check_beside(directory, manifest["beside"], shared, delta)
    state = {
        k: jax.random.wrap_key_data(x, impl=manifest["keys"][k])
        if k in manifest["keys"]
        else x
        for k, x in saved.items()
    }
    return SavedTask(
        task=Task(delta, _restore_state(directory, state, model_state)),
        name=manifest["name"],
        class_names=tuple(manifest["class_names"]),
        preprocessing=manifest["preprocessing"],
        metadata=manifest["metadata"],
    )


def _beside(shared: Any, delta: Any) -> dict[str, dict[str, str]]:
    """Hash what each node reads beside the backbone, by the weight's path and name."""
    found: dict[str, dict[str, str]] = {}
    for path, _, node in complete(shared, delta):
        if node is None or not node.beside_fields:
            continue
        if not isinstance(node, Stacked):
            found[path] = {name: digest(x) for name, x in node.reads().items()}
            continue
        for i, layer in enumerate(node.paths()):
            found[layer] = {name: digest(x[i]) for name, x in node.reads().items()}
    return found


def _check_beside(
    directory: Path, expected: dict[str, dict[str, str]], shared: Any, delta: Any
) -> None:
    try:
        found = _beside(shared, delta)
    except ValueError as error:
        raise TaskFileError(f"{directory}: {error}") from error
    for path in sorted({*expected, *found}):
        if found.get(path) != expected.get(path):
            raise TaskFileError(
                f"{directory}: what the task reads of {path} beside the backbone "
                "differs from what it was trained with; load the extras that were "
                "saved with it (ftn_jax.restore_extras)"
            )


def _store(tensors: dict[str, np.ndarray], name: str, value: Any) -> Any:
    """Put a field's arrays into `tensors`; return its structure with their names."""
    if isinstance(value, (tuple, list)):
        return [_store(tensors, f"{name}/{n}", x) for n, x in enumerate(value)]
    if isinstance(value, dict):
        return {k: _store(tensors, f"{name}/{k}", x) for k, x in value.items()}
    if value is None:
        return None
    tensors[name] = np.asarray(value, order="C")
    return name


def _load(tensors: dict[str, np.ndarray], structure: Any) -> Any:
    if structure is None:
        return None
    if isinstance(structure, list):
        return tuple(_load(tensors, x) for x in structure)
    if isinstance(structure, dict):
        return {k: _load(tensors, x) for k, x in structure.items()}
    return _to_device(structure, tensors.pop(structure))


def _to_device(name: str, x: np.ndarray) -> jax.Array:
    array = jax.numpy.asarray(x)
    if array.dtype != x.dtype:
        raise ValueError(f"{name} is {x.dtype}: set jax_enable_x64 to load it")
    return array


def _frozen(value: Any) -> Any:
    """Turn JSON's lists back into the tuples that static fields hold."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def check_backbone(
    directory: Path,
    expected: dict[str, str | None],
    shared: Any,
    stacks: Sequence[str] = (),
) -> None:
    """Compare fingerprints, leaf by leaf and layer by layer; `None` fits any value.

    Raises:
        TaskFileError: names the first leaf that differs.
    """
    found: dict[str, str | None] = {**_fingerprint(shared, stacks)}
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


def _build(directory: Path, entry: dict[str, Any], tensors: dict[str, Any]) -> Node:
    known = Node.types.get(entry["type"])
    if known is None:
        raise TaskFileError(
            f"{directory}: {entry['path']} is a {entry['type']}, known node types are "
            f"{sorted(Node.types)}; import the module that defines it "
            f"({entry['module']}) or upgrade ftn_jax"
        )
    try:
        fields = {k: _load(tensors, v) for k, v in entry["arrays"].items()}
        fields |= {k: _frozen(v) for k, v in entry["static"].items()}
        return known(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise TaskFileError(
            f"{directory}: cannot rebuild the {entry['type']} at {entry['path']}: "
            f"{error!r}"
        ) from error


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
