"""Small files of pictures for tests of readers."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: Path, value, *, size=(6, 5), mode="RGB") -> Path:
    """Write a picture of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def save_ramp(path: Path, *, size=(12, 10)) -> Path:
    """Write a picture whose channels 0 and 1 tell a pixel's column and row."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


FER_PARTS = ("Training", "Training", "PublicTest", "PrivateTest")


def fer_pixels(value, count=48 * 48):
    return " ".join([str(value)] * count)


def write_fer2013(path, header="emotion,pixels,Usage", row="{e},{p},{u}", **changes):
    """Write FER2013's table: row k shows emotion k, and gray 10 k all over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"e": k, "p": fer_pixels(10 * k), "u": part} | changes.get(f"row{k}", {})
        for k, part in enumerate(FER_PARTS)
    ]
    path.write_text("\n".join([header, *(row.format(**r) for r in rows)]) + "\n")
    return path
