"""The steps of image transforms: small frozen records, called as `step(rng, image)`.

Images are channels-last. Resizing works on uint8; `Normalize` comes last and gives
float32.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from ftn_jax.data.pipeline import Step

Filter = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require(holds: bool, step: Step, expected: str) -> None:
    if not holds:
        raise ValueError(f"{step}: expected {expected}")


def _require_filter(step: "Resize | ResizeShort") -> None:
    _require(step.filter in get_args(Filter), step, f"filter in {get_args(Filter)}")


def _resize(
    image: UInt8[np.ndarray, "h w c"],
    height: int,
    width: int,
    filter: Filter = "bilinear",
) -> UInt8[np.ndarray, "height width c"]:
    if image.shape[:2] == (height, width):
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"resizing: found dtype {image.dtype}, expected uint8")
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "resizing needs Pillow: pip install 'ftn_jax[experiments]'"
        ) from error
    # Pillow knows a one-channel image only without its channel axis.
    flat = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(np.ascontiguousarray(flat)).resize(
        (width, height), Image.Resampling[filter.upper()]
    )
    return np.asarray(resized).reshape(height, width, image.shape[-1])


def _crop(
    step: Step, image: Shaped[np.ndarray, "*b h w c"], size: int, top: int, left: int
) -> Shaped[np.ndarray, "*b size size c"]:
    height, width = image.shape[-3:-1]
    if min(height, width) < size:
        raise ValueError(
            f"{step}: found an image of {height}x{width}, expected at least "
            f"{size}x{size}; resize it first"
        )
    return image[..., top : top + size, left : left + size, :]


@dataclass(frozen=True)
class Resize(Step):
    """Resizes to exactly (height, width), antialiased."""

    height: int
    width: int
    filter: Filter = "bilinear"

    def __post_init__(self):
        _require(min(self.height, self.width) >= 1, self, "height, width >= 1")
        _require_filter(self)

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Resize one uint8 image; one of that size is returned as it is."""
        return _resize(image, self.height, self.width, self.filter)


@dataclass(frozen=True)
class ResizeShort(Step):
    """Resizes so that the shorter side is `size`, keeping the aspect; antialiased."""

    size: int
    filter: Filter = "bilinear"

    def __post_init__(self):
        _require(self.size >= 1, self, "size >= 1")
        _require_filter(self)

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Resize one uint8 image."""
        height, width = image.shape[:2]
        short = min(height, width)
        wanted = self.size * height // short, self.size * width // short
        return _resize(image, *wanted, self.filter)


@dataclass(frozen=True)
class CenterCrop(Step):
    """Cuts the middle (size, size)."""

    stackable = True
    size: int

    def __post_init__(self):
        _require(self.size >= 1, self, "size >= 1")

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Crop one image or a stack.

        Raises:
            ValueError: where the image is smaller than `size`.
        """
        height, width = image.shape[-3:-1]
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return _crop(self, image, self.size, top, left)


@dataclass(frozen=True)
class RandomCrop(Step):
    """Cuts (size, size) at a random place, after `padding` zeros on every side."""

    random = True
    size: int
    padding: int = 0

    def __post_init__(self):
        _require(self.size >= 1, self, "size >= 1")
        _require(self.padding >= 0, self, "padding >= 0")

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Crop one image.

        Raises:
            ValueError: where the padded image is smaller than `size`.
        """
        pad = self.padding
        if pad:
            height, width, channels = image.shape
            # np.pad gives the same, ten times slower.
            padded = np.zeros(
                (height + 2 * pad, width + 2 * pad, channels), image.dtype
            )
            padded[pad : pad + height, pad : pad + width] = image
            image = padded
        spare_rows, spare_columns = (max(0, n - self.size) for n in image.shape[:2])
        top = int(rng.integers(spare_rows + 1))
        left = int(rng.integers(spare_columns + 1))
        return _crop(self, image, self.size, top, left)


@dataclass(frozen=True)
class RandomResizedCrop(Step):
    """Cuts a random area of random aspect and resizes it to (size, size).

    The area is a uniform share of the image in `scale`, the aspect (width / height)
    log-uniform in `ratio`. After ten draws that do not fit, the largest middle cut
    with an aspect within `ratio` is taken.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6; the ten
    draws and the fallback as in torchvision.
    """

    random = True
    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        _require(self.size >= 1, self, "size >= 1")
        low, high = self.scale
        _require(0 < low <= high <= 1, self, "0 < scale[0] <= scale[1] <= 1")
        low, high = self.ratio
        _require(0 < low <= high, self, "0 < ratio[0] <= ratio[1]")

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Crop and resize one uint8 image."""
        height, width = image.shape[:2]
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(log_low, log_high))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                top = rng.integers(height - h + 1)
                left = rng.integers(width - w + 1)
                break
        else:
            aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
            h = max(1, min(height, round(width / aspect)))
            w = max(1, min(width, round(height * aspect)))
            top, left = (height - h) // 2, (width - w) // 2
        return _resize(image[top : top + h, left : left + w], self.size, self.size)


@dataclass(frozen=True)
class Flip(Step):
    """Mirrors left and right with a probability."""

    random = True
    probability: float = 0.5

    def __post_init__(self):
        _require(0 <= self.probability <= 1, self, "0 <= probability <= 1")

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Flip one image, or return it as it is."""
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclass(frozen=True)
class Shift(Step):
    """Moves the image by up to `max_px` pixels each way, repeating its edge."""

    random = True
    max_px: int

    def __post_init__(self):
        _require(self.max_px >= 0, self, "max_px >= 0")

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Shift one image."""
        height, width = image.shape[:2]
        down, right = rng.integers(-self.max_px, self.max_px + 1, size=2)
        rows = np.clip(np.arange(height) - down, 0, height - 1)
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        return image[rows[:, None], columns]


@dataclass(frozen=True)
class ToRGB(Step):
    """Repeats a single channel three times."""

    stackable = True

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Give one image or a stack three channels; three are left as they are.

        Raises:
            ValueError: where there are neither one nor three channels.
        """
        if image.shape[-1] not in (1, 3):
            raise ValueError(f"ToRGB: found shape {image.shape}, expected 1 or 3 last")
        return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


@dataclass(frozen=True)
class Normalize(Step):
    """Maps uint8 x to float32 (x / 255 - mean) / std, channel by channel.

    `mean` and `std` have one value per channel, or one for all. The default gives
    x / 255.
    """

    stackable = True
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        _require(
            len(self.mean) == len(self.std) > 0, self, "mean and std of one length"
        )
        _require(min(self.std) > 0, self, "std > 0")

    def __call__(
        self, rng: np.random.Generator, image: UInt8[np.ndarray, "*b h w c"]
    ) -> Float32[np.ndarray, "*b h w c"]:
        """Normalize one image or a stack.

        Raises:
            ValueError: where the image is not uint8 or has other channels.
        """
        if image.dtype != np.uint8:
            raise ValueError(f"{self}: found dtype {image.dtype}, expected uint8")
        width, channels = image.shape[-2:]
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"{self}: found {channels} channels, expected {len(self.mean)}; is "
                "ToRGB missing before it?"
            )
        # One affine map over whole rows: a last axis of 3 would be a slow inner loop.
        repeats = width * channels // len(self.mean)
        std = np.asarray(self.std, np.float64)
        slope = np.tile((1 / (255 * std)).astype(np.float32), repeats)
        offset = np.tile((-np.asarray(self.mean) / std).astype(np.float32), repeats)
        rows = image.reshape(*image.shape[:-2], width * channels).astype(np.float32)
        rows *= slope
        rows += offset
        return rows.reshape(image.shape)
