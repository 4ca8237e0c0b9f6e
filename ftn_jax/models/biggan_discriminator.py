"""Define BigGAN's discriminator, for pretraining a generator from scratch."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftn_jax.models.biggan_layers import ORTHOGONAL, SelfAttention, conv


class DownBlock(nn.Module):
    """Judge features with a residual block; average pooling halves the resolution.

    Attributes:
        features: Channels of the output.
        down: Whether the resolution halves.
        relu_first: Whether a ReLU comes first (not on images).
    """

    features: int
    down: bool
    relu_first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        """Return the block's output."""
        h = nn.relu(x) if self.relu_first else x
        h = conv(self.features, 3, "conv1")(h)
        h = conv(self.features, 3, "conv2")(nn.relu(h))
        if self.down:
            h, x = (nn.avg_pool(t, (2, 2), (2, 2)) for t in (h, x))
        if self.down or x.shape[-1] != self.features:
            x = conv(self.features, 1, "conv_sc")(x)
        return h + x


class BigGANDiscriminator(nn.Module):
    """Score images of a class: high for real ones (projection discriminator).

    All kernels and the embedding are to be run spectrally normalized, see
    `ftn_jax.models.spectral`.

    Attributes:
        channels: Of each block's output.
        down: Whether each block halves the resolution.
        num_classes: Rows of the class embedding.
        attention: Resolutions (px) after whose block self-attention follows.

    Source: Brock et al. (2019), Tables 4 to 6; Miyato and Koyama, "cGANs with
    projection discriminator" (2018), eq. 3.
    """

    channels: tuple[int, ...]
    down: tuple[bool, ...]
    num_classes: int
    attention: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], y: Int[Array, " b"]
    ) -> Float[Array, " b"]:
        """Return the scores of images `x` as images of the classes `y`."""
        for i, (features, down) in enumerate(
            zip(self.channels, self.down, strict=True)
        ):
            x = DownBlock(features, down, i > 0, name=f"block{i}")(x)
            if x.shape[1] in self.attention:
                x = SelfAttention(name=f"attention{i}")(x)
        h = jnp.sum(nn.relu(x), axis=(1, 2))
        embedded = nn.Embed(
            self.num_classes,
            self.channels[-1],
            embedding_init=ORTHOGONAL,
            name="embedding",
        )(y)
        score = nn.Dense(1, kernel_init=ORTHOGONAL, name="score")(h)
        return score[:, 0] + jnp.sum(embedded * h, axis=1)
