"""Name the published shapes of BigGAN."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ftn_jax.models.biggan import BigGAN
from ftn_jax.models.biggan_deep import BigGANDeep, Level

_CHANNELS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
# Of the blocks that double the resolution; one that does not comes before each.
_DEEP = {
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}


def biggan(
    resolution: int = 128, *, width: int = 96, dim_z: int | None = None, **options: Any
) -> BigGAN:
    """Make a published BigGAN: 70,433,988 parameters at 128 px.

    Args:
        resolution: Height and width of the images, px: 32, 64, 128, 256 or 512.
        width: Channels that the others are multiples of (published: 96 at 128 px).
        dim_z: Length of the latent vector; rounded down to equal chunks. Default: 20
            for each chunk, 120 at 128 px.
        **options: Attributes of `BigGAN`: num_classes, shared_dim, attention...

    Raises:
        ValueError: If the resolution is unknown or `dim_z` too small.

    Source: Brock et al. (2019), Tables 4 to 6 and the authors' PyTorch code.
    """
    multiples = _pick(_CHANNELS, resolution)
    chunk = 20 if dim_z is None else dim_z // len(multiples)
    if chunk < 1:
        raise ValueError(f"dim_z is {dim_z}, expected at least {len(multiples)}")
    return BigGAN(tuple(width * m for m in multiples), chunk=chunk, **options)


def biggan_deep(
    resolution: int = 128, *, width: int = 128, **options: Any
) -> BigGANDeep:
    """Make the generator of a `biggan-deep` checkpoint: 50,388,609 parameters at 128.

    Args:
        resolution: Height and width of the images, px: 128, 256 or 512.
        width: Channels that the others are multiples of.
        **options: Attributes of `BigGANDeep`: truncation, num_classes, dim_z...

    Raises:
        ValueError: If the resolution is unknown.

    Source: Brock et al. (2019), Tables 7 to 9; pytorch-pretrained-biggan.
    """
    multiples = _pick(_DEEP, resolution)
    levels: list[Level] = []
    for c_in, c_out in zip(multiples, multiples[1:], strict=False):
        levels += [(False, c_in, c_in), (True, c_in, c_out)]
    # Self-attention works on 64 px.
    options = {"attention": 8, **options}
    return BigGANDeep(tuple(levels), width=width, **options)


BIGGANS: dict[str, Callable[..., BigGAN | BigGANDeep]] = {
    **{f"biggan{size}": partial(biggan, size) for size in _CHANNELS},
    **{f"biggan_deep{size}": partial(biggan_deep, size) for size in _DEEP},
}
"""Every named generator: name -> function of options."""


def _pick(shapes: dict[int, tuple[int, ...]], resolution: int) -> tuple[int, ...]:
    if resolution not in shapes:
        raise ValueError(f"resolution is {resolution}, known are {sorted(shapes)}")
    return shapes[resolution]
