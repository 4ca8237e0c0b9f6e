"""Series residual adapters: a 1x1 convolution after a kernel.

Source: Rebuffi, Bilen, Vedaldi, "Learning multiple visual domains with residual
adapters" (arXiv 1705.08045).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static
from ftn_jax.nodes.matrix import matrix_shape
from ftn_jax.nodes.pointwise import PointwiseInit, add_on_outputs, start_pointwise


class SeriesAdapter(Node):
    """Put a residual 1x1 convolution after the kernel: `W' = W @ (I + alpha)`.

    `y = z + conv_alpha(z)`, `z = conv_W(x)`, with alpha (C_out, C_out) acting on the
    output axis; exact for every kernel size, stride, dilation and padding. A bias b of
    the layer itself would become `b @ (I + alpha)`: give such a bias a node of its own
    that trains it (`Replace`), which takes up the shift.

    Not for grouped and depthwise kernels: a convolution that mixes the outputs of
    several groups does not fit into them. Here, filters would be mixed across groups,
    each reading its own group's inputs; a node cannot see the groups, so it does not
    refuse them.

    The released code has a BatchNorm inside, `y = z + conv_alpha(BN(z))`. Batch
    statistics are no function of the weight, so that form trains as a network of its
    own; in evaluation it is this node, see `fold_inner_bn`. The original also needs
    its adapters in pretraining: behind an off-the-shelf network they gave 70.72 % on
    CIFAR-100 and not 80.17 % (the released code's README).

    Source: arXiv 1705.08045, residual adapter modules; arXiv 1803.10082, series
    residual adapters.

    Attributes:
        alpha: the 1x1 kernel, inputs first.
        inputs: how many leading axes of the weight are inputs; None for all but the
            last.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = SeriesAdapter.init(jax.random.key(0), w)
        >>> node.alpha.shape
        (32, 32)
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
    """

    alpha: Float[Array, "c_out c_out"]
    inputs: int | None = static(default=None)
    group: str = static(default="adapters")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        init: PointwiseInit = "zeros",
        inputs: int | None = None,
        group: str = "adapters",
    ) -> "SeriesAdapter":
        """Make the adapter of the weight `w`, in float32 or better.

        Args:
            key: PRNG key, used by `"normal"` only.
            w: the weight; only its shape and dtype are used.
            init: `"zeros"`, or the released code's `"normal"`, N(0, 2 / C_out), which
                starts far from the pretrained network.
            inputs: how many leading axes of w are inputs, 1 for attention kernels
                (d_model, heads, head_dim); default all but the last.
            group: optimizer group.

        Raises:
            ValueError: if no axis of w is left for the inputs or for the outputs, or
                for an unknown init.
        """
        _, n = matrix_shape(w.shape, inputs)
        return cls(start_pointwise(key, w, (n, n), init), inputs=inputs, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w @ (I + alpha)`, in w's dtype.

        Raises:
            ValueError: if alpha is not square over w's outputs.
        """
        _, n = matrix_shape(w.shape, self.inputs)
        if self.alpha.shape != (n, n):
            raise ValueError(
                f"alpha has the shape {self.alpha.shape}, the weight's shape {w.shape} "
                f"with inputs={self.inputs} needs {(n, n)}"
            )
        return add_on_outputs(w, self.alpha)


class FoldedAdapter(NamedTuple):
    """What an adapter with an inner BatchNorm is in evaluation.

    Attributes:
        node: the adapter without it.
        shift: (C_out,), added to every pixel after the merged kernel: subtract it
            from the running mean of the norm that follows.
    """

    node: SeriesAdapter
    shift: Float[Array, " c_out"]


def fold_inner_bn(
    node: SeriesAdapter,
    *,
    scale: Float[Array, " c_out"],
    bias: Float[Array, " c_out"],
    mean: Float[Array, " c_out"],
    var: Float[Array, " c_out"],
    epsilon: float = 1e-5,
) -> FoldedAdapter:
    """Take the BatchNorm of `y = z + conv_alpha(BN(z))` into alpha, for evaluation.

    With `s = scale / sqrt(var + epsilon)`: `alpha' = diag(s) alpha` and
    `y = z + conv_alpha'(z) + (bias - mean s) @ alpha`.

    Source: the series adapter of the code released with arXiv 1803.10082.

    Args:
        node: the adapter, as trained behind the BatchNorm.
        scale: the inner BatchNorm's.
        bias: the inner BatchNorm's.
        mean: its running mean.
        var: its running variance.
        epsilon: added to the variance.

    Raises:
        ValueError: if an array is not of alpha's size.
    """
    size = node.alpha.shape[:1]
    arrays = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    for name, x in arrays.items():
        if x.shape != size:
            raise ValueError(f"{name} has the shape {x.shape}, alpha needs {size}")
    gain = scale / jnp.sqrt(var + epsilon)
    shift = jnp.matmul(bias - mean * gain, node.alpha, precision="highest")
    return FoldedAdapter(node.replace(alpha=gain[:, None] * node.alpha), shift)
