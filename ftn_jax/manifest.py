"""A folder of one JSON manifest and one safetensors file: written whole, read warily.

The tensors are written first, under a name of their own; replacing `manifest.json`
is the one step that makes them current. A crash leaves the old folder or the new.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from ftn_jax.atomic import write_atomic
from ftn_jax.jobs import sync

# 2: a task names what it reads beside the backbone. 3: hashes of the backbone are sums
# (`ftn_jax.digest`), not SHA-256; the manifest has a checksum of its own.
FORMAT_VERSION = 3
_LARGEST = 2**28  # bytes of a manifest; a thousand layers need a few megabytes

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
_TASK = {
    "name": str,
    "class_names": list,
    "preprocessing": list,
    "metadata": dict,
    "nodes": list,
    "keys": dict,
    "beside": dict,
}
_TENSORS = {"file": str, "sha256": str, "arrays": dict}
_ENTRY = {"kind": str, "place": str, "name": str, "tensor": str}
_NODE = {"path": str, "type": str, "module": str, "static": dict, "arrays": dict}


class TaskFileError(ValueError):
    """A task file that is damaged, of another backbone, or of a newer format."""


def write_folder(
    directory: Path, kind: str, tensors: dict[str, np.ndarray], manifest: dict[str, Any]
) -> None:
    """Write a folder; another one in its place is replaced in one step.

    In a job of several processes all call this, the first one writes.

    Args:
        directory: made if absent.
        kind: `"task"` or `"extras"`.
        tensors: by name.
        manifest: anything JSON can hold.

    Raises:
        OSError: if it cannot be written; an older folder is untouched.
        ValueError: if the tensors hold NaN or infinity (names the first), or the
            manifest what JSON cannot.
    """
    for name, x in tensors.items():
        if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) and not (
            np.isfinite(x).all()
        ):
            raise ValueError(f"{directory}: {name} has NaN or infinity; not saved")
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    file = f"{kind}-{digest[:12]}.safetensors"
    arrays = {
        k: {"shape": list(x.shape), "dtype": str(x.dtype)} for k, x in tensors.items()
    }
    whole = {
        "format": f"ftn_jax {kind}",
        "format_version": FORMAT_VERSION,
        "tensors": {"file": file, "sha256": digest, "arrays": arrays},
        **manifest,
    }
    try:
        plain = json.loads(json.dumps(whole, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}: metadata, preprocessing or a node's static field holds what "
            f"JSON cannot: {error}"
        ) from error
    text = json.dumps(plain | {"checksum": checksum(plain)}, indent=1)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / file, content)
        write_atomic(directory / "manifest.json", text.encode())
        for stale in directory.glob(f"{kind}-*.safetensors"):
            if stale.name != file:
                stale.unlink()
    sync(f"wrote {directory}")


def checksum(content: dict[str, Any]) -> str:
    """Hash JSON values, but for an entry `checksum` among them."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path, kind: str = "task") -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        FileNotFoundError: if there is none.
        TaskFileError: if it is damaged, of another kind, or of a newer format.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {kind}: {path} does not exist")
    if path.stat().st_size > _LARGEST:
        raise TaskFileError(f"{path} is no {kind} manifest: over {_LARGEST} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        version, found = manifest["format_version"], manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TaskFileError(f"{path} is no {kind} manifest: {error!r}") from error
    if found != f"ftn_jax {kind}":
        raise TaskFileError(f"{path} is of {found!r}, expected 'ftn_jax {kind}'")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise TaskFileError(
            f"{path} has format version {version}, this ftn_jax reads up to "
            f"{FORMAT_VERSION}: upgrade ftn_jax to open it"
        )
    if "checksum" in manifest or version >= 3:
        if manifest.get("checksum") != checksum(manifest):
            raise TaskFileError(
                f"{path} is damaged: its checksum is not that of its content; restore "
                "it from a copy"
            )
    _check_entries(path, manifest, {"tensors": dict, "shared": dict})
    _check_entries(path, manifest["tensors"], _TENSORS)
    if kind == "task":
        manifest.setdefault("beside", {})  # format 1
        _check_entries(path, manifest, _TASK)
        check_name(manifest["name"])
        for node in manifest["nodes"]:
            _check_entries(path, node, _NODE)
    else:
        _check_entries(path, manifest, {"entries": list})
        for entry in manifest["entries"]:
            _check_entries(path, entry, _ENTRY)
    return manifest


def check_name(name: str) -> None:
    """Refuse a task's name that could lead out of a folder that is called so.

    Raises:
        TaskFileError: if it has slashes or control characters, or is only dots.
    """
    if not name.strip(". ") or "/" in name or "\\" in name or not name.isprintable():
        raise TaskFileError(
            f"a task cannot be called {name!r}: folders are called as tasks are; "
            "expected printable characters without slashes"
        )


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
