"""Latent Tucker: the kernels of a stage as one tensor, small matrices for each task.

Source: Bulat, Kossaifi, Tzimiropoulos, Pantic, "Incremental multi-domain learning with
network latent tensor factorization" (arXiv 1904.06345).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, beside, is_node, static, tied

TUCKER = "tucker"
"""The kind, beside the backbone, of what `Tucker` reads."""


class Tucker(Node):
    """Read the kernel off a stage's tensor: `W' = (K x0 F0 x1 F1 ... x5 F5)[b, c]`.

    The core K has the axes (blocks, convs, *kernel): `K[b, c]` is the convolution c of
    block b, in HWIO, of a group of equal kernels. `xi Fi` multiplies axis i by the
    task's Fi (size, rank), which all nodes of the group have in common. K is frozen
    and lies beside the backbone under the group's label. With F_i = I the task has
    the pretrained weight, bit for bit.

    The merge reads K and not the weight. A kernel with fewer channels than the core
    (`tucker_cores(..., pad=True)`) takes the first ones of the result.

    The original trains K and the source task's factors together on ImageNet; here K
    is what a plain checkpoint holds, or a part of it, see `tucker_cores`. Its authors
    released no code: which kernels they group, and how the first block's narrower
    kernel enters, is our reading of their counts.

    Source: arXiv 1904.06345, the latent tensor of a group of blocks.

    Attributes:
        factors: F_i, one `(size, rank)` matrix for each axis of the core.
        index: (block, conv), the kernel's place in the core.
        share: the group's label.
        core: K; beside the backbone.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kernels = jnp.arange(2 * 2 * 3 * 3 * 8 * 8.0).reshape(2, 2, 3, 3, 8, 8)
        >>> node = Tucker.init(
        ...     jax.random.key(0), kernels[1, 0],
        ...     share="layer1", index=(1, 0), stack={"core": kernels},
        ... )
        >>> [f.shape for f in node.factors]
        [(2, 2), (2, 2), (3, 3), (3, 3), (8, 8), (8, 8)]
        >>> merged = node.replace(core=kernels).merge(kernels[1, 0])
        >>> bool((merged == kernels[1, 0]).all())  # starts at the pretrained network
        True
    """

    reads_weight: ClassVar[bool] = False
    factors: tuple[Float[Array, "size rank"], ...] = tied()
    index: tuple[int, int] = static()
    share: str | None = static()
    core: Float[Array, "blocks convs ..."] | None = beside(TUCKER)
    group: str = static(default="factors")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        share: str,
        index: Sequence[int],
        stack: Mapping[str, Any],
        group: str = "factors",
    ) -> "Tucker":
        """Start at the core's own kernels: factors at identity, float32 or better.

        `tucker_rules` fills these arguments in.

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            share: the group's label.
            index: (block, conv), the kernel's place in the core.
            stack: the label's entry of `tucker_cores`; where the core was cut, the
                factors start at the source's that lie with it.
            group: optimizer group.

        Raises:
            ValueError: if w is a vector, the index is none of the core's, or w does
                not fit the core.
        """
        if w.ndim < 2:
            raise ValueError(
                "a stack of kernels needs weights of two or more axes, found the shape "
                f"{w.shape}; train a bias or norm with Replace"
            )
        core = stack["core"]
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        factors = tuple(
            jnp.array(stack[source_name(axis)], dtype, copy=True)
            if source_name(axis) in stack
            else jnp.eye(size, dtype=dtype)
            for axis, size in enumerate(core.shape)
        )
        block, conv = (int(i) for i in index)
        node = cls(factors, index=(block, conv), share=share, core=None, group=group)
        _check(w.shape, core.shape, node)
        return node

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the kernel at the node's place, in w's shape and dtype.

        Raises:
            ValueError: if the node is not complete, or does not fit w.
        """
        if self.core is None or self.factors is None:
            raise ValueError(
                f"core lies beside the backbone ({TUCKER!r}, {self.share!r}) and the "
                "factors in another node, neither is filled in; merge through "
                "ftn_jax.materialize"
            )
        _check(w.shape, self.core.shape, self)
        dtype = jnp.promote_types(w.dtype, self.factors[0].dtype)
        blocks, convs, *others = (f.astype(dtype) for f in self.factors)
        rows = [f[:n] for f, n in zip(others, w.shape, strict=True)]
        inner = "".join(chr(ord("a") + n) for n in range(w.ndim))
        pairs = ",".join(x.upper() + x for x in inner)
        merged = jnp.einsum(
            f"yz{inner},y,z,{pairs}->{inner.upper()}",
            self.core.astype(dtype),
            blocks[self.index[0]],
            convs[self.index[1]],
            *rows,
            precision="highest",
        )
        return merged.astype(w.dtype)


def orthogonality(delta: Any, *, weight: float = 1.0) -> Float[Array, ""]:
    """Return `weight * sum ||F^T F - I||^2` over all groups' factors.

    Source: arXiv 1904.06345, the penalty on the task's factors.

    Args:
        delta: a task's tree.
        weight: of the sum.

    Raises:
        ValueError: if the delta has no `Tucker` node.
    """
    nodes = jax.tree.leaves(delta, is_leaf=is_node)
    held = [n.factors for n in nodes if isinstance(n, Tucker) and n.factors is not None]
    if not held:
        raise ValueError(
            "the delta has no Tucker node, whose factors could be orthogonal; leave "
            "the penalty out"
        )
    gaps = [
        jnp.matmul(f.T, f, precision="highest") - jnp.eye(f.shape[1], dtype=f.dtype)
        for factors in held
        for f in factors
    ]
    return weight * sum((jnp.sum(gap**2) for gap in gaps), start=jnp.zeros(()))


def source_name(axis: int) -> str:
    """Name the source task's factor of one axis of the core."""
    return f"source_{axis}"


def _check(shape: tuple[int, ...], core: tuple[int, ...], node: "Tucker") -> None:
    """Compare a weight, a core and factors; only channels may be fewer than stacked."""
    sizes, ranks = zip(*(f.shape for f in node.factors), strict=True)
    index_fits = all(0 <= i < n for i, n in zip(node.index, sizes[:2], strict=True))
    rest = sizes[2:]
    fits = len(shape) == len(rest) and shape[:-2] == rest[:-2]
    fits = fits and all(n <= m for n, m in zip(shape, rest, strict=True))
    if ranks != core or not index_fits or not fits:
        raise ValueError(
            f"a core of shape {core} with factors of sizes {sizes} and ranks {ranks} "
            f"has no kernel {node.index} for a weight of shape {shape}; give the core "
            "that was stacked with this weight"
        )
