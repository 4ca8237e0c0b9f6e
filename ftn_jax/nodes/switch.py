"""Switches over channels: a task turns whole channels of each layer off.

Source: Budget-Aware Adapters (arXiv 1905.06242).
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ftn_jax.node import Node, frozen, is_node, static
from ftn_jax.nodes.bits import pack_bits, straight_through, unpack_bits

Side = Literal["input", "output"]


class ChannelSwitch(Node):
    """Turn channels of the weight on or off (BA^2).

        W'[..., i, o] = s[i] * W[..., i, o]  or  s[o] * W[..., i, o],
        s = 1 where switch > 0, else 0

    The gradient goes straight through the threshold: ds[o] = sum over the rest of
    dW' * W. Multiplying the input or the output of the layer by s is the same as
    multiplying its weight, whatever the stride and the padding.

    The authors' code is not public, and the paper speaks of "feature channels": which
    side of the convolution their switches are on is the caller's choice here. An
    output that is switched off is zero before BatchNorm and a constant behind it; put
    a switch on BatchNorm's scale and bias to take the channel away altogether. The
    input side of a grouped kernel is that of one group: a switch there turns the same
    channel of every group off.

    Source: Berriel et al., "Budget-Aware Adapters for Multi-Domain Learning" (arXiv
    1905.06242), the switches and the budget on their mean (see `budget`).

    Attributes:
        switch: real switches, of the sizes of `axes`; `None` once compact.
        axes: the weight's axes that the switches lie along, ascending.
        packed: s's bits once compact.
        shape: the shape of the switches, once compact.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 2))
        >>> node = ChannelSwitch.init(jax.random.key(0), w)
        >>> bool((node.merge(w) == w).all())  # starts at the pretrained network
        True
        >>> node.replace(switch=jnp.array([0.5, -0.5])).merge(w)[0, 0, 0].tolist()
        [1.0, 0.0]
    """

    switch: Float[Array, "..."] | None
    axes: tuple[int, ...] = static()
    packed: UInt8[Array, " bytes"] | None = frozen(default=None)
    shape: tuple[int, ...] | None = static(default=None)
    group: str = static(default="masks")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        side: Side = "output",
        axes: Sequence[int] | None = None,
        group: str = "masks",
    ) -> "ChannelSwitch":
        """Start with every channel on (switches of 1).

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            side: `"output"`, the last axis, or `"input"`, the one before it.
            axes: instead of a side, any axes: `(1,)` of an attention kernel
                `(d_model, heads, head_dim)` switches heads.
            group: optimizer group.

        Raises:
            ValueError: if the weight has no such axis, an axis is named twice, or
                there is a single channel, whose switch would turn the layer off.
        """
        if side not in ("input", "output"):
            raise ValueError(f"side must be input or output, found {side!r}")
        if axes is None:
            axes = (-1,) if side == "output" else (-2,)
            if w.ndim < -axes[0]:
                raise ValueError(
                    f"a weight of shape {w.shape} has no {side} channels to switch; "
                    "leave it out of the rule"
                )
        if not axes or not all(-w.ndim <= a < w.ndim for a in axes):
            raise ValueError(
                f"axes must name some of the weight's {w.ndim} axes, found {axes}"
            )
        places = tuple(sorted(a % w.ndim for a in axes))
        if len(set(places)) < len(places):
            raise ValueError(f"axes must name an axis once, found {axes}")
        sizes = tuple(w.shape[a] for a in places)
        switch = jnp.ones(sizes, jnp.promote_types(w.dtype, jnp.float32))
        if switch.size < 2:
            raise ValueError(
                f"axes {places} of a weight of shape {w.shape} are a single channel: "
                "its switch would turn the layer off; switch the other side, or leave "
                "it out of the rule"
            )
        return cls(switch, axes=places, group=group)

    @property
    def active(self) -> Float[Array, "..."]:
        """s, of the switches' shape: 0 or 1."""
        if self.packed is None:
            assert self.switch is not None
            return straight_through(self.switch > 0, self.switch)
        assert self.shape is not None
        return unpack_bits(self.packed, self.shape).astype(jnp.float32)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight without the channels that are off, in w's dtype.

        Raises:
            ValueError: if the weight's axes have other sizes than the switches.
        """
        active = self.active
        fits = max(self.axes) < w.ndim
        if not fits or active.shape != tuple(w.shape[a] for a in self.axes):
            raise ValueError(
                f"found switches of shape {active.shape} over axes {self.axes}, the "
                f"weight has shape {w.shape}; make the delta for this backbone"
            )
        dtype = jnp.promote_types(w.dtype, active.dtype)
        rest = [a for a in range(w.ndim) if a not in self.axes]
        gates = jnp.expand_dims(active, rest).astype(dtype)
        return (w.astype(dtype) * gates).astype(w.dtype)

    def compact(self) -> "ChannelSwitch | None":
        """Return the node with packed bits; `None` if every channel is on."""
        if self.switch is None:
            return self
        on = np.asarray(self.switch) > 0
        if on.all():
            return None
        return self.replace(switch=None, packed=pack_bits(on), shape=on.shape)


def budget(delta: Any, *, share: float, weight: float) -> Float[Array, ""]:
    """Penalize a mean share of active switches above the budget, for a training step.

        weight * max(0, mean(s) - share),    over all switches of the delta

    with the straight-through gradient, `weight / (number of switches)` for each of
    them while the budget is exceeded, and none within it. Pass it to a step as
    `penalty=lambda delta, step: budget(delta, share=0.5, weight=10.0)`. The paper
    states the budget as a constraint; here it is a penalty of a given weight.

    Source: Berriel et al. (arXiv 1905.06242), the constraint on active switches.

    Raises:
        ValueError: if the delta has no ChannelSwitch, or the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], found {share!r}")
    return weight * jax.nn.relu(active_share(delta) - share)


def active_share(delta: Any) -> Float[Array, ""]:
    """Return the share of all switches of a delta that are on, in [0, 1].

    Raises:
        ValueError: if the delta has no ChannelSwitch. `compact` drops those of layers
            that stay whole: ask before it.
    """
    switches = [
        node.active
        for node in jax.tree.leaves(delta, is_leaf=is_node)
        if isinstance(node, ChannelSwitch)
    ]
    if not switches:
        raise ValueError("the delta holds no ChannelSwitch, so nothing to count")
    total = sum(s.size for s in switches)
    return jnp.stack([s.sum() for s in switches]).sum() / total
