"""Compressed parallel adapters: alpha as the product of two thin matrices.

Source: Rebuffi, Bilen, Vedaldi, "Efficient parametrization of multi-domain deep neural
networks" (arXiv 1803.10082), cross-domain adapter compression. `ftn_jax.compress` makes
them of trained adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, beside, static
from ftn_jax.nodes.matrix import product
from ftn_jax.nodes.pointwise import add_at_tap, find_tap

BASIS = "adapter_basis"
"""The kind, beside the backbone, of what `SharedBasisAdapter` reads."""


class FactoredAdapter(Node):
    """Add a 1x1 convolution of low rank beside the kernel: `W'[centre] += beta gamma`.

    beta is (C_in, K) and gamma (K, C_out), the transpose of the paper's; both are the
    task's and both are trained. As `ParallelAdapter` in what a weight's axes are, in
    the tap, and in groups. At K = min(C_in, C_out) / 2 a square adapter is as large
    as the full one: below that it saves.

    Source: arXiv 1803.10082, SVD of each task's adapters by themselves.

    Attributes:
        beta: from input channels to K.
        gamma: from K to output channels.
        tap: where the kernel's taps take the product.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = FactoredAdapter.init(jax.random.key(0), w, rank=0.25)
        >>> node.beta.shape, node.gamma.shape
        ((16, 4), (4, 32))
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
    """

    beta: Float[Array, "c_in k"]
    gamma: Float[Array, "k c_out"]
    tap: tuple[int, ...] = static()
    group: str = static(default="adapters")

    @property
    def alpha(self) -> Float[Array, "c_in c_out"]:
        """The 1x1 kernel `beta gamma`."""
        return product(self.beta, self.gamma, self.gamma.dtype)

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "*taps c_in c_out"],
        *,
        rank: int | float,
        tap: Sequence[int] | None = None,
        group: str = "adapters",
    ) -> "FactoredAdapter":
        """Start a new task: beta LeCun-normal, gamma zero, in float32 or better.

        Only gamma is zero: with both at zero no gradient would reach either.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            rank: K, see `resolve_rank`.
            tap: as in `ParallelAdapter.init`.
            group: optimizer group.

        Raises:
            ValueError: as `ParallelAdapter.init` and `resolve_rank`.
        """
        tap = find_tap(w.shape, tap)
        c_in, c_out = w.shape[-2:]
        k = resolve_rank(rank, min(c_in, c_out))
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        beta = jax.nn.initializers.lecun_normal()(key, (c_in, k), dtype)
        return cls(beta, jnp.zeros((k, c_out), dtype), tap=tap, group=group)

    def merge(self, w: Float[Array, "*taps c_in c_out"]) -> Float[Array, "..."]:
        """Return `w` with the product added at the tap, in w's dtype.

        Raises:
            ValueError: if the adapter is not of w's channels and taps.
        """
        return add_at_tap(w, self.alpha, self.tap)


class SharedBasisAdapter(Node):
    """Add a 1x1 convolution in a basis common to all tasks: `W'[centre] += beta gamma`.

    beta (C_in, K), the left singular vectors of all tasks' adapters side by side times
    their singular values, lies beside the backbone and is frozen; a task trains its
    gamma (K, C_out). As `ParallelAdapter` in what a weight's axes are, in the tap, and
    in groups. A new task reuses beta.

    Source: arXiv 1803.10082, joint SVD of all tasks' adapters.

    Attributes:
        gamma: from K to output channels.
        tap: where the kernel's taps take the product.
        beta: from input channels to K; beside the backbone.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w, beta = jnp.ones((3, 3, 16, 32)), jnp.ones((16, 4))
        >>> extra = {"adapter_basis": {"beta": beta}}
        >>> node = SharedBasisAdapter.init(jax.random.key(0), w, extra=extra)
        >>> node.gamma.shape, node.beta is None
        ((4, 32), True)
    """

    gamma: Float[Array, "k c_out"]
    tap: tuple[int, ...] = static()
    beta: Float[Array, "c_in k"] | None = beside(BASIS)
    group: str = static(default="adapters")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "*taps c_in c_out"],
        *,
        extra: Mapping[str, Mapping[str, Any]],
        tap: Sequence[int] | None = None,
        group: str = "adapters",
    ) -> "SharedBasisAdapter":
        """Start a new task at the pretrained weight: gamma zero, float32 or better.

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            extra: what lies beside the backbone at this path: `"adapter_basis"`.
            tap: as in `ParallelAdapter.init`.
            group: optimizer group.

        Raises:
            ValueError: as `ParallelAdapter.init`, or if there is no basis for the
                weight's input channels.
        """
        tap = find_tap(w.shape, tap)
        c_in, c_out = w.shape[-2:]
        if "beta" not in extra.get(BASIS, {}):
            raise ValueError(
                f"found no {BASIS!r} beside the backbone for this weight; make it with "
                "ftn_jax.compress.compress_jointly, or extend the backbone by "
                "joint_bases"
            )
        beta = extra[BASIS]["beta"]
        if beta.ndim != 2 or beta.shape[0] != c_in:
            raise ValueError(
                f"the basis has the shape {beta.shape}, the weight of shape {w.shape} "
                f"needs ({c_in}, K)"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        gamma = jnp.zeros((beta.shape[1], c_out), dtype)
        return cls(gamma, tap=tap, beta=None, group=group)

    def merge(self, w: Float[Array, "*taps c_in c_out"]) -> Float[Array, "..."]:
        """Return `w` with the product added at the tap, in w's dtype.

        Raises:
            ValueError: if the node is not complete, or not of w's channels and taps.
        """
        if self.beta is None:
            raise ValueError(
                f"beta lies beside the backbone ({BASIS!r}) and is not filled in; "
                "merge through ftn_jax.materialize"
            )
        alpha = product(self.beta, self.gamma, self.gamma.dtype)
        return add_at_tap(w, alpha, self.tap)


def resolve_rank(rank: int | float, limit: int) -> int:
    """Return a rank given as a number, or as a share of the largest there is.

    Args:
        rank: an integer >= 1, cut to `limit` so that one number serves all layers; or
            a float in (0, 1], that share of `limit`, rounded down but at least 1.
        limit: the largest rank, min(C_in, C_out) for an adapter.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool):
        if rank >= 1:
            return min(int(rank), limit)
    elif isinstance(rank, (float, np.floating)) and 0 < rank <= 1:
        return max(int(rank * limit), 1)
    raise ValueError(
        f"rank must be an integer >= 1 or a share in (0, 1], found {rank!r}"
    )
