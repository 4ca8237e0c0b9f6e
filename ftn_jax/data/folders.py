"""Image folders: one file per image, one folder per class, decoded when asked for."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from ftn_jax.data.domain import Domain, Example

_LOG = logging.getLogger(__name__)
_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


class FolderSource:
    """Decodes image files to RGB, each time one is asked for.

    Attributes:
        paths: the files, in order.
        labels: their classes.
        skipped: files that were left out because they do not decode.
    """

    paths: tuple[Path, ...]
    labels: Int32[np.ndarray, " n"]
    skipped: tuple[Path, ...]

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Integer[np.ndarray, " n"] | Sequence[int],
        *,
        skipped: Sequence[Path] = (),
    ):
        self.paths = tuple(paths)
        self.labels = np.asarray(labels, np.int32)
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Example:
        """Decode the image at `index`.

        Raises:
            ValueError: where the file does not decode; the message names it.
        """
        return Example(_decode(self.paths[index]), int(self.labels[index]))


def load_folder(path: str | Path, *, skip_bad: bool = False) -> Domain:
    """Read a domain from `train/<class>/*.jpg` and `test/` (or `val/`) likewise.

    The class index is the place of the folder's name in sorted order. Images may lie
    deeper within the class folder; hidden files and other kinds are passed over.

    Args:
        path: the folder that holds `train/`.
        skip_bad: decode every image now and leave out, with a warning, those that do
            not decode. Otherwise such an image raises when it is read.

    Raises:
        FileNotFoundError: where `train/` or both of `test/` and `val/` are absent.
        ValueError: where a class is empty, or train and test have other classes.
    """
    path = Path(path)
    train_dir, test_dir = path / "train", path / "test"
    if not test_dir.is_dir() and (path / "val").is_dir():
        test_dir = path / "val"
    for wanted in (train_dir, test_dir):
        if not wanted.is_dir():
            raise FileNotFoundError(
                f"{path}: found {_names(path)}, expected the folder {wanted.name}/ "
                "with one folder per class"
            )
    names, test_names = _class_folders(train_dir), _class_folders(test_dir)
    if not names:
        raise ValueError(f"{train_dir}: found no folder, expected one per class")
    if names != test_names:
        raise ValueError(
            f"{path}: train and {test_dir.name} have other classes; only train: "
            f"{sorted(set(names) - set(test_names))}, only {test_dir.name}: "
            f"{sorted(set(test_names) - set(names))}"
        )
    return Domain(
        path.resolve().name,
        tuple(names),
        train=_folder_source(train_dir, names, skip_bad=skip_bad),
        test=_folder_source(test_dir, names, skip_bad=skip_bad),
    )


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _class_folders(folder: Path) -> list[str]:
    return [n for n in _names(folder) if n[0] != "." and (folder / n).is_dir()]


def _folder_source(
    folder: Path, class_names: Sequence[str], *, skip_bad: bool
) -> FolderSource:
    kept: list[Path] = []
    labels: list[int] = []
    skipped: list[Path] = []
    for label, name in enumerate(class_names):
        paths = sorted(
            p
            for p in (folder / name).rglob("*")
            if p.suffix.lower() in _SUFFIXES and p.name[0] != "."
        )
        bad = _undecodable(paths) if skip_bad else []
        good = sorted(set(paths) - set(bad))
        if not good:
            raise ValueError(
                f"{folder / name}: found no image, and {len(bad)} that do not decode; "
                "expected at least one: add images, or remove the class everywhere"
            )
        kept += good
        labels += [label] * len(good)
        skipped += bad
    if skipped:
        _LOG.warning("%s: skipped %d images that do not decode", folder, len(skipped))
    return FolderSource(kept, labels, skipped=skipped)


def _undecodable(paths: Sequence[Path]) -> list[Path]:
    def is_bad(path: Path) -> bool:
        try:
            _decode(path)
        except ValueError as error:
            _LOG.warning("skipped: %s", error)
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return [p for p, bad in zip(paths, pool.map(is_bad, paths), strict=True) if bad]


def _decode(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "image folders need Pillow: pip install 'ftn_jax[experiments]'"
        ) from error
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting 16 or 32 bits would clip them
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # Decoders meet damage with errors of nearly any kind.
    except Exception as error:
        raise ValueError(
            f"{path}: does not decode as an image ({error}); replace or remove it, or "
            "load the folder with skip_bad=True"
        ) from error
