"""Define BigGAN's generator; `biggan_family` names the published shapes of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftn_jax.models.biggan_layers import (
    ORTHOGONAL,
    ClassBatchNorm,
    SelfAttention,
    conv,
    enlarge,
)


class UpBlock(nn.Module):
    """Double the resolution with a residual block.

    Parameters: `bn{1,2}/{gain,bias}/kernel`, `conv{1,2}/{kernel,bias}` (3x3) and
    `conv_sc/{kernel,bias}` (the shortcut, 1x1).

    Attributes:
        features: Channels of the output.
        momentum: Of the running statistics.
    """

    features: int
    momentum: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Return the block's output for features `x` and condition `y`."""
        h = nn.relu(ClassBatchNorm(self.momentum, name="bn1")(x, y, train))
        h = conv(self.features, 3, "conv1")(enlarge(h))
        h = nn.relu(ClassBatchNorm(self.momentum, name="bn2")(h, y, train))
        h = conv(self.features, 3, "conv2")(h)
        # Published the other way round; a 1x1 convolution does not see the difference.
        return h + enlarge(conv(self.features, 1, "conv_sc")(x))


class BigGAN(nn.Module):
    """Draw an image from a latent vector and a class (NHWC, between -1 and 1).

    The latent vector falls into one chunk for the first layer and one for each block,
    which sees it beside the class vector. Parameter paths: `embedding/embedding`,
    `first/{kernel,bias}`, `block{i}/...` (see `UpBlock`), `attention{i}/...` (after
    block i), `output/bn/{scale,bias}`, `output/conv/{kernel,bias}`. All kernels are
    those that run: where a network is trained with spectral normalization they are
    W / sigma, see `ftn_jax.models.spectral`.

    Attributes:
        channels: Of the first 4x4 features, then of each block's output.
        num_classes: Rows of the class embedding.
        chunk: Length of one chunk of the latent vector.
        shared_dim: Length of a class vector.
        attention: Resolutions (px) after whose block self-attention follows.
        bn_momentum: Share of the old running statistics kept at an update.

    Source: Brock et al., "Large scale GAN training for high fidelity natural image
    synthesis" (2019), Appendix B.1, as the authors' PyTorch code has it.
    """

    channels: tuple[int, ...]
    num_classes: int = 1000
    chunk: int = 20
    shared_dim: int = 128
    attention: tuple[int, ...] = (64,)
    bn_momentum: float = 0.9

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.channels) - 1

    @property
    def resolution(self) -> int:
        """Height and width of the images, px."""
        return 4 * 2**self.blocks

    @property
    def dim_z(self) -> int:
        """Length of the latent vector."""
        return self.chunk * (self.blocks + 1)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b dim_z"],
        y: Int[Array, " b"] | Float[Array, "b shared_dim"],
        train: bool = False,
    ) -> Float[Array, "b h w 3"]:
        """Return the images.

        Args:
            z: Latent vectors, drawn from N(0, 1).
            y: Class indices, or class vectors (rows of the embedding, or mixtures).
            train: Normalize with the batch's statistics and update `batch_stats`.

        Raises:
            ValueError: If `z` or `y` has another length.
        """
        check_lengths(z, y, self.dim_z, self.shared_dim)
        if y.ndim == 1:
            y = nn.Embed(
                self.num_classes,
                self.shared_dim,
                embedding_init=ORTHOGONAL,
                name="embedding",
            )(y)
        chunks = jnp.split(z, self.blocks + 1, axis=1)
        first = nn.Dense(self.channels[0] * 16, kernel_init=ORTHOGONAL, name="first")
        # Channels first, as the published weights are laid out.
        x = first(chunks[0]).reshape(-1, self.channels[0], 4, 4).transpose(0, 2, 3, 1)
        for i, chunk in enumerate(chunks[1:]):
            block = UpBlock(self.channels[i + 1], self.bn_momentum, name=f"block{i}")
            x = block(x, jnp.concatenate([y, chunk], axis=1), train)
            if x.shape[1] in self.attention:
                x = SelfAttention(name=f"attention{i}")(x)
        return Output(self.bn_momentum, name="output")(x, train)


class Output(nn.Module):
    """Turn features into an image: BatchNorm, ReLU, 3x3 convolution, tanh.

    Attributes:
        momentum: Of the running statistics.
    """

    momentum: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b h w 3"]:
        """Return the images, between -1 and 1."""
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=1e-5,
            use_fast_variance=False,
            name="bn",
        )(x)
        return jnp.tanh(conv(3, 3, "conv")(nn.relu(x)))


def check_lengths(z: jax.Array, y: jax.Array, dim_z: int, class_dim: int) -> None:
    """Refuse latent or class vectors of another length.

    Raises:
        ValueError: With what was found and what is expected.
    """
    if z.ndim != 2 or z.shape[1] != dim_z:
        raise ValueError(f"z has shape {z.shape}, expected (batch, {dim_z})")
    indices = y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)
    if not indices and (y.ndim != 2 or y.shape[1] != class_dim):
        raise ValueError(
            f"y is {y.dtype} of shape {y.shape}, expected class indices of shape "
            f"(batch,) or class vectors of shape (batch, {class_dim})"
        )
    if y.shape[0] != z.shape[0]:
        raise ValueError(f"{z.shape[0]} latent vectors but {y.shape[0]} classes")
