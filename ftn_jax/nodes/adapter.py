"""Parallel residual adapters: a 1x1 convolution beside a kernel.

Source: Rebuffi, Bilen, Vedaldi, "Efficient parametrization of multi-domain deep neural
networks" (arXiv 1803.10082).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static
from ftn_jax.nodes.pointwise import (
    PointwiseInit,
    add_at_tap,
    find_tap,
    start_pointwise,
)


class ParallelAdapter(Node):
    """Add a 1x1 convolution beside the kernel: `W'[centre] = W[centre] + alpha`.

    `y = conv_W(x) + conv_alpha(x)` with a 1x1 kernel alpha (C_in, C_out) of the same
    stride is one convolution whose centre tap has alpha added, for any stride, dilation
    and padding of `(k - 1) / 2` on both sides, zeros or reflected pixels alike. The
    trap: with `padding="SAME"`, stride 2 and an even image side, Flax pads (0, 1), so
    that the 1x1 convolution sees what tap (0, 0) of a 3x3 kernel sees and the centre
    tap is the wrong place; give networks explicit padding, or this node `tap=(0, 0)`.

    A weight is read as `(taps..., C_in, C_out)`. For a grouped or depthwise kernel
    C_in is that of one group, and alpha is a 1x1 convolution of the same groups: one
    that mixes all channels does not fit into the kernel. A dense kernel has a single
    tap, where alpha is as large as the weight.

    Starts at the pretrained weight, as in ASTMT; the released code of the residual
    adapters draws alpha, see `init`.

    Source: arXiv 1803.10082, parallel residual adapters; zero start: ASTMT (Maninis,
    Radosavovic, Kokkinos, arXiv 1904.08918).

    Attributes:
        alpha: the 1x1 kernel.
        tap: where the kernel's taps take it.
        dropout: share of the input channels that `perturb` leaves out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = ParallelAdapter.init(jax.random.key(0), w)
        >>> node.alpha.shape, node.tap
        ((16, 32), (1, 1))
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
    """

    alpha: Float[Array, "c_in c_out"]
    tap: tuple[int, ...] = static()
    dropout: float = static(default=0.0)
    group: str = static(default="adapters")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "*taps c_in c_out"],
        *,
        init: PointwiseInit = "zeros",
        tap: Sequence[int] | None = None,
        dropout: float = 0.0,
        group: str = "adapters",
    ) -> "ParallelAdapter":
        """Make the adapter of the weight `w`, in float32 or better.

        Args:
            key: PRNG key, used by `"normal"` only.
            w: the weight; only its shape and dtype are used.
            init: `"zeros"`, or the released code's `"normal"`, N(0, 2 / C_out), which
                starts far from the pretrained network.
            tap: the place among w's taps, one index for each; default the centre.
            dropout: probability p of dropping an input channel of the branch in a
                training step (the original uses 0.5 on its widest networks); what is
                kept is multiplied by 1 / (1 - p).
            group: optimizer group.

        Raises:
            ValueError: if w has fewer than two axes, if a kernel of even size comes
                without a tap, or if tap, dropout or init is not one of the above.
        """
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {dropout!r}")
        tap = find_tap(w.shape, tap)
        alpha = start_pointwise(key, w, w.shape[-2:], init)
        return cls(alpha, tap=tap, dropout=float(dropout), group=group)

    def merge(self, w: Float[Array, "*taps c_in c_out"]) -> Float[Array, "..."]:
        """Return `w` with alpha added at the tap, in w's dtype.

        Raises:
            ValueError: if the adapter is not of w's channels and taps.
        """
        return add_at_tap(w, self.alpha, self.tap)

    def perturb(self, key: Key[Array, ""]) -> "ParallelAdapter":
        """Drop input channels of the branch for one training step.

        A weight is the same for all images of a (micro-)batch, and so is the mask
        here: the original's Dropout2d draws one for each image. The expected branch
        is the same, its noise is shared by the batch. In a grouped kernel a dropped
        channel is dropped in every group.
        """
        if not self.dropout:
            return self
        keep = 1 - self.dropout
        mask = jax.random.bernoulli(key, keep, self.alpha.shape[:1])[:, None]
        kept = self.alpha / jnp.asarray(keep, self.alpha.dtype)
        return self.replace(alpha=jnp.where(mask, kept, jnp.zeros_like(kept)))
