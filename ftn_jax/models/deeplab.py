"""DeepLabv3+: a decoder for dense prediction on any backbone that gives features."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KERNEL_INIT = nn.initializers.normal(0.01)


def resize_bilinear(
    x: Float[Array, "b h w c"], height: int, width: int
) -> Float[Array, "b height width c"]:
    """Resize between pixel centres, without antialiasing.

    This is PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    shape = (x.shape[0], height, width, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


class ConvBNReLU(nn.Module):
    """Apply a convolution without bias, a BatchNorm and a ReLU; sizes stay.

    In training, a batch of one with one pixel (as after global pooling) has no
    variance: such a call uses, and keeps, the running statistics.
    """

    features: int
    kernel: int = 1
    dilation: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], train: bool = False
    ) -> Float[Array, "b h w o"]:
        """Return `relu(bn(conv(x)))`."""
        pad = self.dilation * (self.kernel - 1) // 2
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            padding=((pad, pad), (pad, pad)),
            kernel_dilation=(self.dilation, self.dilation),
            use_bias=False,
            kernel_init=KERNEL_INIT,
            dtype=self.dtype,
            name="conv",
        )(x)
        single = x.shape[0] * x.shape[1] * x.shape[2] == 1
        x = nn.BatchNorm(
            use_running_average=not train or single,
            momentum=self.momentum,
            epsilon=self.epsilon,
            use_fast_variance=False,
            dtype=self.dtype,
            name="bn",
        )(x)
        return nn.relu(x)


class ASPP(nn.Module):
    """Look at features through several windows at once (atrous spatial pyramid).

    A 1x1 convolution, one 3x3 convolution for each rate, and global pooling, each of
    `width` channels, side by side; a 1x1 convolution joins them.

    Source: Chen et al., "Rethinking atrous convolution" (arXiv 1706.05587).
    """

    width: int = 256
    rates: tuple[int, ...] = (6, 12, 18)
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], train: bool = False
    ) -> Float[Array, "b h w o"]:
        """Return the joined branches."""
        conv = partial(ConvBNReLU, self.width, dtype=self.dtype)
        branches = [conv(name="point")(x, train)]
        for rate in self.rates:
            wide = conv(kernel=3, dilation=rate, name=f"rate{rate}")
            branches.append(wide(x, train))
        pooled = conv(name="pool")(x.mean(axis=(1, 2), keepdims=True), train)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        return conv(name="join")(jnp.concatenate(branches, axis=-1), train)


class Decoder(nn.Module):
    """Turn deep and shallow features into one map of outputs per pixel.

    With the default sizes on ResNet-18's layer4 (512 channels) and layer1 (64) it has
    5,436,809 parameters for 41 outputs, 5,427,043 for 3 and 5,426,529 for 1.

    Attributes:
        outputs: channels of the result, such as the number of classes.
        width: channels of the pyramid and of the last two 3x3 convolutions.
        low_width: channels that the shallow features are reduced to.
        rates: dilations of the pyramid.
        dtype: of the arithmetic.

    Source: Chen et al., "Encoder-decoder with atrous separable convolution" (arXiv
    1802.02611), with full convolutions instead of separable ones and without dropout,
    as in RCM's multi-task networks (arXiv 2007.12540).
    """

    outputs: int
    width: int = 256
    low_width: int = 48
    rates: tuple[int, ...] = (6, 12, 18)
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        high: Float[Array, "b h w i"],
        low: Float[Array, "b h2 w2 j"],
        train: bool = False,
    ) -> Float[Array, "b h2 w2 outputs"]:
        """Return outputs at the size of the shallow features."""
        conv = partial(ConvBNReLU, dtype=self.dtype)
        pyramid = ASPP(self.width, self.rates, self.dtype, name="aspp")(high, train)
        pyramid = resize_bilinear(pyramid, *low.shape[1:3])
        low = conv(self.low_width, name="low")(low, train)
        x = jnp.concatenate([pyramid, low], axis=-1)
        x = conv(self.width, 3, name="refine1")(x, train)
        x = conv(self.width, 3, name="refine2")(x, train)
        return nn.Conv(
            self.outputs, (1, 1), kernel_init=KERNEL_INIT, dtype=self.dtype, name="out"
        )(x)


class DeepLab(nn.Module):
    """Predict a map of outputs from images of any size.

    Parameter paths: `backbone/...` as the backbone names them, `decoder/...`.

    Attributes:
        backbone: a module whose call with `features=True` gives its features by name,
            a `ResNet` with `output_stride` 16 or 8 for example.
        outputs: channels of the result.
        high: name of the deep features.
        low: name of the shallow features.
        width: see `Decoder`.
        low_width: see `Decoder`.
        rates: see `Decoder`; the paper doubles them at output stride 8.
        dtype: of the decoder's arithmetic.
    """

    backbone: nn.Module
    outputs: int
    high: str = "layer4"
    low: str = "layer1"
    width: int = 256
    low_width: int = 48
    rates: tuple[int, ...] = (6, 12, 18)
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w 3"],
        train: bool = False,
        frozen_backbone: bool = False,
    ) -> Float[Array, "b h w outputs"]:
        """Return one vector of outputs for each pixel.

        Args:
            x: normalized images.
            train: normalize with the batch's statistics.
            frozen_backbone: let the backbone keep to its running statistics even so.

        Raises:
            ValueError: if the backbone gives no features of these names.
        """
        found: Mapping[str, Array] = self.backbone(
            x, train=train and not frozen_backbone, features=True
        )
        if missing := {self.high, self.low} - {*found}:
            raise ValueError(
                f"the backbone gives no features {sorted(missing)}, it gives "
                f"{sorted(found)}; set high and low"
            )
        decoder = Decoder(
            self.outputs,
            self.width,
            self.low_width,
            self.rates,
            self.dtype,
            name="decoder",
        )
        outputs = decoder(found[self.high], found[self.low], train)
        return resize_bilinear(outputs, *x.shape[1:3])
