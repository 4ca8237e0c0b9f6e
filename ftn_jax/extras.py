"""Files of what lies beside a backbone: the same format as tasks, the same care.

Bases of weights are not reproducible across linear-algebra libraries, and a packed
state cannot be computed again at all: they are saved once for each backbone.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftn_jax.checkpoint import check_backbone, fingerprint
from ftn_jax.core import Extended
from ftn_jax.manifest import TaskFileError, read_manifest, read_tensors, write_folder


def save_extras(directory: str | os.PathLike[str], shared: Extended) -> Path:
    """Write what lies beside a backbone, bound to it by its fingerprint.

    Returns:
        The folder, with `manifest.json` and one `.safetensors` file.

    Raises:
        OSError: if the folder cannot be written; older extras in it are untouched.
        ValueError: if an array holds NaN or infinity.
    """
    tensors: dict[str, np.ndarray] = {}
    entries = []
    for kind, places in shared.extras.items():
        for place, arrays in places.items():
            for name, x in arrays.items():
                tensor = f"{kind}/{place}/{name}"
                tensors[tensor] = np.asarray(x, order="C")
                entry = {"kind": kind, "place": place, "name": name, "tensor": tensor}
                entries.append(entry)
    content = {"entries": entries, "shared": fingerprint(shared.params)}
    write_folder(Path(directory), "extras", tensors, content)
    return Path(directory)


def restore_extras(directory: str | os.PathLike[str], shared: Any) -> Extended:
    """Read extras back and lay them beside the backbone that they belong to.

    Raises:
        FileNotFoundError: if there are none in the folder.
        TaskFileError: if the files are damaged, or belong to another backbone (names
            the first leaf that differs).
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "extras")
    check_backbone(directory, manifest, shared)
    tensors = read_tensors(directory, manifest["tensors"])
    extras: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in manifest["entries"]:
        if entry["tensor"] not in tensors:
            raise TaskFileError(
                f"{directory}: the manifest names {entry['tensor']}, which is not "
                "there; restore the file from a copy"
            )
        arrays = extras.setdefault(entry["kind"], {}).setdefault(entry["place"], {})
        arrays[entry["name"]] = jax.numpy.asarray(tensors[entry["tensor"]])
    return Extended(shared, extras)
