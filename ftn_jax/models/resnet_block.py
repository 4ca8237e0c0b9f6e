"""Define the parts of a ResNet: convolution with BatchNorm, shortcuts and blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Shortcut = Literal["projection", "subsample", "pool"]

_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    dtype: Any = None,
    name: str,
) -> nn.Conv:
    """Make a bias-free square convolution padded as PyTorch pads it.

    "SAME" would pad (0, 1) at stride 2 on even sizes where PyTorch pads (1, 1).
    """
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        kernel_init=_CONV_INIT,
        dtype=dtype,
        name=name,
    )


class ConvNorm(nn.Module):
    """Apply a convolution and a BatchNorm, as the stem and the projections do."""

    features: int
    kernel: int
    stride: int
    norm: Callable[..., nn.BatchNorm]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Return `bn(conv(x))`."""
        conv = _conv(
            self.features,
            self.kernel,
            stride=self.stride,
            dtype=self.dtype,
            name="conv",
        )
        return self.norm(name="bn")(conv(x))


class FinalNorm(nn.Module):
    """Apply the BatchNorm that ends the residual-adapter ResNet."""

    norm: Callable[..., nn.BatchNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return `bn(x)`."""
        return self.norm(name="bn")(x)


def free_shortcut(
    x: Float[Array, "b h w i"], features: int, *, stride: int, kind: Shortcut
) -> Float[Array, "b h2 w2 o"]:
    """Shrink `x` and widen it with zero channels, without parameters."""
    grow = features - x.shape[-1]
    if kind == "subsample":
        x = x[:, ::stride, ::stride, :]
        channels = (grow // 2, grow - grow // 2)
    else:
        if x.shape[1] % stride or x.shape[2] % stride:
            raise ValueError(
                f"the pooling shortcut halves height and width, found {x.shape[1:3]}: "
                "give images whose sides are multiples of 2 per stage (8 for ResNet-26)"
            )
        window = (stride, stride)
        x = nn.avg_pool(x, window, window)
        channels = (0, grow)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), channels))


class Block(nn.Module):
    """Add a basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1) branch to its shortcut.

    The stride sits on the first 3x3 convolution. `dilations` are those of that
    convolution and of the 3x3 convolution after it (a bottleneck has only the first).
    """

    planes: int
    stride: int
    dilations: tuple[int, int]
    bottleneck: bool
    shortcut: Shortcut
    norm: Callable[..., nn.BatchNorm]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Return `relu(branch(x) + shortcut(x))`."""
        conv = partial(_conv, dtype=self.dtype)
        strided = partial(conv, stride=self.stride, dilation=self.dilations[0])
        if self.bottleneck:
            features = 4 * self.planes
            convs = [
                conv(self.planes, 1, name="conv1"),
                strided(self.planes, 3, name="conv2"),
                conv(features, 1, name="conv3"),
            ]
        else:
            features = self.planes
            convs = [
                strided(self.planes, 3, name="conv1"),
                conv(self.planes, 3, dilation=self.dilations[1], name="conv2"),
            ]
        y = x
        for k, layer in enumerate(convs, start=1):
            y = self.norm(name=f"bn{k}")(layer(y))
            if k < len(convs):
                y = nn.relu(y)
        if self.stride != 1 or x.shape[-1] != features:
            if self.shortcut == "projection":
                x = ConvNorm(
                    features,
                    1,
                    self.stride,
                    norm=self.norm,
                    dtype=self.dtype,
                    name="shortcut",
                )(x)
            else:
                x = free_shortcut(x, features, stride=self.stride, kind=self.shortcut)
        return nn.relu(x + y)
