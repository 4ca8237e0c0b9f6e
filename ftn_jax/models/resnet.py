"""Define the ResNet module; `resnet_family` names the published shapes of it."""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.models.resnet_block import Block, ConvNorm, FinalNorm, Shortcut

_DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Stage(NamedTuple):
    """Stride and dilations of one stage, after strides became dilation."""

    stride: int
    first_dilation: int
    dilation: int


def _plan_stages(model: "ResNet") -> list[_Stage]:
    """Turn strides beyond `output_stride` into dilation, stage by stage."""
    total = 4 if model.stem == "7x7" else 1
    dilation = 1
    plan = []
    for index in range(len(model.stage_sizes)):
        stride = model.first_stride if index == 0 else 2
        first = dilation
        if model.output_stride is not None and total * stride > model.output_stride:
            dilation *= stride
            stride = 1
        total *= stride
        first = dilation if model.dilate_first_conv else first
        plan.append(_Stage(stride, first, dilation))
    return plan


class ResNet(nn.Module):
    """Classify images, or give their features, with a residual network (NHWC).

    Parameter paths, the same with and without `remat`: `stem/conv/kernel`,
    `stem/bn/{scale,bias}`, `layer{s}_{i}/conv{k}/kernel`,
    `layer{s}_{i}/bn{k}/{scale,bias}`, `layer{s}_{i}/shortcut/{conv,bn}/...`,
    `final/bn/{scale,bias}` (if `final_norm`) and `head/{kernel,bias}`, with stages s
    and convolutions k from 1 and blocks i from 0. `batch_stats` has the same paths.

    Kernels start as torchvision's: convolutions normal with variance 2 / (k k c_out),
    the head uniform in +-1/sqrt(c_in), BatchNorm at scale 1 and bias 0.

    Training averages the biased variance of each batch into the running statistics, as
    Flax does; PyTorch averages the unbiased one, larger by n / (n - 1).

    Attributes:
        stage_sizes: Number of blocks in each stage; widths double from stage to stage.
        num_classes: Size of the head; None for no head (the call gives the pooled
            features).
        width: Channels of the first stage (a bottleneck gives out four times that).
        stem: "7x7" with stride 2 and a 3x3/2 max-pool, or "3x3" with stride 1.
        stem_width: Channels of the stem; None for `width`.
        stem_relu: Whether a ReLU follows the stem's BatchNorm.
        bottleneck: Bottleneck blocks, stride on their 3x3 ("v1.5"), or basic blocks.
        shortcut: "projection" (1x1 convolution and BatchNorm), "subsample" (every
            second pixel, zero channels on both sides: option A) or "pool" (average
            pool, zero channels after).
        first_stride: Stride of the first stage; that of the others is 2.
        final_norm: Whether BatchNorm and ReLU come before the global pooling.
        output_stride: Largest stride of the features; strides beyond it become
            dilation. None keeps them all.
        dilate_first_conv: Which dilation the convolution has whose stride was taken
            away. True: the new one, so both 3x3 convolutions of all blocks of the
            stage are dilated, as in published dense-prediction code for basic blocks.
            False: the one before, so the features are those of the strided network
            at more places; for bottlenecks this is torchvision's
            `replace_stride_with_dilation`.
        remat: Recompute each block in the backward pass instead of storing it.
        dtype: Type of the arithmetic and of the output; parameters stay float32.
        norm_axis_name: Name of the mapped axis over which BatchNorm takes its
            statistics; None for each device its own.
        bn_momentum: Share of the old running statistics kept at an update
            (PyTorch's momentum is one minus this).
        bn_epsilon: Added to the variance.

    Source: He et al., "Deep residual learning for image recognition" (2016).
    """

    stage_sizes: tuple[int, ...]
    num_classes: int | None = 1000
    width: int = 64
    stem: Literal["7x7", "3x3"] = "7x7"
    stem_width: int | None = None
    stem_relu: bool = True
    bottleneck: bool = False
    shortcut: Shortcut = "projection"
    first_stride: int = 1
    final_norm: bool = False
    output_stride: int | None = None
    dilate_first_conv: bool = True
    remat: bool = False
    dtype: Any = None
    norm_axis_name: str | None = None
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w 3"],
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "b n"] | dict[str, Float[Array, "..."]]:
        """Return the logits (b, num_classes), or the pooled features without a head.

        Args:
            x: Normalized images.
            train: Normalize with the batch's statistics and update `batch_stats`.
            features: Return {"stem", "layer1", ..., "pooled"} and leave the head out;
                the stem's are taken before the max-pool.

        Raises:
            ValueError: If `x` is not of shape (b, h, w, 3).
        """
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(
                f"ResNet takes images of shape (b, h, w, 3), found {x.shape}: move "
                "channels last, repeat a single grey channel three times"
            )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            axis_name=self.norm_axis_name,
            use_fast_variance=False,
        )
        block = nn.remat(Block) if self.remat else Block
        kernel, stride = (7, 2) if self.stem == "7x7" else (3, 1)
        width = self.width if self.stem_width is None else self.stem_width

        x = ConvNorm(width, kernel, stride, norm=norm, dtype=self.dtype, name="stem")(x)
        if self.stem_relu:
            x = nn.relu(x)
        found = {"stem": x}
        if self.stem == "7x7":
            pad: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=pad)
        for s, stage in enumerate(_plan_stages(self)):
            for i in range(self.stage_sizes[s]):
                first = stage.first_dilation if i == 0 else stage.dilation
                x = block(
                    planes=self.width * 2**s,
                    stride=stage.stride if i == 0 else 1,
                    dilations=(first, stage.dilation),
                    bottleneck=self.bottleneck,
                    shortcut=self.shortcut,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"layer{s + 1}_{i}",
                )(x)
            found[f"layer{s + 1}"] = x
        if self.final_norm:
            x = nn.relu(FinalNorm(norm, name="final")(x))
        x = jnp.mean(x, axis=(1, 2))
        found["pooled"] = x
        if features:
            return found
        if self.num_classes is None:
            return x
        return nn.Dense(
            self.num_classes,
            kernel_init=_DENSE_INIT,
            bias_init=partial(_uniform, limit=x.shape[-1] ** -0.5),
            dtype=self.dtype,
            name="head",
        )(x)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any, *, limit: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)
