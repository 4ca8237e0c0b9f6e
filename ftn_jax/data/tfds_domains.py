"""Prepared TensorFlow Datasets as domains: random access, without TensorFlow.

TFDS keeps a prepared data set in ArrayRecord files, which `as_data_source` reads by
index. TensorFlow is needed only to prepare those of TFDS's own builders that write
arrays; the builders in `ftn_jax.data.builders` do without.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import numpy as np
from jaxtyping import Float, Int32, UInt8

from ftn_jax.data.domain import Domain, Example
from ftn_jax.data.files import decode_bytes
from ftn_jax.data.stored import read_npy


class TFDSSource:
    """Decodes the images of one split by Pillow, each time one is asked for.

    Args:
        builder: of a data set that is prepared in ArrayRecord files.
        split: such as `"train"`, `"train+validation"` or `"train[:10%]"`.
        image: the feature that is the picture.
        label: the feature that is its class.
        box: the feature that is a bounding box to cut out, or `None`.

    Raises:
        ValueError: where the data set has no such feature or split, or was prepared in
            a file format without random access.
    """

    labels: Int32[np.ndarray, " n"]

    def __init__(
        self,
        builder: Any,
        split: str,
        *,
        image: str = "image",
        label: str = "label",
        box: str | None = None,
    ):
        import tensorflow_datasets as tfds

        features = builder.info.features
        for name in (image, label, *([box] if box else [])):
            if name not in features:
                raise ValueError(
                    f"{builder.info.full_name}: found features {sorted(features)}, "
                    f"expected {name!r}"
                )
        self.name = f"{builder.info.full_name}, {split}"
        self._image, self._label, self._box = image, label, box
        self._mode = "L" if features[image].shape[-1] == 1 else "RGB"
        try:
            # Pillow decodes: TFDS would take OpenCV where it is installed.
            self._records = builder.as_data_source(
                split, decoders={image: tfds.decode.SkipDecoding()}
            )
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{self.name}: cannot be read by index ({error}); check the split, or "
                "prepare it again with file_format='array_record'"
            ) from error
        self.labels = self._cached_labels(builder, split)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._records)

    def __getitem__(self, index: int, /) -> Example:
        """Decode the image at `index`.

        Raises:
            ValueError: where it does not decode, or its box holds no pixel; the
                message names the split.
        """
        record = self._records[index]
        name = f"{self.name}: example {index}"
        pixels = decode_bytes(record[self._image], name=name, mode=self._mode)
        if self._box:
            pixels = _cut(pixels, np.asarray(record[self._box], float), name=name)
        return Example(pixels, int(record[self._label]))

    def _cached_labels(self, builder: Any, split: str) -> Int32[np.ndarray, " n"]:
        """Read every record once, ever: labels are kept beside the data set."""
        # Quoted, so that no two splits share a file: train[:10%] and train[-10:].
        name = f"{self._label}-{quote(split, safe='')}.npy"
        path = Path(os.fspath(builder.data_path)) / name
        if path.is_file():
            with suppress(ValueError):  # damaged: read again
                labels = read_npy(path)
                if labels.shape == (len(self),):
                    return labels
        records = map(self._records.__getitem__, range(len(self)))
        labels = np.array([record[self._label] for record in records], np.int32)
        if os.access(path.parent, os.W_OK):
            partial = path.with_name(f".{uuid4().hex}.npy")
            np.save(partial, labels)
            os.replace(partial, path)
        return labels


def load_tfds(
    name: str,
    *,
    data_dir: str | Path | None = None,
    train: str = "train",
    test: str = "test",
    validation: str | None = None,
    image: str = "image",
    label: str = "label",
    box: str | None = None,
) -> Domain:
    """Read a prepared data set of TFDS as a domain.

    Args:
        name: of the builder, with its configuration: `"domainnet/clipart"`.
        data_dir: where it was prepared; `None` is TFDS's own default.
        train: split to train on, such as `"train+validation"` for the Flowers.
        test: split to test on.
        validation: split for validation, where the data set has one.
        image: see `TFDSSource`.
        label: see `TFDSSource`.
        box: see `TFDSSource`; `"bbox"` cuts CUB and Cars to their objects.

    Raises:
        ImportError: where tensorflow-datasets is absent.
        FileNotFoundError: where the data set is not prepared; says how to.
        ValueError: see `TFDSSource`.
    """
    try:
        import tensorflow_datasets as tfds

        import ftn_jax.data.builders  # noqa: F401, ours are then known by name
    except ImportError as error:
        raise ImportError(
            "TensorFlow Datasets are read by pip install 'ftn_jax[data]'"
        ) from error
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.is_prepared():
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        raise FileNotFoundError(
            f"{builder.data_path}: {name} is not prepared; run "
            f"tfds.builder({name!r}, data_dir=..., file_format='array_record')"
            ".download_and_prepare()" + (f". First: {manual}" if manual else "")
        )
    splits = {"train": train, "test": test, "validation": validation}
    sources = {
        part: TFDSSource(builder, split, image=image, label=label, box=box)
        for part, split in splits.items()
        if split
    }
    features: Any = builder.info.features
    return Domain(name.replace("/", "_"), tuple(features[label].names), **sources)


def _cut(
    pixels: UInt8[np.ndarray, "h w c"], box: Float[np.ndarray, "4"], *, name: str
) -> UInt8[np.ndarray, "h w c"]:
    """Cut to top, left, bottom, right, each a share of the height or the width."""
    height, width = pixels.shape[:2]
    corners = np.rint(box * (height, width, height, width)).astype(int)
    top, left, bottom, right = np.maximum(corners, 0)
    cut = pixels[top:bottom, left:right]
    if not cut.size:
        raise ValueError(
            f"{name}: the box {box.tolist()} (top, left, bottom, right, as shares) "
            f"holds no pixel of {width}x{height} (width x height)"
        )
    return cut
