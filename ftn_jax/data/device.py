"""A transform's steps on the accelerator: jitted JAX, keyed by step and example.

The host then decodes and resizes to one size, and sends uint8: a quarter of the bytes.
The distribution is that of the same steps on the host; the draws are others.
"""

import math
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, UInt8

from ftn_jax.data.pipeline import Transform, flatten
from ftn_jax.data.transforms import (
    CenterCrop,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Shift,
    ToRGB,
)

Augment = Callable[[Any, Any], Any]
"""`(key, images (b, h, w, c)) -> images`; each image draws from a key of its own."""


@cache
def on_device(transform: Transform) -> Augment:
    """Turn a transform into a jitted `(key, images) -> images` on a whole batch.

    Equal transforms share one function, and so its compiled programs.

    Known are `RandomCrop`, `RandomResizedCrop`, `CenterCrop`, `Flip`, `Shift`,
    `ToRGB` and `Normalize`. `RandomResizedCrop` interpolates and antialiases as Pillow
    does, in float32; a value may differ by 1.

    Raises:
        TypeError: where a step has no form on the device.
    """
    each = [_on_one(step) for step in flatten(transform)]

    def one(key: Key[Array, ""], image: UInt8[Array, "h w c"]) -> Num[Array, "..."]:
        for n, step in enumerate(each):
            image = step(jax.random.fold_in(key, n), image)
        return image

    @jax.jit
    def augment(key: Key[Array, ""], images: UInt8[Array, "b h w c"]) -> Any:
        return jax.vmap(one)(jax.random.split(key, len(images)), images)

    return augment


def augmented(
    batches: Iterator[dict[str, Any]],
    augment: Augment,
    *,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Generator[dict[str, Any], None, None]:
    """Pass the images of batches through `augment`, keyed by seed and step.

    Args:
        batches: such as `train_batches(..., start_step=start_step)` gives.
        augment: from `on_device`.
        seed: of the augmentation.
        start_step: the step of the first batch, so that a resumed run draws as an
            uninterrupted one would.
        shard: as given to `train_batches`; each part draws for itself.
    """
    key = jax.random.fold_in(jax.random.key(seed), shard[0])
    for step, batch in enumerate(batches, start_step):
        images = augment(jax.random.fold_in(key, step), batch["image"])
        yield {**batch, "image": images}


def _on_one(step: Any) -> Callable[[Any, Any], Any]:
    """Give a step as `(key, image (h, w, c)) -> image`."""
    for kind, function in _KNOWN.items():
        if type(step) is kind:
            return partial(function, step)
    raise TypeError(
        f"{step!r} has no form on the device, expected one of "
        f"{sorted(kind.__name__ for kind in _KNOWN)}; leave it to the host"
    )


def _center_crop(step: CenterCrop, key: Any, image: Any) -> Any:
    return step(None, image)  # pyright: ignore[reportArgumentType]


def _random_crop(step: RandomCrop, key: Any, image: Any) -> Any:
    pad = step.padding
    image = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    spare = jnp.array(image.shape[:2]) - step.size
    if min(image.shape[:2]) < step.size:
        raise ValueError(
            f"{step}: found an image of {image.shape[0]}x{image.shape[1]}, expected "
            f"at least {step.size}x{step.size}; resize it first"
        )
    top, left = jax.random.randint(key, (2,), 0, spare + 1)
    sizes = (step.size, step.size, image.shape[-1])
    return jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), sizes)


def _random_resized_crop(step: RandomResizedCrop, key: Any, image: Any) -> Any:
    height, width = image.shape[:2]
    for_size, for_place = jax.random.split(key)
    draws = jax.random.uniform(for_size, (2, 10))
    low, high = step.scale
    area = height * width * (low + (high - low) * draws[0])
    log_low, log_high = map(math.log, step.ratio)
    aspect = jnp.exp(log_low + (log_high - log_low) * draws[1])
    heights = jnp.round(jnp.sqrt(area / aspect))
    widths = jnp.round(jnp.sqrt(area * aspect))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, found = jnp.argmax(fits), jnp.any(fits)
    # The largest middle cut of an aspect within bounds, if ten draws do not fit.
    middle = min(max(width / height, step.ratio[0]), step.ratio[1])
    high_cut = max(1, min(height, round(width / middle)))
    wide_cut = max(1, min(width, round(height * middle)))
    h = jnp.where(found, heights[first], high_cut)
    w = jnp.where(found, widths[first], wide_cut)
    spare = jnp.stack([height - h, width - w])
    place = jnp.floor(jax.random.uniform(for_place, (2,)) * (spare + 1))
    top, left = jnp.where(found, place, spare // 2)
    rows = _weights(step.size, height, top, h)
    columns = _weights(step.size, width, left, w)
    pixels = image.astype(jnp.float32)
    cut = jnp.einsum("ih,jw,hwc->ijc", rows, columns, pixels, precision="highest")
    return jnp.clip(jnp.round(cut), 0, 255).astype(jnp.uint8)


def _weights(size: int, n: int, first: Any, length: Any) -> Float[Array, "size n"]:
    """Say how much each of `n` pixels counts for each of `size`: Pillow's triangles.

    Only pixels of the cut, `length` from `first` on, count; where it shrinks, each
    triangle is as much wider.
    """
    scale = length / size
    centers = first + (jnp.arange(size) + 0.5) * scale
    places = jnp.arange(n)[None, :]
    distance = jnp.abs(places + 0.5 - centers[:, None]) / jnp.maximum(scale, 1)
    inside = (places >= first) & (places < first + length)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _flip(step: Flip, key: Any, image: Any) -> Any:
    turned = jax.random.bernoulli(key, step.probability)
    return jnp.where(turned, image[:, ::-1], image)


def _shift(step: Shift, key: Any, image: Any) -> Any:
    height, width = image.shape[:2]
    down, right = jax.random.randint(key, (2,), -step.max_px, step.max_px + 1)
    rows = jnp.clip(jnp.arange(height) - down, 0, height - 1)
    columns = jnp.clip(jnp.arange(width) - right, 0, width - 1)
    return image[rows[:, None], columns]


def _to_rgb(step: ToRGB, key: Any, image: Any) -> Any:
    return step(None, image)  # pyright: ignore[reportArgumentType]


def _normalize(step: Normalize, key: Any, image: Any) -> Any:
    mean, std = (jnp.array(x)[None, None, :] for x in (step.mean, step.std))
    slope, offset = 1 / (255 * std), -mean / std
    return image.astype(jnp.float32) * slope + offset


_KNOWN: dict[type, Callable[..., Any]] = {
    CenterCrop: _center_crop,
    Flip: _flip,
    Normalize: _normalize,
    RandomCrop: _random_crop,
    RandomResizedCrop: _random_resized_crop,
    Shift: _shift,
    ToRGB: _to_rgb,
}
