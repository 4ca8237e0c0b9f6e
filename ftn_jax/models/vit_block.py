"""Define the parts of a ViT: attention, MLP and the block of the two."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]

_DENSE_INIT = nn.initializers.xavier_uniform()


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `x * sigmoid(1.702 x)`, up to 0.02 away from the exact GELU.

    Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016), section 2; CLIP
    was trained with it.
    """
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
        "quick_gelu": quick_gelu,
    }
)
"""Every activation of the MLP by name."""


class Attention(nn.Module):
    """Mix the tokens by multi-head self-attention.

    Kernels keep their heads as an axis: `{query,key,value}/kernel` is
    (width, heads, head_dim) and `out/kernel` is (heads, head_dim, width).

    Attributes:
        heads: Number of heads; head_dim is width / heads.
        dtype: Type of the arithmetic.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.
    """

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Return `concat_h(softmax(q_h k_h' / sqrt(head_dim)) v_h) W_out + b_out`."""
        width = x.shape[-1]
        dense = partial(nn.DenseGeneral, kernel_init=_DENSE_INIT, dtype=self.dtype)
        project = partial(dense, (self.heads, width // self.heads))
        y = jax.nn.dot_product_attention(
            project(name="query")(x), project(name="key")(x), project(name="value")(x)
        )
        return dense(width, axis=(-2, -1), name="out")(y)


class Mlp(nn.Module):
    """Change each token by itself: `fc2(activation(fc1(x)))`.

    Attributes:
        hidden: Width between `fc1` and `fc2`.
        activation: Name of the activation.
        dropout: Makes the dropout that follows each of the two.
        dtype: Type of the arithmetic.
    """

    hidden: int
    activation: Activation
    dropout: Callable[[], nn.Dropout]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Return the changed tokens."""
        dense = partial(nn.Dense, kernel_init=_DENSE_INIT, dtype=self.dtype)
        y = ACTIVATIONS[self.activation](dense(self.hidden, name="fc1")(x))
        y = dense(x.shape[-1], name="fc2")(self.dropout()(y))
        return self.dropout()(y)


class TransformerBlock(nn.Module):
    """Add attention, then the MLP, to the tokens, each behind a LayerNorm (pre-LN).

    Attributes:
        heads: Number of attention heads.
        hidden: Width inside the MLP.
        activation: Name of the MLP's activation.
        norm: Makes a LayerNorm, given its name.
        dropout: Makes the dropout that follows every dense layer but query, key and
            value.
        dtype: Type of the arithmetic.

    Source: Dosovitskiy et al., "An image is worth 16x16 words" (2021), eq. 2 and 3,
    dropout in appendix B.1.
    """

    heads: int
    hidden: int
    activation: Activation
    norm: Callable[..., nn.LayerNorm]
    dropout: Callable[[], nn.Dropout]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Return the tokens after both residual branches."""
        attention = Attention(self.heads, dtype=self.dtype, name="attention")
        mlp = Mlp(
            self.hidden, self.activation, self.dropout, dtype=self.dtype, name="mlp"
        )
        x = x + self.dropout()(attention(self.norm(name="norm1")(x)))
        return x + mlp(self.norm(name="norm2")(x))
