"""FTN's node: a low-rank CP tensor added to the frozen weight.

Source: FTN (arXiv 2310.06124) eq. 2 and 4 for convolutions, and its transformer
section for attention projections.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static

CPInit = Literal["taps", "identity", "xavier", "normal"]


class CP(Node):
    """Add `scale * sum_r f1[:, r] o f2[:, r] o ... o fN[:, r]` to the weight.

    Each factor matrix stands for one group of the weight's axes. By default a kernel
    of four or more axes has its leading (spatial) axes taken together, the papers'
    `(k*k, C_in, C_out)`, and a weight of up to three axes has one factor for each:
    a Flax attention kernel `(d_model, heads, head_dim)` is the paper's three-way
    tensor as it stands. `axes=((0, 1, 2), (3,))` makes LoRA of the same kernel.

    Attributes:
        factors: one `(size of the axis group, rank)` matrix for each group.
        axes: for each factor, the weight's axes that it spans.
        scale: multiplies the update (alpha / rank in the papers).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = CP.init(jax.random.key(0), w, rank=2)
        >>> [f.shape for f in node.factors]
        [(9, 2), (16, 2), (32, 2)]
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
    """

    factors: tuple[Float[Array, "_ rank"], ...]
    axes: tuple[tuple[int, ...], ...] = static()
    scale: float = static(default=1.0)
    group: str = static(default="factors")

    def __post_init__(self) -> None:
        """Check that factors and axis groups belong together.

        Raises:
            ValueError: if ranks differ, a rank is 0, or the groups of axes are not
                a partition of `0 .. n-1` with one factor for each.
        """
        ranks = [f.shape[-1] for f in self.factors]
        if len(set(ranks)) != 1 or ranks[0] < 1:
            raise ValueError(f"factors need one common rank >= 1, found ranks {ranks}")
        _check_axes(self.axes, sum(map(len, self.axes)))
        if len(self.axes) != len(self.factors):
            raise ValueError(
                f"{len(self.factors)} factors for {len(self.axes)} axis groups"
            )

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.factors[0].shape[-1]

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        rank: int,
        init: CPInit | None = None,
        scale: float = 1.0,
        gain: float | None = None,
        std: float = 0.05,
        axes: Sequence[Sequence[int]] | None = None,
        group: str = "factors",
    ) -> "CP":
        """Make the factors for the weight `w`, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            rank: number of rank-one terms, at least 1.
            init: how the factors start. `"identity"`: Xavier-uniform but for the
                last factor, which is zero, so that the network starts exactly at the
                pretrained one. `"taps"`: like identity, but the first (spatial)
                factor starts as one-hot taps, the centre first, so that each term
                begins as a plain 1x1 path through one tap. `"xavier"`: every factor
                Xavier-uniform with fans (size, rank), the convolutional papers'
                choice; the start is 5 to 40 % away from the pretrained weight.
                `"normal"`: every factor N(0, std), the ViT paper's choice. Default:
                `"taps"` for weights of four or more axes in three or more groups,
                else `"identity"`.
            scale: multiplies the update.
            gain: store every factor but the last divided by `gain` and multiply
                `scale` by as much: the update is the same function, but Adam, whose
                step does not know the factors' size, moves it faster. Default: 3
                for `"taps"`, else 1.
            std: standard deviation of the `"normal"` init.
            axes: the axis group of each factor; see the class.
            group: optimizer group.

        Raises:
            ValueError: if the rank is not a positive integer, the gain is not
                positive, the axes are not a partition of w's, or `"taps"` is asked
                for with fewer than three factors.
        """
        whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
        if not whole or rank < 1:
            raise ValueError(f"rank must be an integer >= 1, found {rank!r}")
        spans = (
            _default_axes(w.ndim)
            if axes is None
            else tuple(tuple(int(a) for a in span) for span in axes)
        )
        _check_axes(spans, w.ndim)
        many = len(spans) >= 3
        init = init or ("taps" if w.ndim >= 4 and many else "identity")
        if init == "taps" and not many:
            raise ValueError(
                f"init 'taps' needs a spatial factor and two more, found axes {spans} "
                f"for a weight of shape {w.shape}; use 'identity'"
            )
        gain = (3.0 if init == "taps" else 1.0) if gain is None else gain
        if not gain > 0:
            raise ValueError(f"gain must be positive, found {gain!r}")
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        shapes = [(math.prod(w.shape[a] for a in span), rank) for span in spans]
        keys = jax.random.split(key, len(shapes))
        if init == "normal":
            factors = [
                std * jax.random.normal(k, s, dtype)
                for k, s in zip(keys, shapes, strict=True)
            ]
        elif init in ("xavier", "identity", "taps"):
            xavier = jax.nn.initializers.xavier_uniform()
            factors = [xavier(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
        else:
            raise ValueError(
                f"init must be taps, identity, xavier or normal, found {init!r}"
            )
        if init in ("identity", "taps"):
            # One zero factor, never two: with two every gradient would vanish.
            factors[-1] = jnp.zeros_like(factors[-1])
        if init == "taps":
            factors[0] = _one_hot_taps([w.shape[a] for a in spans[0]], rank, dtype)
        factors = [f / gain for f in factors[:-1]] + factors[-1:]
        scale = float(scale * gain ** (len(factors) - 1))
        return cls(tuple(factors), axes=spans, scale=scale, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w` plus the low-rank update, in w's dtype.

        The sum is formed in the factors' precision and rounded once.

        Raises:
            ValueError: if the factors' sizes are not those of w's axis groups.
        """
        found = tuple(f.shape[0] for f in self.factors)
        fits = sum(map(len, self.axes)) == w.ndim
        expected = fits and tuple(
            math.prod(w.shape[a] for a in span) for span in self.axes
        )
        if found != expected:
            raise ValueError(
                f"CP factors have sizes {found} over axes {self.axes}, the weight has "
                f"shape {w.shape}" + (f", which needs sizes {expected}" if fits else "")
            )
        letters = [chr(ord("a") + n) for n in range(len(self.factors))]
        # At full precision: accelerators would round the factors to TF32 or bf16.
        update = jnp.einsum(
            ",".join(f"{x}Z" for x in letters) + "->" + "".join(letters),
            *self.factors,
            precision="highest",
        )
        sizes = {f"x{a}": n for a, n in enumerate(w.shape)}
        grouped = " ".join(f"({' '.join(f'x{a}' for a in span)})" for span in self.axes)
        update = einops.rearrange(update, f"{grouped} -> {' '.join(sizes)}", **sizes)
        dtype = jnp.promote_types(w.dtype, update.dtype)
        merged = w.astype(dtype) + jnp.asarray(self.scale, dtype) * update.astype(dtype)
        return merged.astype(w.dtype)


def _default_axes(ndim: int) -> tuple[tuple[int, ...], ...]:
    spatial = max(ndim - 2, 1) if ndim > 3 else 1
    return (tuple(range(spatial)), *((a,) for a in range(spatial, ndim)))


def _check_axes(axes: tuple[tuple[int, ...], ...], ndim: int) -> None:
    if sorted(a for span in axes for a in span) != list(range(ndim)):
        raise ValueError(
            f"axis groups must name each of the weight's {ndim} axes once, found {axes}"
        )


def _one_hot_taps(shape: list[int], rank: int, dtype: Any) -> Float[Array, "taps rank"]:
    """Put term r on tap `r mod taps`, nearest to the centre first."""
    offsets = np.indices(shape).reshape(len(shape), -1).T - (np.array(shape) - 1) / 2
    order = np.argsort((offsets**2).sum(axis=1), kind="stable")
    taps = order[np.arange(rank) % len(order)]
    return jax.nn.one_hot(taps, len(order), axis=0, dtype=dtype)
