"""Steps that change an image and its dense targets together.

They work on a dict: "image" uint8 (h, w, 3) and any of "semseg" (classes, 255 nothing),
"edge" (0 to 1, 255 nothing), "annotators" (0 or 1, 255 nothing), "depth" (metres, 0
nothing), "normals" (unit vectors, 0 nothing), "inside" (1 where the picture is).

Source: RCM (arXiv 2007.12540), the order scale, pad and crop, flip.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ftn_jax.data.pipeline import Step

FILL: Mapping[str, Any] = {
    "image": (123, 116, 103),
    "semseg": 255,
    "edge": 255,
    "annotators": 255,
    "depth": 0,
    "normals": 0,
    "inside": 0,
}
"""What stands in the padding."""
SMOOTH = ("image", "depth", "normals")
"""What is resized bilinearly; all else takes the nearest pixel."""


def resize_bilinear(
    array: Shaped[np.ndarray, "h w *c"], height: int, width: int
) -> Shaped[np.ndarray, "height width *c"]:
    """Resize between pixel centres without antialiasing (OpenCV's `INTER_LINEAR`)."""
    smooth = array.astype(np.float32)
    for axis, size in enumerate((height, width)):
        old = smooth.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).astype(np.float32)
        share = share.reshape(-1, *[1] * (smooth.ndim - 1 - axis))
        smooth = smooth.take(low, axis) * (1 - share) + smooth.take(high, axis) * share
    if array.dtype == np.uint8:
        return np.rint(smooth).astype(np.uint8)
    return smooth.astype(array.dtype)


def resize_nearest(
    array: Shaped[np.ndarray, "h w *c"], height: int, width: int
) -> Shaped[np.ndarray, "height width *c"]:
    """Take the pixel at floor(i * old / new) (OpenCV's `INTER_NEAREST`)."""
    rows, columns = (
        (np.arange(size) * old // size)
        for size, old in zip((height, width), array.shape, strict=False)
    )
    return array[rows[:, None], columns]


@dataclass(frozen=True)
class JointScale(Step):
    """Resizes by one of some factors; what is twice as large is half as far away.

    Depth is divided by the factor. Missing depth and normals (0) mix into their
    neighbours, and normals keep whatever length that gives, as published.
    """

    random = True
    factors: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)

    def __post_init__(self):
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"{self}: expected factors > 0")

    def __call__(self, rng: np.random.Generator, image: Any) -> Any:
        """Resize one example."""
        factor = self.factors[rng.integers(len(self.factors))]
        if factor == 1:
            return image
        height, width = (max(1, int(n * factor)) for n in image["image"].shape[:2])
        scaled = {}
        for name, array in image.items():
            resize = resize_bilinear if name in SMOOTH else resize_nearest
            scaled[name] = resize(array, height, width)
        if "depth" in scaled:
            scaled["depth"] = scaled["depth"] / np.float32(factor)
        return scaled


class _PadAndCrop(Step):
    """Pads around the middle to at least (height, width), then cuts that size."""

    height: int
    width: int

    @abstractmethod
    def _places(self, rng: np.random.Generator, spare: tuple[int, int]) -> list[int]:
        """Say where the cut begins: top and left, each within `spare`."""

    def __post_init__(self):
        if min(self.height, self.width) < 1:
            raise ValueError(f"{self}: expected height, width >= 1")

    def __call__(self, rng: np.random.Generator, image: Any) -> Any:
        """Pad and crop one example."""
        size = (self.height, self.width)
        found = image["image"].shape[:2]
        image = {"inside": np.ones(found, np.uint8), **image}
        lack = [max(0, n - m) for n, m in zip(size, found, strict=True)]
        spare = (max(0, found[0] - size[0]), max(0, found[1] - size[1]))
        top, left = self._places(rng, spare)
        result = {}
        for name, array in image.items():
            if any(lack):
                shape = [m + n for m, n in zip(found, lack, strict=True)]
                padded = np.empty((*shape, *array.shape[2:]), array.dtype)
                padded[...] = FILL[name]
                down, right = (n // 2 for n in lack)
                padded[down : down + found[0], right : right + found[1]] = array
                array = padded
            result[name] = array[top : top + size[0], left : left + size[1]]
        return result


@dataclass(frozen=True)
class JointCrop(_PadAndCrop):
    """Pads around the middle to at least (height, width), cuts a random part."""

    random = True
    height: int
    width: int

    def _places(self, rng: np.random.Generator, spare: tuple[int, int]) -> list[int]:
        return [int(rng.integers(n + 1)) for n in spare]


@dataclass(frozen=True)
class JointPad(_PadAndCrop):
    """Pads around the middle to (height, width); nothing is cut off."""

    height: int
    width: int

    def _places(self, rng: np.random.Generator, spare: tuple[int, int]) -> list[int]:
        if any(spare):
            raise ValueError(
                f"{self}: found an image larger by {spare}, expected none; set the "
                "size of evaluation to the largest image's"
            )
        return [0, 0]


@dataclass(frozen=True)
class JointFlip(Step):
    """Mirrors left and right with a probability; normals point the other way too."""

    random = True
    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{self}: expected 0 <= probability <= 1")

    def __call__(self, rng: np.random.Generator, image: Any) -> Any:
        """Flip one example, or return it as it is."""
        if rng.random() >= self.probability:
            return image
        image = {name: array[:, ::-1] for name, array in image.items()}
        if "normals" in image:
            image["normals"] = image["normals"] * np.asarray([-1, 1, 1], np.float32)
        return image
