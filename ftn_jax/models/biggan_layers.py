"""Layers that BigGAN's generators and discriminator are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ORTHOGONAL = nn.initializers.orthogonal()


def conv(features: int, size: int, name: str, *, use_bias: bool = True) -> nn.Conv:
    """Make a convolution of stride 1 that keeps the image's size (odd `size`)."""
    pad = (size // 2, size // 2)
    return nn.Conv(
        features,
        (size, size),
        padding=(pad, pad),
        use_bias=use_bias,
        kernel_init=ORTHOGONAL,
        name=name,
    )


def enlarge(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Double height and width: every pixel becomes four."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class ClassBatchNorm(nn.Module):
    """Normalize, then scale and shift by what a vector says: `x (1 + gain y) + bias y`.

    Parameters: `gain/kernel` and `bias/kernel`, each (len(y), c). Statistics:
    `stats/{mean,var}`.

    Attributes:
        momentum: Share of the old running statistics kept at an update.
        epsilon: Added to the variance.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b h w c"]:
        """Return the normalized features."""
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            use_scale=False,
            use_bias=False,
            use_fast_variance=False,
            name="stats",
        )(x)
        return modulate(x, y)


def modulate(
    x: Float[Array, "b h w c"], y: Float[Array, "b d"]
) -> Float[Array, "b h w c"]:
    """Scale and shift each channel; the layers `gain` and `bias` belong to the caller.

    Call it inside a compact module.
    """

    def linear(name: str) -> Float[Array, "b 1 1 c"]:
        layer = nn.Dense(x.shape[-1], use_bias=False, kernel_init=ORTHOGONAL, name=name)
        return layer(y)[:, None, None]

    return x * (1 + linear("gain")) + linear("bias")


class SelfAttention(nn.Module):
    """Let each pixel attend to all, keys and values pooled 2 x 2: `x + gamma o`.

    Parameters: `{theta,phi,g,o}/kernel` (1x1, no bias) and the scalar `gamma`, which
    starts at zero. The attention is not scaled.

    Source: Zhang et al., "Self-attention GANs" (2019), as in BigGAN.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return `x` plus what it attends to; height and width are even."""
        b, h, w, c = x.shape

        def pixels(name: str, features: int, pool: bool) -> Float[Array, "b n f"]:
            found = conv(features, 1, name, use_bias=False)(x)
            if pool:
                found = nn.max_pool(found, (2, 2), (2, 2))
            return found.reshape(b, -1, features)

        theta, phi = pixels("theta", c // 8, False), pixels("phi", c // 8, True)
        g = pixels("g", c // 2, True)
        weights = jax.nn.softmax(jnp.einsum("bnf,bmf->bnm", theta, phi))
        found = jnp.einsum("bnm,bmf->bnf", weights, g).reshape(b, h, w, c // 2)
        gamma = self.param("gamma", nn.initializers.zeros, ())
        return x + gamma * conv(c, 1, "o", use_bias=False)(found)
