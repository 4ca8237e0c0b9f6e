"""KAdaptation: a sum of Kronecker products, half of it common to many layers."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, frozen, static, tied
from ftn_jax.nodes.matrix import add, check_matrix, check_rank, is_whole, matrix_shape

KroneckerInit = Literal["identity", "glorot", "zeros"]


class Kronecker(Node):
    """Add `scale * sum_i A_i (x) (u_i v_i)`; starts exactly at the pretrained weight.

    The weight is a matrix (inputs, outputs); the n terms have `A_i` of (n, n), `u_i`
    of (inputs / n, rank) and `v_i` of (rank, outputs / n). `A_i = a_i b_i^T` is the
    slow weight, which all nodes of one `share` label have in common: give the query and
    the value kernels of a network a label each. Row `i1 * inputs / n + i2` of the
    product belongs to row i1 of `A_i` and row i2 of `u_i v_i`.

    The released code's defaults are kept (n = 32, rank 1, `scale`, slow weights uniform
    in +-0.01) but for its start, which has `u` and `v` both zero: no gradient would
    ever reach a factor. Here `v` alone is zero. The code also reorders the branch's
    output between heads and tokens, and adds it to a query already divided by
    sqrt(head_dim); both make it no change of a weight, and are left out. The bias of
    d_model values per layer that it trains beside the products is a node of its own
    (`Replace` on a bias): with it ViT-B/32 counts 50,176.

    Source: KAdaptation (arXiv 2203.16329), method section. The default `scale` of 160
    is the code's: LoRA's alpha / r = 128 / 4, times 5.

    Attributes:
        slow: `(a, b)`, rows `a_i` and `b_i` of (n, n), or the full `(A,)` (n, n, n).
        u: left fast factors (n, inputs / n, rank).
        v: right fast factors (n, rank, outputs / n).
        dropout_key: what `perturb` draws the dropout from; None otherwise.
        scale: multiplies the update.
        dropout: share of the update's entries that a training step leaves out (the
            others grow by 1 / (1 - dropout)); the code has 0.5.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((768, 12, 64))  # a query kernel
        >>> node = Kronecker.init(jax.random.key(0), w, share="query", inputs=1)
        >>> [x.shape for x in (*node.slow, node.u, node.v)]
        [(32, 32), (32, 32), (32, 24, 1), (32, 1, 24)]
        >>> bool((node.merge(w) == w).all())
        True
    """

    slow: tuple[Float[Array, "..."], ...] = tied()
    u: Float[Array, "n rows rank"]
    v: Float[Array, "n rank columns"]
    dropout_key: Key[Array, ""] | None = frozen(default=None)
    scale: float = static(default=160.0)
    dropout: float = static(default=0.0)
    share: str | None = static(default=None)
    group: str = static(default="factors")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        n: int = 32,
        rank: int = 1,
        share: str | None = None,
        init: KroneckerInit = "identity",
        slow_bound: float = 0.01,
        factorised: bool = True,
        scale: float = 160.0,
        dropout: float = 0.0,
        inputs: int | None = None,
        group: str = "factors",
    ) -> "Kronecker":
        """Make the factors for the weight `w`, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            n: number of terms, and the size of each `A_i`; must divide the numbers of
                inputs and of outputs.
            rank: of each `u_i v_i`.
            share: label of the nodes that have the slow weights in common. Default:
                this node has its own.
            init: of the fast factors. `"identity"`: `u` Glorot-uniform (gain sqrt 2,
                the code's), `v` zero. `"glorot"`: both Glorot-uniform, which starts
                away from the pretrained weight. `"zeros"`: both zero, the released
                code's start; dead: every gradient is zero for ever.
            slow_bound: the slow weights start uniform in +- this.
            factorised: whether the slow weights are `a_i b_i^T` or full matrices.
            scale: multiplies the update.
            dropout: see the class.
            inputs: how many leading axes of w are inputs. Default: all but the last;
                a Flax query kernel (d_model, heads, head_dim) wants 1.
            group: optimizer group.

        Raises:
            ValueError: if the weight has no inputs and outputs, n does not divide them
                (names what does), the rank is not a positive integer, the init is
                unknown, or dropout is not in [0, 1).
        """
        check_rank(rank)
        rows, columns = matrix_shape(w.shape, inputs)
        common = math.gcd(rows, columns)
        if not is_whole(n) or n < 1 or common % n:
            fitting = [d for d in range(1, common + 1) if common % d == 0]
            raise ValueError(
                f"n must divide {rows} inputs and {columns} outputs, found {n!r}; "
                f"choose one of {fitting}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {dropout!r}")
        if init not in ("identity", "glorot", "zeros"):
            raise ValueError(f"init must be identity, glorot or zeros, found {init!r}")
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        keys = jax.random.split(key, 4)
        shapes = (n, rows // n, rank), (n, rank, columns // n)
        u, v = (_glorot(k, s, dtype) for k, s in zip(keys, shapes, strict=False))
        if init == "identity":
            v = jnp.zeros_like(v)
        elif init == "zeros":
            u, v = jnp.zeros_like(u), jnp.zeros_like(v)
        parts = [(n, n), (n, n)] if factorised else [(n, n, n)]
        slow = tuple(
            jax.random.uniform(k, s, dtype, -slow_bound, slow_bound)
            for k, s in zip(keys[2:], parts, strict=False)
        )
        return cls(
            slow, u, v, scale=float(scale), dropout=dropout, share=share, group=group
        )

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w` plus the update, in w's dtype.

        The sum is formed in the factors' precision and rounded once.

        Raises:
            ValueError: if the products do not have w's shape, or the slow weights
                have another n than the fast ones.
        """
        n, height, _ = self.u.shape
        width = self.v.shape[2]
        check_matrix(w.shape, n * height, n * width, "Kronecker")
        if any(size != n for x in self.slow for size in x.shape):
            raise ValueError(
                f"slow weights of shape {[x.shape for x in self.slow]} do not go with "
                f"n = {n} fast factors; give nodes of another n another share label"
            )
        dtype = jnp.promote_types(w.dtype, self.u.dtype)
        u, v, *slow = (x.astype(dtype) for x in (self.u, self.v, *self.slow))
        # At full precision: accelerators would round the factors to TF32 or bf16.
        outer = jnp.einsum("ia,ic->iac", *slow) if len(slow) == 2 else slow[0]
        inner = jnp.einsum("ikr,irp->ikp", u, v, precision="highest")
        update = jnp.einsum("iac,ikp->akcp", outer, inner, precision="highest")
        update = update.reshape(w.shape)
        if self.dropout_key is not None:
            kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, w.shape)
            update = jnp.where(kept, update / (1 - self.dropout), 0)
        return add(w, update, self.scale)

    def perturb(self, key: Key[Array, ""]) -> "Kronecker":
        """Return the node that leaves out a share `dropout` of the update's entries.

        A share of zero returns the node itself.
        """
        return self.replace(dropout_key=key) if self.dropout else self


def _glorot(key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Draw each term uniform in +- sqrt(2) sqrt(6 / (fan in + fan out))."""
    bound = math.sqrt(2 * 6 / sum(shape[1:]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
