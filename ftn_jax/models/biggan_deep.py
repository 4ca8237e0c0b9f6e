"""Define the generator of BigGAN-deep, as Hugging Face's checkpoints have it."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftn_jax.models.biggan import check_lengths
from ftn_jax.models.biggan_layers import (
    ORTHOGONAL,
    SelfAttention,
    conv,
    enlarge,
    modulate,
)

Level = tuple[bool, int, int]
"""Of a block: whether it doubles the resolution, channels in and out (of `width`)."""


class BigGANDeep(nn.Module):
    """Draw an image from a latent vector and a class (NHWC, between -1 and 1).

    Every layer sees the whole condition `[z, class vector]`. The running statistics
    are tables over truncations; they are frozen, there is no training mode. Parameter
    paths: `embedding/embedding`, `first/{kernel,bias}`, `block{i}/bn{0..3}/...`,
    `block{i}/conv{0..3}/{kernel,bias}`, `attention{i}/...` (before block i),
    `output/bn/{scale,bias}`, `output/conv/{kernel,bias}` (`width` outputs, of which
    the first three are the image). All kernels are W / sigma.

    Attributes:
        levels: Of each block.
        width: Channels of the last features.
        num_classes: Rows of the class embedding.
        dim_z: Length of the latent vector and of a class vector.
        attention: The block that self-attention comes before.
        truncations: Length of the tables of statistics.
        epsilon: Added to variances.
        truncation: Which statistics to use, above 0 and at most 1: the one that the
            latent vectors were drawn with (multiply N(0, 1), cut at 2, by it).

    Source: Brock et al. (2019), Appendix B.2; the details as in the package
    pytorch-pretrained-biggan.
    """

    levels: tuple[Level, ...]
    width: int = 128
    num_classes: int = 1000
    dim_z: int = 128
    attention: int = 8
    truncations: int = 51
    epsilon: float = 1e-4
    truncation: float = 1.0

    @property
    def shared_dim(self) -> int:
        """Length of a class vector."""
        return self.dim_z

    @property
    def resolution(self) -> int:
        """Height and width of the images, px."""
        return 4 * 2 ** sum(up for up, _, _ in self.levels)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b dim_z"],
        y: Int[Array, " b"] | Float[Array, "b dim_z"],
        train: bool = False,
    ) -> Float[Array, "b h w 3"]:
        """Return the images; arguments as of `BigGAN`.

        Raises:
            ValueError: If `z` or `y` has another length, the truncation is out of
                range, or training mode is asked for.
        """
        check_lengths(z, y, self.dim_z, self.dim_z)
        if train:
            raise ValueError(
                "BigGAN-deep has tables of statistics and no training mode: call it "
                "with train=False (frozen_stats=True in a training step)"
            )
        if y.ndim == 1:
            y = nn.Embed(
                self.num_classes,
                self.dim_z,
                embedding_init=ORTHOGONAL,
                name="embedding",
            )(y)
        condition = jnp.concatenate([z, y], axis=1)
        norm = partial(TableNorm, self.truncations, self.truncation, self.epsilon)
        first_channels = self.levels[0][1] * self.width
        first = nn.Dense(16 * first_channels, kernel_init=ORTHOGONAL, name="first")
        # Channels last, unlike BigGAN: the weights come from TensorFlow.
        x = first(condition).reshape(-1, 4, 4, first_channels)
        for i, (up, _, out) in enumerate(self.levels):
            if i == self.attention:
                x = SelfAttention(name=f"attention{i}")(x)
            x = DeepBlock(out * self.width, up, norm, name=f"block{i}")(x, condition)
        return DeepOutput(norm, name="output")(x)


class DeepBlock(nn.Module):
    """A bottleneck block; its shortcut drops channels.

    Attributes:
        features: Channels of the output.
        up: Whether the resolution doubles.
        norm: Makes the normalizations.
    """

    features: int
    up: bool
    norm: Callable[..., "TableNorm"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b d"]
    ) -> Float[Array, "b h2 w2 f"]:
        """Return the block's output for features `x` and condition `y`."""
        middle = x.shape[-1] // 4
        h = x
        for k, (features, size) in enumerate(
            [(middle, 1), (middle, 3), (middle, 3), (self.features, 1)]
        ):
            h = nn.relu(self.norm(name=f"bn{k}")(h, y))
            if k == 1 and self.up:
                h = enlarge(h)
            h = conv(features, size, f"conv{k}")(h)
        x = x[..., : self.features]
        return h + (enlarge(x) if self.up else x)


class DeepOutput(nn.Module):
    """Turn features into an image; the channels after the third are not used.

    Attributes:
        norm: Makes the normalization.
    """

    norm: Callable[..., "TableNorm"]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        """Return the images, between -1 and 1."""
        x = nn.relu(self.norm(name="bn")(x))
        return jnp.tanh(conv(x.shape[-1], 3, "conv")(x)[..., :3])


class TableNorm(nn.Module):
    """BatchNorm with frozen statistics that depend on the truncation.

    Statistics: `mean` and `var`, each (c, truncations). With a condition the
    parameters are those of `ClassBatchNorm`, without `scale` and `bias`.

    Attributes:
        truncations: Length of the tables.
        truncation: Where to read them.
        epsilon: Added to the variance.
    """

    truncations: int
    truncation: float
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the normalized features."""
        c = x.shape[-1]
        mean = self._table("mean", jnp.zeros, c)
        var = self._table("var", jnp.ones, c)
        x = (x - mean) / jnp.sqrt(var + self.epsilon)
        if y is not None:
            return modulate(x, y)
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return x * scale[None, None, None] + bias[None, None, None]

    def _table(self, name: str, start, c: int) -> Float[Array, "1 1 1 c"]:
        """Read a table, between two entries where the truncation lies between."""
        if not 0 < self.truncation <= 1:
            raise ValueError(f"truncation is {self.truncation}, expected 0 < t <= 1")
        shape = (c, self.truncations)
        table = self.variable("batch_stats", name, start, shape).value
        place, low = math.modf(self.truncation / (1 / (self.truncations - 1)))
        row = table[:, int(low)]
        if place:
            # These weights look swapped, but are what the published package computes.
            row = place * row + (1 - place) * table[:, int(low) + 1]
        return row[None, None, None]
