"""Read weight files of PyTorch, safetensors and numpy into flat dicts of arrays."""

import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TORCH_SUFFIXES = (".pth", ".th", ".pt", ".bin")
_NESTED = ("state_dict", "model")


class WeightsFileError(ValueError):
    """Say why a file of weights cannot be read, and what to do."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a file of named arrays; nothing inside the file is ever executed.

    Args:
        path: A `.safetensors`, `.npz`, `.pth`, `.th`, `.pt` or `.bin` file. The last
            four need PyTorch; a dict under "state_dict" or "model" is unwrapped.

    Returns:
        Name to array, as stored (bfloat16 becomes float32). A prefix `module.` that
        all names carry is removed.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsFileError: If the file is cut short, of another kind than its suffix
            says, or holds anything but arrays.
        ImportError: If the file needs PyTorch and it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        weights = _read_safetensors(path)
    elif path.suffix == ".npz":
        weights = _read_npz(path)
    elif path.suffix in TORCH_SUFFIXES:
        weights = _read_torch(path)
    else:
        known = ", ".join((".safetensors", ".npz", *TORCH_SUFFIXES))
        raise WeightsFileError(
            f"{path}: unknown suffix {path.suffix!r}, weights are read from {known}"
        )
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): w for name, w in weights.items()}
    return weights


def _damaged_error(path: Path) -> WeightsFileError:
    return WeightsFileError(
        f"{path}: not a whole {path.suffix} file: fetch it again, or correct its suffix"
    )


def _objects_error(path: Path) -> WeightsFileError:
    # Raised from None: the readers' own messages advise to load the file unsafely.
    return WeightsFileError(
        f"{path}: damaged, or holds Python objects besides plain arrays. Nothing in it "
        "was executed. Fetch it again, or have its author save only the arrays: "
        "model.state_dict(), best as safetensors"
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise _damaged_error(path) from error
    return {name: _widen(w) for name, w in weights.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here because np.load leaves a damaged file open.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise WeightsFileError(f"{path}: one array, not an npz of named arrays")
            return {name: file[name] for name in file.files}
    except WeightsFileError:
        raise
    except ValueError:
        raise _objects_error(path) from None
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged_error(path) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading PyTorch files needs PyTorch: pip install 'ftn_jax[torch]'"
        ) from error
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        # Before 2.6 a crafted file could run code in spite of weights_only
        # (CVE-2025-32434).
        raise ImportError(
            f"{path}: reading PyTorch files safely needs torch >= 2.6, found "
            f"{torch.__version__}: pip install -U torch"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _objects_error(path) from None
    except Exception as error:  # a damaged file can raise anything at all
        raise _damaged_error(path) from error
    return {
        name: _to_numpy(path, name=name, value=value)
        for name, value in _unwrap(path, content).items()
    }


def _unwrap(path: Path, content: Any) -> Mapping[Any, Any]:
    """Find the dict of tensors in what the file holds."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise WeightsFileError(
            f"{path}: holds a {type(content).__name__}, not a dict of named tensors: "
            "save model.state_dict()"
        )
    return content


def _to_numpy(path: Path, *, name: Any, value: Any) -> np.ndarray:
    import torch

    named_tensor = isinstance(name, str) and isinstance(value, torch.Tensor)
    if not named_tensor or value.layout != torch.strided:
        raise WeightsFileError(
            f"{path}: {name!r} is a {type(value).__name__}, not a named dense tensor: "
            "save model.state_dict()"
        )
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _widen(w: np.ndarray) -> np.ndarray:
    return w.astype(np.float32) if w.dtype.name == "bfloat16" else w
