"""How far generated images are from the ones they should be: p-norm and PSNR."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.metrics import Sums
from ftn_jax.train import Loss

PEAK = 2.0
"""Width of the range of image values, which lie between -1 and 1."""


def psnr(
    found: Float[Array, "b h w c"], expected: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """Return each image's peak signal-to-noise ratio in dB; values are in [-1, 1]."""
    error = jnp.mean((found - expected) ** 2, axis=(1, 2, 3))
    return 10 * jnp.log10(PEAK**2 / error)


def reconstruction(
    images: Float[Array, "b h w c"], batch: Mapping[str, Any], *, p: float = 2.0
) -> Sums:
    """Sum the p-norm loss and the PSNR over a batch's real examples.

    Args:
        images: the generator's.
        batch: `"image"`, of the same shape, and optionally `"mask"`, `(b,)`.
        p: exponent.

    Returns:
        `"loss"` (mean of |difference|^p over an image's values), `"psnr"` (dB) and
        `"count"`, each summed over the examples.

    Raises:
        ValueError: if the shapes differ (the data set has another image size).

    Source: FTN (arXiv 2310.06124), NeurIPS submission, section 4.3: the sum over images
    of ||x - G(z)||_p^p; p is not given.
    """
    expected = batch["image"]
    if images.shape != expected.shape:
        raise ValueError(
            f"the generator draws images of shape {images.shape[1:]}, the data has "
            f"{expected.shape[1:]}: resize the data, or use a generator of its size"
        )
    mask = jnp.asarray(batch.get("mask", jnp.ones(len(images))), jnp.float32)

    def total(values: Float[Array, " b"]) -> Float[Array, ""]:
        # where, not a product: an infinite value on padding must not become NaN.
        return jnp.sum(jnp.where(mask > 0, values * mask, 0.0))

    losses = jnp.mean(jnp.abs(images - expected) ** p, axis=(1, 2, 3))
    values = psnr(images, expected)
    return {"loss": total(losses), "psnr": total(values), "count": mask.sum()}


def p_norm(p: float) -> Loss:
    """Return `reconstruction` with the exponent `p`.

    Raises:
        ValueError: if `p` is below 1.
    """
    if p < 1:
        raise ValueError(f"p is {p}, expected at least 1")
    return partial(reconstruction, p=p)
