"""Name the Vision Transformers of the papers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ftn_jax.models.vit import ViT

_SIZES: dict[str, dict[str, Any]] = {
    "ti": {"width": 192, "heads": 3},
    "s": {"width": 384, "heads": 6},
    "b": {"width": 768, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
}
_PROJECTIONS = {"b": 512, "l": 768}


def clip_vit(
    size: str, patch_px: int, num_classes: int | None = None, **options: Any
) -> ViT:
    """Make the visual tower of CLIP: its projection and, by default, no head.

    QuickGELU, LayerNorm with epsilon 1e-5 and also before the blocks, no bias in the
    patch embedding. Parameters at 224 px without a head: B/32 87,849,216, B/16
    86,192,640, L/14 303,966,208. Some later checkpoints of the same form were trained
    with the exact GELU: give `activation="gelu"` for them.

    Args:
        size: "b" or "l".
        patch_px: Side of a patch.
        num_classes: Size of a head on the projected features, None for no head.
        **options: Attributes of `ViT`: image_px, feature_norm, remat...

    Raises:
        ValueError: If the size is unknown.

    Source: Radford et al. (2021), section 2.4 and Table 20.
    """
    clip = {
        "activation": "quick_gelu",
        "patch_bias": False,
        "stem_norm": True,
        "projection_width": _pick(_PROJECTIONS, size),
        "norm_epsilon": 1e-5,
    }
    settings = _pick(_SIZES, size) | clip | {"patch_px": patch_px} | options
    return ViT(num_classes, **settings)


def vit(
    size: str, patch_px: int, num_classes: int | None = 1000, **options: Any
) -> ViT:
    """Make a ViT of the original form, as timm does: exact GELU, epsilon 1e-6.

    Parameters at 224 px with 1000 classes: B/16 86,567,656, B/32 88,224,232, S/16
    22,050,664, Ti/16 5,717,416.

    Args:
        size: "ti", "s", "b" or "l".
        patch_px: Side of a patch.
        num_classes: Size of the head, None for no head.
        **options: Attributes of `ViT`: image_px, dropout, remat... transformers has
            `norm_epsilon=1e-12`, the original code `activation="gelu_tanh"`.

    Raises:
        ValueError: If the size is unknown.

    Source: Dosovitskiy et al. (2021), Table 1; S and Ti: Steiner et al., "How to train
    your ViT?" (2022), Table 2.
    """
    settings = _pick(_SIZES, size) | {"patch_px": patch_px} | options
    return ViT(num_classes, **settings)


def vit_tiny_cifar(num_classes: int | None = 10, **options: Any) -> ViT:
    """Make a small ViT for images of 32 px: patches of 4 px, 6 blocks of width 192.

    Args:
        num_classes: Size of the head, None for no head.
        **options: Attributes of `ViT`.
    """
    settings = {"image_px": 32, "depth": 6} | options
    return vit("ti", 4, num_classes, **settings)


def _pick(table: dict[str, Any], size: str) -> Any:
    if size not in table:
        raise ValueError(f"size is one of {[*table]}, found {size!r}")
    return table[size]


clip_vit_b32 = partial(clip_vit, "b", 32)
clip_vit_b16 = partial(clip_vit, "b", 16)
clip_vit_l14 = partial(clip_vit, "l", 14)
vit_b32 = partial(vit, "b", 32)
vit_b16 = partial(vit, "b", 16)
vit_s16 = partial(vit, "s", 16)
vit_ti16 = partial(vit, "ti", 16)

VITS: dict[str, Callable[..., ViT]] = {
    "clip_vit_b32": clip_vit_b32,
    "clip_vit_b16": clip_vit_b16,
    "clip_vit_l14": clip_vit_l14,
    "vit_b32": vit_b32,
    "vit_b16": vit_b16,
    "vit_s16": vit_s16,
    "vit_ti16": vit_ti16,
    # DeiT is the same network; its distilled form has one token and one head more.
    **{f"deit_{size}16": partial(vit, size, 16) for size in ("ti", "s", "b")},
    **{
        f"deit_{size}16_distilled": partial(vit, size, 16, distilled=True)
        for size in ("ti", "s", "b")
    },
    "vit_tiny_cifar": vit_tiny_cifar,
}
"""Every named ViT: name -> function of (num_classes, **options)."""
