"""What a task file holds, apart from any backbone: nodes and running state by path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ftn_jax.digest import whole
from ftn_jax.manifest import TaskFileError, read_manifest, read_tensors, write_folder
from ftn_jax.node import Node


class BareTask(NamedTuple):
    """A task whose backbone is not there.

    Attributes:
        nodes: by path of the weight.
        model_state: arrays by path.
        manifest: everything else that the file says.
    """

    nodes: dict[str, Node]
    model_state: dict[str, Any]
    manifest: dict[str, Any]


def read_bare(directory: Path) -> BareTask:
    """Read a task without its backbone.

    Raises:
        FileNotFoundError: if there is no task in the folder.
        TaskFileError: if the files are damaged, or hold an unknown node type.
    """
    manifest = read_manifest(directory)
    return BareTask(*unpack(directory, manifest), manifest)


def write_bare(directory: Path, task: BareTask) -> None:
    """Write a task whose backbone is not there, in the format that it was read in.

    Raises:
        OSError: if it cannot be written; an older task in the folder is untouched.
        ValueError: if the task holds NaN or infinity.
    """
    tensors, parts = pack(task.nodes, task.model_state)
    keep = {k: v for k, v in task.manifest.items() if k not in ("format", "tensors")}
    write_folder(directory, "task", tensors, keep | parts)


def pack(
    nodes: Mapping[str, Node], model_state: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Take nodes and state apart: tensors by name, and the manifest's part on them."""
    tensors: dict[str, np.ndarray] = {}
    entries = [
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
        for path, node in nodes.items()
    ]
    keys: dict[str, str] = {}
    for path, leaf in model_state.items():
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys[path] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        _store(tensors, f"model_state/{path}", leaf)
    return tensors, {"nodes": entries, "keys": keys}


def unpack(
    directory: Path, manifest: dict[str, Any]
) -> tuple[dict[str, Node], dict[str, Any]]:
    """Read the tensors that a manifest names and put nodes and state together again.

    Raises:
        TaskFileError: if something is damaged, missing or left over.
        ValueError: if a tensor is of 64 bits and JAX is not set to use them.
    """
    tensors = read_tensors(directory, manifest["tensors"])
    nodes = {n["path"]: _build(directory, n, tensors) for n in manifest["nodes"]}
    state: dict[str, Any] = {}
    for name in [k for k in tensors if k.startswith("model_state/")]:
        path = name.removeprefix("model_state/")
        x = _to_device(name, tensors.pop(name))
        if path in manifest["keys"]:
            try:
                x = jax.random.wrap_key_data(x, impl=manifest["keys"][path])
            except (TypeError, ValueError) as error:
                raise TaskFileError(f"{directory}: {name}: {error}") from error
        state[path] = x
    if tensors or len(nodes) < len(manifest["nodes"]):
        raise TaskFileError(
            f"{directory}: nothing takes {sorted(tensors)}: the manifest's list of "
            "nodes is damaged; restore the file from a copy"
        )
    return nodes, state


def _store(tensors: dict[str, np.ndarray], name: str, value: Any) -> Any:
    """Put a field's arrays into `tensors`; return its structure with their names."""
    if isinstance(value, (tuple, list)):
        return [_store(tensors, f"{name}/{n}", x) for n, x in enumerate(value)]
    if isinstance(value, dict):
        return {k: _store(tensors, f"{name}/{k}", x) for k, x in value.items()}
    if value is None:
        return None
    tensors[name] = whole(value)
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
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise TaskFileError(
            f"{directory}: cannot rebuild the {entry['type']} at {entry['path']}: "
            f"{error!r}"
        ) from error
