"""CUB-200-2011 and Stanford Cars as their authors publish them, cut to the object.

ImageNet-to-Sketch uses crops of both sets that an archive holds ready-made (folders
`cubs_cropped` and `stanford_cars_cropped`, read by `load_folder`). These readers make
such crops from the original files, as each image is read; the margin of the archive's
crops is not documented, so the two need not agree in every pixel.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Int32, Num

from ftn_jax.data.domain import Domain
from ftn_jax.data.files import FileSource, read_lines, require_files
from ftn_jax.data.folders import check_classes
from ftn_jax.data.stored import read_mat


def load_cub(root: str | Path, *, crop: bool = True, margin: float = 0.0) -> Domain:
    """Read CUB-200-2011: 200 kinds of birds.

    Args:
        root: the folder with `images.txt`, `images/`, ... (`CUB_200_2011`).
        crop: cut every image to its bounding box.
        margin: widen each side of the box by this share of its size.

    Raises:
        FileNotFoundError: where a table or an image is absent.
        ValueError: where a table cannot be read or does not match the others, or the
            classes are not in the order of their folders; the message names the file.

    Source: Wah et al. 2011, "The Caltech-UCSD Birds-200-2011 Dataset".
    """
    root = Path(root)
    names = _table(root / "classes.txt", columns=2)
    check_classes(
        [f for _, f in names], sorted(f for _, f in names), where=root / "classes.txt"
    )
    place = {number: n for n, (number, _) in enumerate(names)}
    files = _table(root / "images.txt", columns=2)
    ids = [number for number, _ in files]
    labels = _column(root / "image_class_labels.txt", ids)
    training = _column(root / "train_test_split.txt", ids)
    x, y, w, h = (
        np.array(values, float)
        for values in zip(
            *_rows(root / "bounding_boxes.txt", ids, columns=5), strict=True
        )
    )
    path = root / "image_class_labels.txt"
    if unknown := sorted(set(labels) - set(place)):
        raise ValueError(f"{path}: classes {unknown[:5]} are not in classes.txt")
    paths = [root / "images" / file for _, file in files]
    for (_, file), label in zip(files, labels, strict=True):
        folder = file.split("/")[0]
        if folder != names[place[label]][1]:
            raise ValueError(
                f"{path}: {file} has class {label}, which classes.txt calls "
                f"{names[place[label]][1]!r}; the files do not belong together"
            )
    return _domain(
        "cub",
        tuple(name for _, name in names),
        paths,
        np.array([place[label] for label in labels]),
        _boxes(x, y, x + w, y + h, margin) if crop else None,
        train=np.array(training) == "1",
        listed_in=root / "images.txt",
        advice="extract CUB_200_2011.tgz whole",
    )


def load_cars(root: str | Path, *, crop: bool = True, margin: float = 0.0) -> Domain:
    """Read Stanford Cars: 196 models of cars.

    Args:
        root: the folder with `devkit/`, `cars_train/`, `cars_test/` and
            `cars_test_annos_withlabels.mat` (or the latter in `devkit/`).
        crop: cut every image to its bounding box.
        margin: widen each side of the box by this share of its size.

    Raises:
        FileNotFoundError: where a table or an image is absent.
        ValueError: where a table cannot be read; the message names the file.

    Source: Krause et al. 2013, "3D Object Representations for Fine-Grained
    Categorization".
    """
    root = Path(root)
    devkit = root / "devkit"
    with_labels = root / "cars_test_annos_withlabels.mat"
    if not with_labels.is_file():
        with_labels = devkit / with_labels.name
    names = tuple(
        str(n) for n in _matlab(devkit / "cars_meta.mat", "class_names").ravel()
    )
    paths: list[Path] = []
    labels: list[int] = []
    corners: list[list[int]] = []
    train: list[bool] = []
    for part, path in (
        ("cars_train", devkit / "cars_train_annos.mat"),
        ("cars_test", with_labels),
    ):
        annotations = _matlab(path, "annotations").ravel()
        fields = ("fname", "class", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        if missing := sorted(set(fields) - set(annotations.dtype.names or ())):
            raise ValueError(
                f"{path}: the annotations lack {missing}; for the test set get "
                "cars_test_annos_withlabels.mat, not cars_test_annos.mat"
            )
        for entry in annotations:
            paths.append(root / part / str(entry["fname"]))
            labels.append(int(entry["class"]) - 1)
            corners.append([int(entry[field]) for field in fields[2:]])
            train.append(part == "cars_train")
    left, top, right, bottom = np.array(corners, float).T
    return _domain(
        "cars",
        names,
        paths,
        np.array(labels),
        # Corners are counted from 1, and the last one belongs to the box.
        _boxes(left - 1, top - 1, right, bottom, margin) if crop else None,
        train=np.array(train),
        listed_in=devkit,
        advice="extract cars_train.tgz and cars_test.tgz whole",
    )


def _domain(
    name: str,
    class_names: tuple[str, ...],
    paths: list[Path],
    labels: np.ndarray,
    boxes: np.ndarray | None,
    *,
    train: np.ndarray,
    listed_in: Path,
    advice: str,
) -> Domain:
    require_files(paths, listed_in=listed_in, advice=advice)
    sources = {}
    for part, chosen in (("train", train), ("test", ~train)):
        indices = np.flatnonzero(chosen)
        if not len(indices):
            raise ValueError(f"{listed_in}: no image belongs to the part {part!r}")
        sources[part] = FileSource(
            [paths[n] for n in indices],
            labels[indices],
            boxes=None if boxes is None else boxes[indices],
        )
    return Domain(name, class_names, **sources)


def _boxes(
    left: Num[np.ndarray, " n"],
    top: Num[np.ndarray, " n"],
    right: Num[np.ndarray, " n"],
    bottom: Num[np.ndarray, " n"],
    margin: float,
) -> Int32[np.ndarray, "n 4"]:
    wide, high = margin * (right - left), margin * (bottom - top)
    corners = [left - wide, top - high, right + wide, bottom + high]
    return np.rint(np.stack(corners, axis=1)).astype(np.int32)


def _table(path: Path, *, columns: int) -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; extract the archive whole")
    rows = []
    for number, text in enumerate(read_lines(path), 1):
        if not text.strip():
            continue
        row = text.split()
        if len(row) != columns:
            raise ValueError(
                f"{path}, line {number}: found {text!r}, expected {columns} columns"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: found no line; extract the archive again")
    return rows


def _rows(path: Path, ids: list[str], *, columns: int) -> list[list[str]]:
    """Give a table's values in the order of `ids`, which its first column holds."""
    by_id = {row[0]: row[1:] for row in _table(path, columns=columns)}
    if missing := [number for number in ids if number not in by_id]:
        raise ValueError(
            f"{path}: {len(missing)} of {len(ids)} images have no line, the first is "
            f"image {missing[0]} of images.txt; extract the archive again"
        )
    return [by_id[number] for number in ids]


def _column(path: Path, ids: list[str]) -> list[str]:
    return [value for (value,) in _rows(path, ids, columns=2)]


def _matlab(path: Path, key: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; extract the devkit whole")
    return read_mat(path, key, squeeze=True)
