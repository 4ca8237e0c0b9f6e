"""Small classification domains drawn on the spot: no file to find, no download.

They show transfer on a laptop. A small network learns `embedded_source` in half a
minute; the targets keep its image size and change the rest: light on dark becomes
dark on light, shapes become textures, "which one" becomes "how many". Features frozen
after the source fall well behind there, and adapted ones do not.

What is real in them: scikit-learn's handwritten digits and two photographs, and the
fonts that come with matplotlib. Training images take their photographs from the left
of the two pictures, test images from the right.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from ftn_jax.data.domain import ArraySource, Domain, split
from ftn_jax.data.readers import load_digits

IMAGE_PX = 24
"""Height and width of every image; all have three channels."""

_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono")
_ITALIC = (
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
# Without those that a slanted font makes hard to tell from another.
_GREEK = "αβγδεζηθλμξπρσφψω"
_ANGLES = 6
_PERIODS_PX = (7.0, 4.5)
_MOST_DISCS = 6

_Images = Float[np.ndarray, "n h w 3"]
_Labels = Int[np.ndarray, " n"]
_Painter = Callable[[np.random.Generator, _Labels, _Images], _Images]


def embedded_source(seed: int = 0) -> Domain:
    """Draw the domain to pretrain on: light capital letters on dark photographs.

    26 classes, 4160 training and 1040 test images. Sans-serif fonts, any colour;
    turned by up to 20 degrees, sheared, scaled and shifted.

    Raises:
        ImportError: where matplotlib, Pillow or scikit-learn is absent.
    """
    _check_imports()
    return _draw_domain(
        "capitals", _CAPITALS, _paint_capitals, sizes=(4160, 1040), seed=seed
    )


def embedded_targets(seed: int = 0) -> tuple[Domain, ...]:
    """Give four domains to adapt to, of about 1000 training images each.

    - `digits`: scikit-learn's handwritten digits, dark on white; 10 classes. The seed
      chooses which two fifths are the test set.
    - `greek`: dark italic Greek letters over scraps of other letters; 17 classes.
    - `stripes`: gratings of 6 angles and 2 periods, on noisy photographs; 12 classes.
    - `counting`: how many discs, 1 to 6, lie among rings; 6 classes.

    Raises:
        ImportError: where matplotlib, Pillow or scikit-learn is absent.
    """
    _check_imports()
    stripes = [
        f"{180 * angle // _ANGLES} degrees, {period:g} px"
        for period in _PERIODS_PX
        for angle in range(_ANGLES)
    ]
    counts = [str(count) for count in range(1, _MOST_DISCS + 1)]
    sizes = (1024, 600)
    return (
        _digits(seed),
        _draw_domain("greek", _GREEK, _paint_greek, sizes=sizes, seed=seed),
        _draw_domain("stripes", stripes, _paint_stripes, sizes=sizes, seed=seed),
        _draw_domain("counting", counts, _paint_counting, sizes=sizes, seed=seed),
    )


def _check_imports() -> None:
    try:
        for name in ("matplotlib", "PIL", "sklearn"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "the embedded domains need matplotlib, Pillow and scikit-learn: "
            "pip install 'ftn_jax[experiments]'"
        ) from error


def _draw_domain(
    name: str,
    class_names: Sequence[str],
    paint: _Painter,
    *,
    sizes: tuple[int, int],
    seed: int,
) -> Domain:
    def draw(part: str, n: int) -> ArraySource:
        # A stream for each part: a change to one leaves all others as they were.
        rng = np.random.default_rng([seed, *f"{name}/{part}".encode()])
        labels = rng.permutation(np.arange(n) % len(class_names))
        images = paint(rng, labels, _photo_patches(rng, n, left=part == "train"))
        return ArraySource(_to_uint8(images), labels)

    train, test = draw("train", sizes[0]), draw("test", sizes[1])
    return Domain(name, tuple(class_names), train, test)


def _digits(seed: int) -> Domain:
    from PIL import Image

    digits = load_digits()
    parts = (digits.train, digits.test)
    examples = [part[i] for part in parts for i in range(len(part))]
    enlarged = [
        np.asarray(
            Image.fromarray(255 - example.image[..., 0]).resize(
                (IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC
            )
        )
        for example in examples
    ]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=-1)
    labels = np.array([example.label for example in examples])
    parts = split(ArraySource(images, labels), 0.4, seed=seed)
    train, test = (ArraySource(images[p.indices], p.labels) for p in parts)
    return Domain(digits.name, digits.class_names, train, test)


def _paint_capitals(
    rng: np.random.Generator, labels: _Labels, photos: _Images
) -> _Images:
    ink = _draw_glyphs(rng, labels, _CAPITALS, fonts=_SANS, turn_deg=20.0)
    light = _colours(rng, len(labels), low=120, high=255)
    return _blend(0.5 * photos, light, ink) + rng.normal(0, 4, photos.shape)


def _paint_greek(rng: np.random.Generator, labels: _Labels, photos: _Images) -> _Images:
    n = len(labels)
    ink = _draw_glyphs(
        rng, labels, _GREEK, fonts=_ITALIC, turn_deg=15.0, scale=(0.9, 1.2)
    )
    others = rng.integers(0, len(_CAPITALS), n)
    scraps = _draw_glyphs(
        rng, others, _CAPITALS, fonts=("DejaVuSerif",), turn_deg=180.0, shift_px=8.0
    )
    paper = 255 - rng.uniform(0.2, 0.5, (n, 1, 1, 1)) * photos
    paper = _blend(paper, _colours(rng, n, low=120, high=220), scraps)
    return _blend(paper, _colours(rng, n, low=0, high=110), ink)


def _paint_stripes(
    rng: np.random.Generator, labels: _Labels, photos: _Images
) -> _Images:
    n = len(labels)
    angle = labels % _ANGLES * (np.pi / _ANGLES) + rng.normal(0, 0.05, n)
    period = np.take(_PERIODS_PX, labels // _ANGLES) * np.exp(rng.normal(0, 0.06, n))
    phase = rng.uniform(0, 2 * np.pi, n)
    angle, period, phase = (a[:, None, None] for a in (angle, period, phase))
    y, x = np.mgrid[:IMAGE_PX, :IMAGE_PX]
    across = x * np.cos(angle) + y * np.sin(angle)
    wave = np.sin(2 * np.pi * across / period + phase)[..., None]
    tint = _colours(rng, n, low=-55, high=55)
    return 50 + 0.6 * photos + tint * wave + rng.normal(0, 16, photos.shape)


def _paint_counting(
    rng: np.random.Generator, labels: _Labels, photos: _Images
) -> _Images:
    n, rows = len(labels), 3
    order = rng.permuted(np.tile(np.arange(rows * rows), (n, 1)), axis=1)
    is_disc = order <= labels[:, None]
    is_ring = ~is_disc & (rng.random(order.shape) < 0.5)
    y, x = np.mgrid[:IMAGE_PX, :IMAGE_PX] + 0.5
    dark = _colours(rng, n, low=0, high=90)
    images = 120 + 0.35 * photos
    for cell in range(rows * rows):
        middle = (np.array(divmod(cell, rows)) + 0.5) * (IMAGE_PX / rows)
        cy, cx = (middle + rng.uniform(-1.2, 1.2, (n, 2))).T[:, :, None, None]
        # Signed distance to the edge, positive inside: clipped, it is smooth ink.
        inside = rng.uniform(2.2, 3.4, (n, 1, 1)) - np.hypot(y - cy, x - cx)
        disc = np.clip(inside + 0.5, 0, 1) * is_disc[:, cell, None, None]
        ring = np.clip(1 - abs(inside - 0.5), 0, 1) * is_ring[:, cell, None, None]
        images = _blend(images, dark, (disc + ring)[..., None])
    return images + rng.normal(0, 6, images.shape)


def _draw_glyphs(
    rng: np.random.Generator,
    labels: _Labels,
    characters: Sequence[str],
    *,
    fonts: Sequence[str],
    turn_deg: float,
    scale: tuple[float, float] = (0.7, 1.1),
    shift_px: float = 2.4,
) -> Float[np.ndarray, "n h w 1"]:
    """Draw one character for each label, moved at random; 1 is ink, 0 is none."""
    from PIL import Image

    # Drawn larger, moved, then averaged: the edges are smooth at any angle.
    finer = 3
    side = finer * IMAGE_PX
    upright = [_draw_upright(font, characters, side=side) for font in fonts]
    n = len(labels)
    chosen = rng.integers(0, len(fonts), n)
    turn = np.deg2rad(rng.uniform(-turn_deg, turn_deg, n))
    shear = rng.uniform(-0.2, 0.2, n)
    shift = finer * rng.uniform(-shift_px, shift_px, (n, 2))
    cos, sin = np.cos(turn), np.sin(turn)
    # Rotation times shear, as (n, 2, 2). Pillow wants the way back, to the source.
    forward = np.array([[cos, cos * shear - sin], [sin, sin * shear + cos]])
    forward = forward.transpose(2, 0, 1) * rng.uniform(*scale, (n, 1, 1))
    back = np.linalg.inv(forward)
    offset = side / 2 - np.einsum("nij,nj->ni", back, side / 2 + shift)
    coefficients = np.concatenate([back, offset[..., None]], axis=2).reshape(n, 6)
    ink = np.empty((n, IMAGE_PX, IMAGE_PX, 1))
    for i, (font, label) in enumerate(zip(chosen, labels, strict=True)):
        moved = Image.fromarray(upright[font][label]).transform(
            (side, side),
            Image.Transform.AFFINE,
            coefficients[i].tolist(),
            Image.Resampling.BILINEAR,
        )
        ink[i, ..., 0] = np.asarray(moved.reduce(finer)) / 255
    return ink


def _draw_upright(
    font: str, characters: Sequence[str], *, side: int
) -> UInt8[np.ndarray, "characters side side"]:
    """Draw each character in the middle of its own image."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The basic layout: the other one is not in every build of Pillow.
    face = ImageFont.truetype(
        str(folder / f"{font}.ttf"),
        round(0.8 * side),
        layout_engine=ImageFont.Layout.BASIC,
    )
    images = []
    for character in characters:
        image = Image.new("L", (side, side))
        draw = ImageDraw.Draw(image)
        x0, y0, x1, y1 = draw.textbbox((0, 0), character, font=face)
        corner = ((side - x0 - x1) / 2, (side - y0 - y1) / 2)
        draw.text(corner, character, fill=255, font=face)
        images.append(np.asarray(image))
    return np.stack(images)


def _photo_patches(rng: np.random.Generator, n: int, *, left: bool) -> _Images:
    """Cut patches at full and half size from the left or right of two photographs."""
    from sklearn.datasets import load_sample_images

    photos = np.stack(load_sample_images().images)
    cut = int(0.6 * photos.shape[2])
    photos = photos[:, :, :cut] if left else photos[:, :, cut:]
    windows = np.lib.stride_tricks.sliding_window_view(
        photos, (2 * IMAGE_PX, 2 * IMAGE_PX), axis=(1, 2)
    )
    picture, y, x = (rng.integers(0, size, n) for size in windows.shape[:3])
    wide = windows[picture, y, x].transpose(0, 2, 3, 1)
    halves = wide.reshape(n, IMAGE_PX, 2, IMAGE_PX, 2, 3).mean((2, 4))
    near = rng.random((n, 1, 1, 1)) < 0.5
    return np.where(near, wide[:, :IMAGE_PX, :IMAGE_PX], halves)


def _colours(
    rng: np.random.Generator, n: int, *, low: int, high: int
) -> Float[np.ndarray, "n 1 1 3"]:
    return rng.uniform(low, high, (n, 1, 1, 3))


def _blend(
    below: _Images,
    colour: Float[np.ndarray, "n 1 1 3"],
    ink: Float[np.ndarray, "n h w 1"],
) -> _Images:
    return below + ink * (colour - below)


def _to_uint8(images: _Images) -> UInt8[np.ndarray, "n h w 3"]:
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)
