"""Read a task's files back, trusting nothing in them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, deserialize

FORMAT_VERSION = 1

# The names that safetensors files use; its own numpy reader lacks bfloat16.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(jax.numpy.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_MANIFEST = {
    "name": str,
    "class_names": list,
    "preprocessing": list,
    "metadata": dict,
    "tensors": dict,
    "nodes": list,
    "keys": dict,
    "shared": dict,
}
_TENSORS = {"file": str, "sha256": str, "arrays": dict}
_NODE = {"path": str, "type": str, "module": str, "static": dict, "arrays": dict}


class TaskFileError(ValueError):
    """A task file that is damaged, of another backbone, or of a newer format."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        FileNotFoundError: if there is none.
        TaskFileError: if it is damaged or of a newer format.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no task: {path} does not exist")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise TaskFileError(f"{path} is no task manifest: {error!r}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise TaskFileError(
            f"{path} has format version {version}, this ftn_jax reads up to "
            f"{FORMAT_VERSION}: upgrade ftn_jax to open it"
        )
    _check_entries(path, manifest, _MANIFEST)
    _check_entries(path, manifest["tensors"], _TENSORS)
    for node in manifest["nodes"]:
        _check_entries(path, node, _NODE)
    return manifest


def _check_entries(path: Path, found: Any, kinds: dict[str, type]) -> None:
    entries = found if isinstance(found, dict) else {}
    bad = {k: v.__name__ for k, v in kinds.items() if not isinstance(entries.get(k), v)}
    if bad:
        raise TaskFileError(
            f"{path} lacks entries, or has them of another kind, expected {bad}; "
            "restore the file from a copy"
        )


def read_tensors(directory: Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read the tensors that a manifest's entry names and check every one of them.

    Raises:
        TaskFileError: if the file is missing, damaged, or not what the entry says.
    """
    path = directory / Path(entry["file"]).name  # never outside the folder
    if not path.is_file():
        raise TaskFileError(f"{path} is missing, the manifest names it")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise TaskFileError(
            f"{path} is damaged: {len(content)} bytes with SHA-256 {found}, expected "
            f"{entry['sha256']}; restore it from a copy"
        )
    try:
        tensors = {
            name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
            for name, x in deserialize(content)
        }
    except (SafetensorError, KeyError) as error:
        raise TaskFileError(f"{path} is no safetensors file: {error!r}") from error
    shapes = {
        k: {"shape": list(x.shape), "dtype": str(x.dtype)} for k, x in tensors.items()
    }
    for name in sorted({*shapes, *entry["arrays"]}):
        if shapes.get(name) != entry["arrays"].get(name):
            raise TaskFileError(
                f"{path}: {name} is {shapes.get(name, 'missing')}, the manifest says "
                f"{entry['arrays'].get(name, 'nothing of it')}"
            )
    return tensors
