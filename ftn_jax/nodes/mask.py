"""Masks over the weights: a task is one bit (or two) for each of them.

A mask is trained as real numbers, hard in the forward pass and straight through in the
backward one. `compact()` keeps its bits alone: the same node type with `packed` in
`mask`'s place, which merges to the same weight bit for bit.

Source: Piggyback (arXiv 1801.06519) and Weight Transformations with Binary masks
(arXiv 1805.11119).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ftn_jax.node import Node, frozen, static
from ftn_jax.nodes.bits import pack_bits, straight_through, unpack_bits

MaskInit = Literal["constant", "uniform"]


class Piggyback(Node):
    """Multiply each weight by its own 0 or 1 (or -1).

        W' = W * M,    M = 1 where mask > threshold, else 0    (both of W's shape)

    With `ternary`, M is also -1 where mask < 0. The gradient goes straight through the
    threshold: d mask = d W' * W. As that grows with |W|, plain SGD flips hardly any
    bit: train the group with Adam (1e-4 in the paper: some 50 steps of one sign carry
    a mask from its start below the threshold). The released code's optional
    rescaling of the gradient is left out.

    Source: Mallya et al., "Piggyback" (arXiv 1801.06519), the binary masks and the
    threshold, start and ternary option of its code.

    Attributes:
        mask: the real mask, of the weight's shape; `None` once compact.
        packed: M's bits once compact: one for each weight (M = 1), then with
            `ternary` one more (M = -1).
        shape: the weight's shape, once compact.
        threshold: weights whose mask is strictly above it stay.
        ternary: whether weights may also change their sign.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.array([[1.0, -2.0], [3.0, 4.0]])
        >>> node = Piggyback.init(jax.random.key(0), w)
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
        >>> node = node.replace(mask=jnp.array([[1.0, 0.0], [5e-3, 6e-3]]))
        >>> node.merge(w).tolist()
        [[1.0, -0.0], [0.0, 4.0]]
        >>> node.compact().packed.tolist()  # 1001 0000
        [144]
    """

    mask: Float[Array, "..."] | None
    packed: UInt8[Array, " bytes"] | None = frozen(default=None)
    shape: tuple[int, ...] | None = static(default=None)
    threshold: float = static(default=5e-3)
    ternary: bool = static(default=False)
    group: str = static(default="masks")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        init: MaskInit = "constant",
        scale: float = 1e-2,
        threshold: float = 5e-3,
        ternary: bool = False,
        group: str = "masks",
    ) -> "Piggyback":
        """Start with every weight kept, or with a random choice of them.

        Args:
            key: PRNG key, used by `"uniform"` only.
            w: the weight; only its shape and dtype are used.
            init: `"constant"`: every mask at `scale`, so that the network starts at
                the pretrained one. `"uniform"`: masks from U(-scale, scale), which
                switches most weights off at once.
            scale: size of the start.
            threshold: see the class.
            ternary: see the class.
            group: optimizer group.

        Raises:
            ValueError: if no mask could start above the threshold, the threshold is
                negative, or the init is unknown.
        """
        if not 0 <= threshold < scale:
            raise ValueError(
                f"need 0 <= threshold < scale, found threshold={threshold!r} and "
                f"scale={scale!r}: every weight would start switched off"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        if init == "constant":
            mask = jnp.full(w.shape, scale, dtype)
        elif init == "uniform":
            mask = jax.random.uniform(key, w.shape, dtype, -scale, scale)
        else:
            raise ValueError(f"init must be constant or uniform, found {init!r}")
        return cls(mask, threshold=threshold, ternary=ternary, group=group)

    @property
    def signs(self) -> Float[Array, "..."]:
        """M, of the weight's shape: 0 or 1, and -1 with `ternary`."""
        if self.packed is None:
            assert self.mask is not None
            kept, flipped = self._bits(self.mask)
            hard = kept.astype(jnp.int8) - flipped.astype(jnp.int8)
            return straight_through(hard, self.mask)
        assert self.shape is not None
        if not self.ternary:
            return unpack_bits(self.packed, self.shape).astype(jnp.float32)
        kept, flipped = unpack_bits(self.packed, (2, *self.shape)).astype(jnp.float32)
        return kept - flipped

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the masked weight, in w's dtype.

        Raises:
            ValueError: if the mask has another shape than `w`.
        """
        signs = _fitting(self.signs, w)
        dtype = jnp.promote_types(w.dtype, signs.dtype)
        return (w.astype(dtype) * signs.astype(dtype)).astype(w.dtype)

    def compact(self) -> "Piggyback | None":
        """Return the node with packed bits; `None` if it keeps every weight."""
        if self.mask is None:
            return self
        kept, flipped = self._bits(np.asarray(self.mask))
        if kept.all():
            return None
        packed = pack_bits(np.stack([kept, flipped]) if self.ternary else kept)
        return self.replace(mask=None, packed=packed, shape=kept.shape)

    def _bits(self, mask: Any) -> tuple[Any, Any]:
        return mask > self.threshold, (mask < 0) & self.ternary


class AffineMask(Node):
    """Shift and scale the weight by a binary mask and three numbers (WTPB).

        W' = W + k1 + k2 * M + k3 * (W * M),    M = 1 where mask > 0, else 0

    with mask and M of W's shape and `scales` = (k1, k2, k3). All k start at zero, so
    the network starts at the pretrained one; the mask then has no gradient until k2
    or k3 have moved, that is for one step. k1 shifts every weight, also where M = 0.
    The paper's k0, which multiplies W, is fixed to 1, as in the code that could be
    read (see Source).

    The default masks start so close above zero that one step of Adam at 1e-4 can
    switch all of them off; `low` and `high` move them away.

    Source: Mancini et al., "Adding New Tasks to a Single Network with Weight
    Transformations using Binary Masks" (arXiv 1805.11119), its affine transformation
    of W by M; the start from a third party's code, credited to its authors.

    Attributes:
        mask: the real mask, of the weight's shape; `None` once compact.
        scales: k1, k2, k3.
        packed: M's bits once compact, one for each weight.
        shape: the weight's shape, once compact.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.array([1.0, 2.0])
        >>> node = AffineMask.init(jax.random.key(0), w)
        >>> node = node.replace(mask=jnp.array([1.0, -1.0]), scales=jnp.arange(1.0, 4))
        >>> node.merge(w).tolist()  # 1 + 1 + 2 + 3, and 2 + 1
        [7.0, 3.0]
    """

    mask: Float[Array, "..."] | None
    scales: Float[Array, "3"]
    packed: UInt8[Array, " bytes"] | None = frozen(default=None)
    shape: tuple[int, ...] | None = static(default=None)
    group: str = static(default="masks")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        low: float = 1e-5,
        high: float = 2e-5,
        group: str = "masks",
    ) -> "AffineMask":
        """Start at the pretrained weight, with masks from U(low, high).

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            low: least mask; a mask above zero is a bit of one.
            high: largest mask.
            group: optimizer group.

        Raises:
            ValueError: if `low` is not below `high`.
        """
        if not low < high:
            raise ValueError(f"need low < high, found low={low!r} and high={high!r}")
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        mask = jax.random.uniform(key, w.shape, dtype, low, high)
        return cls(mask, jnp.zeros(3, dtype), group=group)

    @property
    def ones(self) -> Float[Array, "..."]:
        """M, of the weight's shape: 0 or 1."""
        if self.packed is None:
            assert self.mask is not None
            return straight_through(self.mask > 0, self.mask)
        assert self.shape is not None
        return unpack_bits(self.packed, self.shape).astype(self.scales.dtype)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the transformed weight, in w's dtype, rounded once.

        Raises:
            ValueError: if the mask has another shape than `w`.
        """
        ones = _fitting(self.ones, w)
        dtype = jnp.promote_types(w.dtype, ones.dtype)
        x, ones = w.astype(dtype), ones.astype(dtype)
        k1, k2, k3 = self.scales.astype(dtype)
        return (x + k1 + k2 * ones + k3 * (x * ones)).astype(w.dtype)

    def compact(self) -> "AffineMask | None":
        """Return the node with packed bits; `None` if all its scales are zero."""
        if self.mask is None:
            return self
        if not np.asarray(self.scales).any():
            return None
        bits = np.asarray(self.mask) > 0
        return self.replace(mask=None, packed=pack_bits(bits), shape=bits.shape)


def _fitting(mask: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    if mask.shape != w.shape:
        raise ValueError(
            f"the mask has shape {mask.shape}, the weight {w.shape}; make the delta "
            "for this backbone"
        )
    return mask
