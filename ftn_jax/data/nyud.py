"""NYUD-MT as published, in either archive: four truths for each of 1,449 rooms.

Two archives hold one data set in two formats, told apart by their files' endings:

| truth | ASTMT / RCM (`NYUD_MT.tgz`, `NYUD_MT.zip`) | re-pack at 480x640 |
|---|---|---|
| `edge/` | `.png`, uint8 0 or 255 | `.npy` |
| `segmentation/` | `.mat`, key `segmentation`, 0 to 40 | `.png` |
| `normals/` | `.jpg`, RGB = (n + 1) * 127.5 | `.npy`, vectors |
| `depth/` | `.mat`, key `depth`, metres, 0 missing | `.npy` |

Both have `images/ID.jpg` and `gt_sets/{train,val}.txt` with one id a line (795, 654).

Sources: Maninis et al. (arXiv 1904.08918), Kanakis et al. (arXiv 2007.12540),
Vandenhende et al. (arXiv 2004.13379) with their data archives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ftn_jax.data.domain import DenseExample
from ftn_jax.data.files import read_lines
from ftn_jax.data.stored import read_mat, read_npy

Split = Literal["train", "val"]
NYUD_TARGETS = ("semseg", "depth", "normals", "edge")
NYUD_CLASSES = 41
"""The background, 0, is one of them."""
_FOLDERS = {"semseg": "segmentation"}
_ENDINGS = {
    "semseg": (".mat", ".png"),
    "depth": (".mat", ".npy"),
    "normals": (".jpg", ".npy"),
    "edge": (".png", ".npy"),
}


class NYUDFolder:
    """Reads the examples of one split, each time one is asked for.

    Args:
        root: the folder that holds `gt_sets/` and `images/`.
        split: "train" or "val".
        targets: which truths to read.

    Raises:
        FileNotFoundError: where the list of ids, a picture or a truth is missing.
        ValueError: where the list is empty or a target is unknown.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        *,
        targets: Sequence[str] = NYUD_TARGETS,
    ):
        self.root, self.targets = Path(root), tuple(targets)
        if unknown := [name for name in targets if name not in _ENDINGS]:
            raise ValueError(f"targets {unknown}: unknown, known are {NYUD_TARGETS}")
        listed = self.root / "gt_sets" / f"{split}.txt"
        if not listed.is_file():
            raise FileNotFoundError(f"{listed}: missing, expected one id a line")
        self.ids = " ".join(read_lines(listed)).split()
        if not self.ids:
            raise ValueError(f"{listed}: found no id, expected one a line")
        self._files = [
            {"image": self._image(name)}
            | {target: self._truth(target, name) for target in targets}
            for name in self.ids
        ]
        self.labels = np.zeros(len(self.ids), np.int32)

    def _image(self, name: str) -> Path:
        path = self.root / "images" / f"{name}.jpg"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, expected by gt_sets/")
        return path

    def _truth(self, target: str, name: str) -> Path:
        folder = self.root / _FOLDERS.get(target, target)
        found = [p for end in _ENDINGS[target] if (p := folder / (name + end)).exists()]
        if not found:
            raise FileNotFoundError(
                f"{folder / name}: missing, expected one of {_ENDINGS[target]}"
            )
        return found[0]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    def __getitem__(self, index: int, /) -> DenseExample:
        """Read the example at `index`.

        Depth that is not finite becomes 0 (missing), normals alike.

        Raises:
            ValueError: where a file cannot be read, has no such key, values out of
                range, or another size than the picture; names it.
        """
        files = self._files[index]
        image = _picture(files["image"])
        targets = {name: _READERS[name](files[name]) for name in self.targets}
        for name, array in targets.items():
            if array.shape[:2] != image.shape[:2]:
                raise ValueError(
                    f"{files[name]}: found size {array.shape[:2]}, expected "
                    f"{image.shape[:2]} as in {files['image']}"
                )
        return DenseExample(image, targets)


def _picture(path: Path, mode: str = "RGB") -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return np.asarray(opened if mode == "" else opened.convert(mode))
    except Exception as error:  # decoders meet damage with errors of any kind
        raise ValueError(f"{path}: does not decode ({error})") from error


def _values(path: Path, key: str) -> np.ndarray:
    """Read an `.npy` array, or one entry of a `.mat` file."""
    return read_npy(path) if path.suffix == ".npy" else read_mat(path, key)


def _semseg(path: Path) -> np.ndarray:
    found = (
        _picture(path, "") if path.suffix == ".png" else _values(path, "segmentation")
    )
    labels = found.astype(np.int32)
    if found.ndim != 2 or not np.isin(labels, [*range(NYUD_CLASSES), 255]).all():
        raise ValueError(
            f"{path}: found {found.shape} with values {labels.min()}..{labels.max()}, "
            "expected (h, w) with 0..40 or 255"
        )
    return labels


def _depth(path: Path) -> np.ndarray:
    depth = np.squeeze(_values(path, "depth")).astype(np.float32)
    depth = np.where(np.isfinite(depth), depth, np.float32(0))
    return _up_to(np.inf, depth, path, "metres, 0 where missing")


def _normals(path: Path) -> np.ndarray:
    if path.suffix == ".jpg":
        return 2 * _picture(path).astype(np.float32) / 255 - 1
    normals = read_npy(path).astype(np.float32)
    return np.where(np.isfinite(normals).all(-1, keepdims=True), normals, np.float32(0))


def _edge(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return _picture(path, "L").astype(np.float32) / 255
    edge = np.squeeze(read_npy(path)).astype(np.float32)
    return _up_to(1, edge, path, "1 on edges")


def _up_to(most: float, array: np.ndarray, path: Path, meaning: str) -> np.ndarray:
    if not ((array >= 0) & (array <= most)).all():
        raise ValueError(
            f"{path}: found values {array.min():g}..{array.max():g}, expected "
            f"0..{most:g} ({meaning})"
        )
    return array


_READERS = {"semseg": _semseg, "depth": _depth, "normals": _normals, "edge": _edge}
