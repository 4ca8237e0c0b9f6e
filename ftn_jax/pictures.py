"""Pictures of images: grids, labelled rows, and curves of what happened in training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


def to_uint8(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Turn values between -1 and 1 into pixels; what lies outside is cut."""
    return np.rint(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)


def draw_grid(
    rows: Mapping[str, Float[np.ndarray, "n h w 3"]], path: Path, *, zoom: int = 2
) -> None:
    """Draw one row of images under each label, and write the picture.

    Args:
        rows: label to images between -1 and 1, all of one number and size.
        path: of the PNG.
        zoom: every pixel becomes a square of so many.

    Raises:
        ValueError: if there is no row, or the rows differ in shape.
    """
    from PIL import Image, ImageDraw

    shapes = {label: np.shape(images) for label, images in rows.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"a grid needs rows of one shape, found {shapes}")
    n, h, w, _ = next(iter(shapes.values()))
    gap, text = 2, 14
    tall, wide = h * zoom + gap, w * zoom + gap
    canvas = Image.new("RGB", (n * wide, len(rows) * (tall + text)), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows.items()):
        top = r * (tall + text)
        pen.text((1, top), label, fill="black")
        for c, pixels in enumerate(to_uint8(images)):
            tile = Image.fromarray(pixels).resize(
                (w * zoom, h * zoom), Image.Resampling.NEAREST
            )
            canvas.paste(tile, (c * wide, top + text))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    x: str = "step",
    y: str,
    title: str = "",
) -> None:
    """Draw a line for each label through its points `(x, y)`, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, points in curves.items():
        axes.plot(*np.transpose(points), label=label)
    options: Any = {"xlabel": x, "ylabel": y, "title": title}
    axes.set(**options)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
