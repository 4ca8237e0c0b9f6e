"""Readers of domains: `.npz` files, scikit-learn's digits, and whatever lies there."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8

from ftn_jax.data.domain import ArraySource, Domain, split
from ftn_jax.data.fer2013 import FILES, load_fer2013
from ftn_jax.data.folders import load_folder
from ftn_jax.data.stored import npz_keys, read_npz

_LOG = logging.getLogger(__name__)
_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: str | Path) -> Domain:
    """Read a domain from arrays `x_train`, `y_train`, `x_test`, `y_test`.

    Images are uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3), labels integers (n,).
    `x_val` and `y_val` are optional; `class_names` too: the classes are numbered where
    it is absent.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is damaged, holds pickled objects, or its arrays
            are not as above; the message names the file.
    """
    path = Path(path)
    has_val = "x_val" in npz_keys(path)
    parts = ("train", "test", *(["val"] if has_val else []))
    keys = [f"{axis}_{part}" for part in parts for axis in "xy"]
    found = read_npz(path, keys, optional=("class_names",))
    try:
        sources = {
            part: _array_source(found[f"x_{part}"], found[f"y_{part}"], part=part)
            for part in parts
        }
        channels = {part: s.images.shape[-1] for part, s in sources.items()}
        if len({*channels.values()}) > 1:
            counts = " and ".join(f"{part} {n}" for part, n in channels.items())
            raise ValueError(f"channels: found {counts}, expected one number")
        if "class_names" in found:
            names = found["class_names"]
            if names.ndim != 1 or names.dtype.kind != "U":
                raise ValueError(
                    f"class_names: found {names.dtype} of shape {names.shape}, "
                    "expected unicode of shape (classes,)"
                )
        else:
            largest = max(source.labels.max() for source in sources.values())
            names = np.arange(largest + 1).astype(str)
        names = tuple(names.tolist())
        train, test = sources["train"], sources["test"]
        return Domain(path.stem, names, train, test, sources.get("val"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_digits() -> Domain:
    """Give the 1797 handwritten digits (8x8x1) that come with scikit-learn.

    One fifth of each class, always the same, is the test set.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits",
    UCI Machine Learning Repository.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'ftn_jax[experiments]'"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = split(ArraySource(images, labels), 0.2, seed=0)
    return Domain("digits", tuple("0123456789"), train, test)


def load_domain(path: str | Path, *, skip_bad: bool = False) -> Domain:
    """Read a domain from a folder of images, an `.npz` file or FER2013's table.

    Args:
        path: of the folder or the file.
        skip_bad: leave out a folder's images that do not decode, with a warning.
    """
    path = Path(path)
    if path.name in FILES:
        return load_fer2013(path)
    return load_folder(path, skip_bad=skip_bad) if path.is_dir() else load_npz(path)


def find_domains(
    data_dir: str | Path, names: Iterable[str] | None = None
) -> dict[str, Path]:
    """Find the domains in a folder: `.npz` files and folders that hold `train/`.

    FER2013's `fer2013.csv` is one too.

    Files of other arrays are passed over, unreadable ones with a warning.

    Args:
        data_dir: where to look; not deeper.
        names: domains to give, in this order; `None` gives all, sorted.

    Raises:
        FileNotFoundError: where `data_dir` or a name is absent, or it holds no domain.
        ValueError: where a file and a folder have one name.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder, expected one of domains")
    found: dict[str, Path] = {}
    for path in sorted(data_dir.iterdir()):
        if not _is_domain(path):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise ValueError(f"{found[name]} and {path} have one name; rename one")
        found[name] = path
    if not found:
        raise FileNotFoundError(
            f"{data_dir}: no domain, expected .npz files with x_train ... y_test or "
            "folders with train/CLASS/*.jpg"
        )
    if names is None:
        return dict(sorted(found.items()))
    names = list(names)
    if missing := [name for name in names if name not in found]:
        raise FileNotFoundError(
            f"{data_dir}: no domain {missing}, expected some of {sorted(found)}"
        )
    return {name: found[name] for name in names}


def _is_domain(path: Path) -> bool:
    if path.is_dir():
        return (path / "train").is_dir()
    if path.name in FILES:
        return True
    if path.suffix != ".npz":
        return False
    try:
        return {*_KEYS} <= {*npz_keys(path)}
    except ValueError as error:
        _LOG.warning("passed over: %s", error)
        return False


def _array_source(
    images: UInt8[np.ndarray, "n h w *c"],
    labels: Integer[np.ndarray, " n"],
    *,
    part: str,
) -> ArraySource:
    try:
        return ArraySource(images[..., None] if images.ndim == 3 else images, labels)
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error
