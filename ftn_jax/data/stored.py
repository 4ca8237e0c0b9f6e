"""Arrays in `.npz`, `.npy` and MATLAB's `.mat` files: as stored, or refused by name.

Damage can raise nearly anything in their readers; here it is a `ValueError` that names
the file. Nothing is unpickled.
"""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def npz_keys(path: Path) -> list[str]:
    """List the names of an `.npz` file's arrays.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is no `.npz` file, or a damaged one.
    """
    with _npz(path) as arrays:
        return sorted(arrays.files)


def read_npz(
    path: Path, wanted: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Read some of an `.npz` file's arrays.

    Args:
        path: of the file.
        wanted: names of arrays that must be there.
        optional: names of arrays that may be.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is no `.npz` file, lacks an array, or one is damaged or
            holds pickled objects.
    """
    with _npz(path) as arrays:
        there = sorted(arrays.files)
        if missing := [key for key in wanted if key not in there]:
            raise ValueError(f"{path}: found keys {there}, expected also {missing}")
        try:
            return {k: arrays[k] for k in (*wanted, *optional) if k in there}
        except Exception as error:
            raise ValueError(
                f"{path}: an array cannot be read ({error}); expected plain arrays "
                "without pickled objects, in an undamaged file"
            ) from error


def read_npy(path: Path) -> np.ndarray:
    """Read an `.npy` file.

    Raises:
        ValueError: where it is absent or damaged, or holds pickled objects.
    """
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read ({error!r}), expected a plain array; get it again"
        ) from error


def read_mat(path: Path, key: str, *, squeeze: bool = False) -> np.ndarray:
    """Read one entry of a `.mat` file; `squeeze` leaves out axes of length 1.

    Raises:
        ValueError: where it is absent or damaged, or has no such entry.
    """
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=squeeze)[key]
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read ({error!r}), expected the key {key!r}; get it "
            "again"
        ) from error


@contextmanager
def _npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected an .npz file")
    with path.open("rb") as file:  # np.load would leave a damaged one open
        try:
            # A zip that np.load does not see as one, it takes for a pickle: look first.
            if not zipfile.is_zipfile(file):
                raise ValueError("no zip archive")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
        except Exception as error:
            raise ValueError(
                f"{path}: not an .npz file, or a damaged one ({error}); get it again"
            ) from error
        with arrays:
            yield arrays
