"""Sources of images with dense targets: arrays in memory, and BSDS500."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ftn_jax.data.domain import DenseExample, Domain, Source
from ftn_jax.data.files import decode_file
from ftn_jax.data.stored import read_mat, read_npz

ANNOTATORS = 10
"""Room for the annotators' maps of an image; BSDS500 has 4 to 9."""
_SPLITS = ("train", "val", "test")


class DenseArrays:
    """Holds images of one size and their targets in memory.

    Args:
        images: uint8, three channels.
        targets: by name, one map for each image, of the images' height and width.

    Raises:
        ValueError: where dtypes, shapes or lengths are not as above.
    """

    def __init__(
        self, images: UInt8[np.ndarray, "n h w 3"], targets: Mapping[str, np.ndarray]
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images: found {images.dtype} of shape {images.shape}, expected uint8 "
                "of shape (n, h, w, 3)"
            )
        if not len(images):
            raise ValueError("found no example, expected at least one")
        for name, maps in targets.items():
            if maps.shape[:3] != images.shape[:3]:
                raise ValueError(
                    f"{name}: found shape {maps.shape}, expected {images.shape[:3]} "
                    "in front"
                )
        self.images, self.targets = images, dict(targets)
        self.labels = np.zeros(len(images), np.int32)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.images)

    def __getitem__(self, index: int, /) -> DenseExample:
        """Give the example at `index`."""
        targets = {name: maps[index] for name, maps in self.targets.items()}
        return DenseExample(self.images[index], targets)


class BSDSFolder:
    """Reads BSDS500's images and its annotators' boundaries as they are published.

    Targets are "edge", the mean of the annotators' maps, and "annotators", (h, w, 10)
    with 255 where there are fewer. Portraits are turned to landscape on request, so
    that all images have one size.

    Args:
        root: the folder that holds `images/` and `groundTruth/`.
        splits: "train", "val", "test".
        landscape: turn portraits by a quarter.

    Raises:
        FileNotFoundError: where a folder or a truth is missing; names it.

    Source: Arbelaez et al. (2011), the archive BSR_bsds500.tgz.
    """

    def __init__(
        self,
        root: str | Path,
        splits: Sequence[str] = ("train",),
        *,
        landscape: bool = True,
    ):
        root = Path(root)
        self.landscape = landscape
        self.paths: list[tuple[Path, Path]] = []
        for split in splits:
            images = sorted((root / "images" / split).glob("*.jpg"))
            if not images:
                raise FileNotFoundError(
                    f"{root / 'images' / split}: no .jpg, expected BSDS500's folders "
                    "images/ and groundTruth/ under the root"
                )
            for image in images:
                truth = root / "groundTruth" / split / f"{image.stem}.mat"
                if not truth.exists():
                    raise FileNotFoundError(f"{truth}: missing, expected for {image}")
                self.paths.append((image, truth))
        self.labels = np.zeros(len(self.paths), np.int32)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int, /) -> DenseExample:
        """Read the example at `index`.

        Raises:
            ValueError: where a file cannot be read or sizes differ; names it.
        """
        image_path, truth_path = self.paths[index]
        image = decode_file(image_path)
        maps = _boundaries(truth_path)
        if maps.shape[:2] != image.shape[:2]:
            raise ValueError(
                f"{truth_path}: found size {maps.shape[:2]}, expected "
                f"{image.shape[:2]} as in {image_path}"
            )
        annotators = np.full((*image.shape[:2], ANNOTATORS), 255, np.uint8)
        annotators[..., : maps.shape[-1]] = maps
        targets = {"edge": maps.mean(-1, dtype=np.float32), "annotators": annotators}
        if self.landscape and image.shape[0] > image.shape[1]:
            image = np.rot90(image)
            targets = {name: np.rot90(array) for name, array in targets.items()}
        return DenseExample(image, targets)


def _boundaries(path: Path) -> UInt8[np.ndarray, "h w n"]:
    try:
        cells = read_mat(path, "groundTruth").ravel()
        maps = [np.asarray(c["Boundaries"][0, 0], np.uint8) for c in cells]
        return np.stack(maps[:ANNOTATORS], axis=-1)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path}: no BSDS500 truth ({error!r}), expected cells groundTruth with "
            "Boundaries"
        ) from error


def load_bsds(path: str | Path, *, validation: bool = False) -> Domain:
    """Read BSDS500: training and validation images to train on, its test images.

    Args:
        path: the published folder (`images/`, `groundTruth/`, perhaps below
            `BSDS500/data`), or an `.npz` file with `x_SPLIT` uint8 (n, h, w, 3) and
            `edge_SPLIT` uint8 (n, h, w, 1), the annotators' mean times 255.
        validation: keep the validation images apart, as the domain's own.

    Raises:
        FileNotFoundError: where there is no such path.
        ValueError: where the file's arrays are not as above.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / "BSDS500" / "data"
        root = inner if inner.is_dir() else path
        source = partial(_from_folder, root)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of BSDS500")
    else:
        source = _from_npz(path)
    if validation:
        parts = [source(split) for split in ("train", "test", "val")]
    else:
        parts = [source("train", "val"), source("test")]
    return Domain("edges", ("edge",), *parts)


def _from_folder(root: Path, *splits: str) -> BSDSFolder:
    return BSDSFolder(root, splits)


def _from_npz(path: Path) -> Callable[..., Source]:
    names = [f"{kind}_{split}" for split in _SPLITS for kind in ("x", "edge")]
    arrays = read_npz(path, names)

    def source(*splits: str) -> DenseArrays:
        try:
            x, edge = (
                np.concatenate([arrays[f"{kind}_{s}"] for s in splits])
                for kind in ("x", "edge")
            )
            if edge.dtype != np.uint8:
                raise ValueError(
                    f"edge: found {edge.dtype}, expected uint8, the share times 255"
                )
            return DenseArrays(x, {"edge": _share(edge[..., 0])})
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: {'+'.join(splits)}: {error}") from error

    return source


def _share(stored: UInt8[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return stored.astype(np.float32) / 255
