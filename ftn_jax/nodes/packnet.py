"""PackNet's node: a task that trains the free positions of a packed weight.

`ftn_jax.nodes.packing` starts the packed state and packs tasks into it.

Source: Mallya and Lazebnik, "PackNet" (arXiv 1711.05769).
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ftn_jax.node import Node, beside, frozen, static
from ftn_jax.nodes.bits import pack_bits, unpack_bits


class PackNet(Node):
    """Train the positions of a packed weight that no earlier task owns.

        W' = value   where the position is the task's own (or may be trained),
             values  where an earlier task owns it (0 < owner < task),
             0       elsewhere

    It starts where the packed network stands, at zero in the free positions: not at
    the pretrained weight, which this node never reads. Whatever an optimizer does to
    `value` elsewhere (momentum, weight decay) has no effect, so that nothing needs to
    be set back after each step, as the released code does.

    `PackNet.init(task=1)` beside `start_packing(prune=None)` trains the base itself,
    from the pretrained weights: prune it, train what is left, pack it.

    Source: Mallya and Lazebnik, "PackNet" (arXiv 1711.05769), iterative pruning; the
    freed weights start from zero, as in its code.

    Attributes:
        value: of the weight's shape; the task's own positions alone, in order and in
            one axis, once compact.
        mine: bits of the positions that the task owns or may train.
        task: its number, 1 for the base, then 2, 3, ... in the order of packing.
        values: what is packed beside the backbone.
        owner: who owns it.
        shape: the weight's shape, once compact.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ftn_jax.nodes.packing import start_packing
        >>> w = jnp.array([1.0, -4.0, 2.0, 3.0])
        >>> state = start_packing({"w": w}, "w", prune=0.5)
        >>> state["w"]["values"].tolist(), state["w"]["owner"].tolist()
        ([0.0, -4.0, 0.0, 3.0], [0, 1, 0, 1])
        >>> extra = {"packnet": state["w"]}
        >>> node = PackNet.init(jax.random.key(0), w, extra=extra, task=2)
        >>> node.replace(value=jnp.full(4, 9.0), **state["w"]).merge(w).tolist()
        [9.0, -4.0, 9.0, 3.0]
    """

    reads_weight: ClassVar[bool] = False
    value: Float[Array, "..."]
    mine: UInt8[Array, " bytes"] = frozen()
    task: int = static()
    values: Float[Array, "..."] | None = beside("packnet")
    owner: UInt8[Array, "..."] | None = beside("packnet")
    shape: tuple[int, ...] | None = static(default=None)
    group: str = static(default="weights")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        extra: Mapping[str, Mapping[str, Array]],
        task: int,
        group: str = "weights",
    ) -> "PackNet":
        """Take every free position, from what stands there.

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            extra: what lies beside the backbone, `"packnet"` among it.
            task: number of the task; the next one after those that are packed.
            group: optimizer group.

        Raises:
            ValueError: if nothing is packed beside the backbone for this weight, or
                the task's number is not in 1 .. 255.
        """
        if "packnet" not in extra:
            raise ValueError(
                "nothing is packed beside the backbone for this weight; extend it with "
                "packnet=start_packing(shared, pattern, prune=0.5) and let the pattern "
                f"match this path (found beside it: {sorted(extra)})"
            )
        if task not in range(1, 256):
            raise ValueError(f"task must be an integer in 1 .. 255, found {task!r}")
        free = extra["packnet"]["owner"] == 0
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        start = jnp.where(free, extra["packnet"]["values"].astype(dtype), 0)
        mine = pack_bits(free)
        return cls(start, mine, task=int(task), values=None, owner=None, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the task's weight, in w's dtype; of `w` only that and its shape count.

        Raises:
            ValueError: if the node or what is packed has another shape than `w`, or
                what is packed was not filled in.
        """
        if self.values is None or self.owner is None:
            raise ValueError(
                "what is packed lies beside the backbone and is not filled in; use "
                "materialize(extended, delta)"
            )
        shapes = (self.shape or self.value.shape, self.values.shape, self.owner.shape)
        if set(shapes) != {w.shape}:
            raise ValueError(
                f"the weight has shape {w.shape}, found {shapes} for the task's values "
                "and for the values and owners packed beside the backbone"
            )
        own, value = unpack_bits(self.mine, w.shape), self.value.astype(w.dtype)
        if self.shape is not None:
            place = jnp.flatnonzero(own, size=value.size)
            value = jnp.zeros(w.size, w.dtype).at[place].set(value).reshape(w.shape)
        others = jnp.where(self._earlier, self.values.astype(w.dtype), 0)
        return jnp.where(own, value, others)

    def compact(self) -> "PackNet":
        """Return the node with the values of its own positions; it can still train."""
        if self.shape is not None:
            return self
        own = jnp.asarray(self.own[1])
        return self.replace(value=own, shape=self.value.shape)

    def reads(self) -> dict[str, Array]:
        """Return the packed state of earlier tasks, zero where there is none.

        Later tasks change nothing of it: a task's file opens on every later state.
        """
        assert self.values is not None and self.owner is not None
        packed = {"values": self.values, "owner": self.owner}
        return {
            name: jnp.where(self._earlier, x, jnp.zeros_like(x))
            for name, x in packed.items()
        }

    @property
    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """The flat places of the task's own positions, and the values there."""
        places = np.flatnonzero(np.unpackbits(np.asarray(self.mine)))
        value = np.asarray(self.value)
        return places, value if self.shape is not None else value.ravel()[places]

    @property
    def _earlier(self) -> Array:
        assert self.owner is not None
        return (self.owner > 0) & (self.owner < self.task)
