"""Bring a ViT's position embedding to another grid of patches."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def interpolate_positions(
    position_embedding: Float[Array, "n width"],
    grid: tuple[int, int],
    *,
    prefix_tokens: int = 1,
) -> Float[Array, "m width"]:
    """Resize the patches' part of a position embedding by bicubic interpolation.

    Agrees, to float32 rounding, with PyTorch's
    `interpolate(mode="bicubic", align_corners=False, antialias=False)`, and so with
    transformers' `interpolate_pos_encoding=True`: cubic coefficient -0.75, edges
    repeated. timm antialiases (the same when the grid grows), the original JAX code
    interpolates linearly and `jax.image.resize` has the coefficient -0.5: all three
    differ from this.

    Args:
        position_embedding: One row for each token: first the prefix tokens', then the
            patches' of a square grid, row by row.
        grid: Patches down and across, wanted.
        prefix_tokens: Rows before the patches' (class and distillation token): kept.

    Raises:
        ValueError: If the patches' rows are not those of a square grid.
    """
    n, width = position_embedding.shape
    old = math.isqrt(max(n - prefix_tokens, 0))
    if old == 0 or old * old != n - prefix_tokens:
        raise ValueError(
            f"a position embedding of {n} rows, {prefix_tokens} of them before the "
            "patches', is not of a square grid: give the number of prefix_tokens"
        )
    prefix = position_embedding[:prefix_tokens]
    patches = position_embedding[prefix_tokens:].reshape(old, old, width)
    down, across = (_cubic_weights(old, size).astype(patches.dtype) for size in grid)
    patches = jnp.einsum(
        "yi,xj,ijw->yxw", down, across, patches, precision="highest"
    ).reshape(-1, width)
    return jnp.concatenate([prefix, patches])


def _cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weigh `old` samples for each of `new`, by Keys' kernel with a = -0.75."""
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        t = np.abs(place - (first + tap))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), column), np.where(t <= 1, near, far))
    return weights
