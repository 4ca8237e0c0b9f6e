"""Image folders: one file per image, one folder per class, decoded when asked for."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ftn_jax.data.domain import Domain
from ftn_jax.data.files import FileSource, decode_file

_LOG = logging.getLogger(__name__)
_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def load_folder(
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Domain:
    """Read a domain from `train/<class>/*.jpg` and `test/` (or `val/`) likewise.

    The class index is the place of the folder's name in sorted order. Images may lie
    deeper within the class folder; what is hidden, and other kinds, are passed over.
    Where there are `test/` and `val/`, the latter is the domain's validation part.

    Args:
        path: the folder that holds `train/`.
        class_names: the classes that are expected, in this order: those of the network
            or the list file that the labels must agree with.
        skip_bad: decode every image now and leave out, with a warning, those that do
            not decode. Otherwise such an image raises when it is read.

    Raises:
        FileNotFoundError: where `train/` or both of `test/` and `val/` are absent.
        ValueError: where a class is empty, the parts have other classes, or they are
            not `class_names`.
    """
    path = Path(path)
    train_dir, test_dir, val_dir = (path / part for part in ("train", "test", "val"))
    if not test_dir.is_dir() and val_dir.is_dir():
        test_dir = val_dir
    for wanted in (train_dir, test_dir):
        if not wanted.is_dir():
            raise FileNotFoundError(
                f"{path}: found {_names(path)}, expected the folder {wanted.name}/ "
                "with one folder per class"
            )
    names = _class_folders(train_dir)
    if not names:
        raise ValueError(f"{train_dir}: found no folder, expected one per class")
    parts = {"train": train_dir, "test": test_dir}
    if val_dir.is_dir() and val_dir != test_dir:
        parts["validation"] = val_dir
    for folder in parts.values():
        other = _class_folders(folder)
        if other != names:
            raise ValueError(
                f"{path}: train and {folder.name} have other classes; only train: "
                f"{sorted(set(names) - set(other))}, only {folder.name}: "
                f"{sorted(set(other) - set(names))}"
            )
    if class_names is not None:
        check_classes(names, class_names, where=train_dir)
    sources = {
        part: _folder_source(folder, names, skip_bad=skip_bad)
        for part, folder in parts.items()
    }
    # Called as it was asked for, also where a link leads elsewhere.
    name = os.path.basename(os.path.abspath(path))
    return Domain(name, tuple(names), **sources)


def check_classes(
    found: Sequence[str], expected: Sequence[str], *, where: Path
) -> None:
    """Refuse classes that are not the expected ones in the expected order.

    Raises:
        ValueError: names what is missing, what is too many, or the first place where
            the order differs.
    """
    if list(found) == list(expected):
        return
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{where}: found {len(found)} classes, expected {len(expected)}; missing: "
            f"{missing[:5]}, unknown: {unknown[:5]}"
        )
    place = next(
        n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b
    )
    raise ValueError(
        f"{where}: class {place} is {found[place]!r}, expected {expected[place]!r}; "
        "the classes are in another order, so labels would mean other things: rename "
        "the folders so that they sort as expected, or expect this order"
    )


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _class_folders(folder: Path) -> list[str]:
    return [n for n in _names(folder) if n[0] != "." and (folder / n).is_dir()]


def _folder_source(
    folder: Path, class_names: Sequence[str], *, skip_bad: bool
) -> FileSource:
    kept: list[Path] = []
    labels: list[int] = []
    skipped: list[Path] = []
    for label, name in enumerate(class_names):
        paths = sorted(
            p
            for p in (folder / name).rglob("*")
            if p.suffix.lower() in _SUFFIXES
            and not any(n[0] == "." for n in p.relative_to(folder).parts)
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
    return FileSource(kept, labels, skipped=skipped)


def _undecodable(paths: Sequence[Path]) -> list[Path]:
    def is_bad(path: Path) -> bool:
        try:
            decode_file(path)
        except ValueError as error:
            _LOG.warning("skipped: %s", error)
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return [p for p, bad in zip(paths, pool.map(is_bad, paths), strict=True) if bad]
