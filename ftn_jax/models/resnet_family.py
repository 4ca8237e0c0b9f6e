"""Name the ResNets of the papers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ftn_jax.models.resnet import ResNet


def _imagenet(
    stage_sizes: tuple[int, ...],
    *,
    num_classes: int | None,
    output_stride: int = 32,
    **options: Any,
) -> ResNet:
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is 8, 16 or 32, found {output_stride!r}")
    return ResNet(
        stage_sizes, num_classes=num_classes, output_stride=output_stride, **options
    )


def resnet18(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Make torchvision's ResNet-18: 11,689,512 parameters with 1000 classes.

    Args:
        num_classes: Size of the head, None for no head.
        **options: Attributes of `ResNet`: width, output_stride (8, 16 or 32), remat...

    Raises:
        ValueError: If `output_stride` is not 8, 16 or 32.

    Source: He et al. (2016), Table 1.
    """
    return _imagenet((2, 2, 2, 2), num_classes=num_classes, **options)


def resnet34(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Make torchvision's ResNet-34: 21,797,672 parameters; options as `resnet18`.

    Source: He et al. (2016), Table 1.
    """
    return _imagenet((3, 4, 6, 3), num_classes=num_classes, **options)


def resnet50(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Make torchvision's ResNet-50: 25,557,032 parameters; options as `resnet18`.

    The stride is on the 3x3 convolution of the bottleneck ("v1.5").

    Source: He et al. (2016), Table 1.
    """
    return _imagenet((3, 4, 6, 3), num_classes=num_classes, bottleneck=True, **options)


def cifar_resnet(depth: int, num_classes: int | None = 10, **options: Any) -> ResNet:
    """Make the CIFAR ResNet of 6n + 2 layers with option A shortcuts.

    Args:
        depth: 8, 20, 32, 44, 56, 110, ...
        num_classes: Size of the head, None for no head.
        **options: Attributes of `ResNet`.

    Raises:
        ValueError: If `depth` is not 6n + 2 with n >= 1.

    Source: He et al. (2016), section 4.2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 20, 32), found {depth}")
    settings = {"width": 16, "stem": "3x3", "shortcut": "subsample"} | options
    return ResNet((blocks,) * 3, num_classes=num_classes, **settings)


def residual_adapter_resnet26(
    num_classes: int | None = 1000, *, width: int = 64, **options: Any
) -> ResNet:
    """Make the ResNet-26 of the residual-adapter papers, for images of 64 or 72 px.

    A 3x3 stem of `width / 2` channels without ReLU, three stages of four basic blocks,
    each starting with stride 2 and an average-pooling shortcut, and a last BatchNorm
    and ReLU: 25 convolutions of 5,806,944 weights. Image sides are multiples of 8.

    Args:
        num_classes: Size of the head, None for no head.
        width: Channels of the first stage.
        **options: Attributes of `ResNet`.

    Source: Rebuffi et al., "Efficient parametrization of multi-domain deep neural
    networks" (2018), section 4.
    """
    settings = {
        "stem": "3x3",
        "stem_width": width // 2,
        "stem_relu": False,
        "shortcut": "pool",
        "first_stride": 2,
        "final_norm": True,
    } | options
    return ResNet((4, 4, 4), num_classes=num_classes, width=width, **settings)


RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    **{
        f"cifar_resnet{depth}": partial(cifar_resnet, depth)
        for depth in (8, 20, 32, 44, 56, 110)
    },
    "resnet26": residual_adapter_resnet26,
}
"""Every named ResNet: name -> function of (num_classes, **options)."""
