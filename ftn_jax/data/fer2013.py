"""FER2013: facial expressions, 48x48 gray, in one table of text."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ftn_jax.data.domain import ArraySource, Domain

CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""Class names in the order of the column `emotion`."""
PIXELS = 48
"""Height and width of every image."""
FILES = ("fer2013.csv", "icml_face_data.csv")
"""Names of the files that hold all three parts with their labels."""
_PARTS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}


def load_fer2013(path: str | Path) -> Domain:
    """Read `fer2013.csv` or `icml_face_data.csv`, columns emotion, pixels and Usage.

    `Training` trains, `PublicTest` is the validation part, `PrivateTest` the test.

    Args:
        path: the file, or the folder that holds one of the two.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where a column, a part or a pixel is missing or out of range; the
            message names the file and the line.

    Source: Goodfellow et al. 2013, "Challenges in Representation Learning".
    """
    path = find_fer2013(path)
    images: dict[str, list[bytes]] = {part: [] for part in _PARTS}
    labels: dict[str, list[int]] = {part: [] for part in _PARTS}
    rows = _rows(path)
    # The second file writes a space after every comma of its header.
    header = [name.strip() for name in next(rows, (1, []))[1]]
    if missing := sorted({"emotion", "pixels", "Usage"} - set(header)):
        raise ValueError(
            f"{path}: found columns {header}, expected also {missing}; train.csv "
            f"and test.csv of the same archive lack them: use {FILES[0]}"
        )
    emotion, pixels, usage = map(header.index, ("emotion", "pixels", "Usage"))
    for number, row in rows:
        try:
            part = row[usage].strip()
            images[part].append(_image(row[pixels]))
            labels[part].append(_label(row[emotion]))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: {_problem(error)}; get the file again"
            ) from error
    if empty := [part for part in _PARTS if not labels[part]]:
        raise ValueError(
            f"{path}: found no row with Usage {empty}, expected all of {[*_PARTS]}; "
            "is the file cut off?"
        )
    sources = {
        name: ArraySource(
            np.frombuffer(b"".join(images[part]), np.uint8).reshape(
                -1, PIXELS, PIXELS, 1
            ),
            labels[part],
        )
        for part, name in _PARTS.items()
    }
    return Domain("fer2013", CLASSES, **sources)


def find_fer2013(path: str | Path) -> Path:
    """Find the table: the path itself, or one of `FILES` in that folder.

    Raises:
        FileNotFoundError: where there is none; says where to get it.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{path}: no such file, nor a folder with {' or '.join(FILES)}; get it from "
        "the Kaggle challenge 'challenges-in-representation-learning-facial-"
        "expression-recognition-challenge' and extract it there"
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the number of its line."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 20))
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        try:
            for row in rows:
                yield rows.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, after line {rows.line_num}: {error}; get the file again"
            ) from error


def _image(text: str) -> bytes:
    image = bytes(map(int, text.split()))
    if len(image) != PIXELS * PIXELS:
        raise ValueError(f"found {len(image)} pixels, expected {PIXELS * PIXELS}")
    return image


def _label(text: str) -> int:
    label = int(text)
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"found emotion {label}, expected 0..{len(CLASSES) - 1}")
    return label


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"found Usage {error}, expected one of {[*_PARTS]}"
    return "the row is too short" if isinstance(error, IndexError) else str(error)
