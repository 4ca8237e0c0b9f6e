"""Image files as a source: decoded by Pillow, one at a time, when asked for."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from ftn_jax.data.domain import Example


class FileSource:
    """Decodes image files to RGB, each time one is asked for.

    Attributes:
        paths: the files, in order.
        labels: their classes.
        boxes: what to cut out of each image before all else, or `None`: columns left,
            top, right, bottom in pixels of the stored image, right and bottom
            excluded; what reaches beyond the image is clipped.
        skipped: files that were left out because they do not decode.
    """

    paths: tuple[Path, ...]
    labels: Int32[np.ndarray, " n"]
    boxes: Int32[np.ndarray, "n 4"] | None
    skipped: tuple[Path, ...]

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Integer[np.ndarray, " n"] | Sequence[int],
        *,
        boxes: Integer[np.ndarray, "n 4"] | Sequence[Sequence[int]] | None = None,
        skipped: Sequence[Path] = (),
    ):
        self.paths = tuple(paths)
        self.labels = np.asarray(labels, np.int32)
        self.boxes = None if boxes is None else np.asarray(boxes, np.int32)
        self.skipped = tuple(skipped)
        n = len(self.paths)
        if self.labels.shape != (n,):
            raise ValueError(
                f"labels: found shape {self.labels.shape}, expected ({n},), one for "
                "each file"
            )
        if self.boxes is not None and self.boxes.shape != (n, 4):
            raise ValueError(
                f"boxes: found shape {self.boxes.shape}, expected ({n}, 4): left, "
                "top, right, bottom for each file"
            )

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Example:
        """Decode the image at `index`.

        Raises:
            ValueError: where the file does not decode, or its box holds no pixel; the
                message names it.
        """
        box = None if self.boxes is None else self.boxes[index]
        image = decode_file(self.paths[index], box=box)
        return Example(image, int(self.labels[index]))


def read_lines(path: Path) -> list[str]:
    """Read a table's or a list's lines.

    Raises:
        ValueError: where the file is no text in UTF-8; the message names it.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: no text in UTF-8 ({error}); get the file again"
        ) from error


def require_files(paths: Sequence[Path], *, listed_in: Path, advice: str) -> None:
    """Refuse a list of files that are not all there.

    Raises:
        FileNotFoundError: counts them, names the first and says what to do.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{listed_in}: {len(missing)} of {len(paths)} images are missing, the "
            f"first is {missing[0]}; {advice}"
        )


def decode_file(
    path: Path, *, box: Int32[np.ndarray, "4"] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image file to RGB, as `FileSource` does.

    Raises:
        ValueError: see `FileSource.__getitem__`.
    """
    return _decode(path, str(path), box=box, mode="RGB")


def decode_bytes(
    content: bytes, *, name: str, mode: str = "RGB"
) -> UInt8[np.ndarray, "h w c"]:
    """Read an encoded image from memory; `name` stands for it in errors.

    Args:
        content: a JPEG, PNG, ... file.
        name: what an error calls it.
        mode: `"RGB"`, or `"L"` for one channel.

    Raises:
        ValueError: where it does not decode.
    """
    return _decode(io.BytesIO(content), name, box=None, mode=mode)


def _decode(
    file: Path | io.BytesIO,
    name: str,
    *,
    box: Int32[np.ndarray, "4"] | None,
    mode: str,
) -> UInt8[np.ndarray, "h w c"]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "image files need Pillow: pip install 'ftn_jax[experiments]'"
        ) from error
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # converting 16 or 32 bits would clip them
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            # Boxes are drawn on the stored pixels, before a camera's turn.
            part = image if box is None else _cut(image, box)
            pixels = np.asarray(ImageOps.exif_transpose(part).convert(mode))
    # Decoders meet damage with errors of nearly any kind.
    except Exception as error:
        raise ValueError(
            f"{name}: does not decode as an image ({error}); get the file again, or "
            "remove it (load_folder leaves such files out with skip_bad=True)"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _cut(image, box: Int32[np.ndarray, "4"]):
    left, top = np.maximum(box[:2], 0).tolist()
    right, bottom = np.minimum(box[2:], image.size).tolist()
    if right <= left or bottom <= top:
        raise ValueError(
            f"the box {box.tolist()} (left, top, right, bottom) holds no pixel of "
            f"{image.size[0]}x{image.size[1]} (width x height)"
        )
    return image.crop((left, top, right, bottom))
