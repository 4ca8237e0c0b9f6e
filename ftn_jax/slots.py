"""Nodes of several tasks at one weight's place: each array has a leading slot axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ftn_jax.factored.factors import Polyadic, polyadic
from ftn_jax.node import Node, frozen, static
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.replace import Replace


class LowRankSlots(Node):
    """Add to a weight, for each slot, `sum_r scale[r] * f1[:, r] o ... o fN[:, r]`.

    A slot of a smaller rank is filled up with zero factors of scale zero: they add
    nothing, and neither they nor their gradient is ever anything but zero.

    Attributes:
        factors: one matrix for each group of the weight's axes.
        scale: of each term.
        axes: for each factor, the weight's axes that it spans.
        kind: name of the tasks' node type.
    """

    factors: tuple[Float[Array, "slots _ rank"], ...]
    scale: Float[Array, "slots 1 rank"] = frozen()
    axes: tuple[tuple[int, ...], ...] = static()
    kind: str = static(default="CP")
    group: str = static(default="factors")

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "slots ..."]:
        """Return every slot's weight."""

        def one(factors: Any, scale: Any) -> Any:
            first = factors[0] * scale
            return CP((first, *factors[1:]), axes=self.axes).merge(w)

        return jax.vmap(one)(self.factors, self.scale)


class ReplaceSlots(Node):
    """Put, for each slot, an array of the task's own in the weight's place.

    Attributes:
        value: the arrays; of fewer classes than the most, filled up with zeros.
        own: whether the slot's task replaces the weight at all.
        sizes: length of each slot's last axis.
        ragged: whether these lengths may differ.
    """

    value: Float[Array, "slots ..."]
    own: Bool[Array, " slots"] = frozen()
    sizes: Int[Array, " slots"] = frozen()
    ragged: bool = static(default=False)
    group: str = static(default="norm")

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "slots ..."]:
        """Return every slot's weight; a ragged one's is its own, filled up."""
        value = self.value.astype(w.dtype)
        if self.ragged:
            return value
        return jnp.where(self.own.reshape(-1, *(1,) * w.ndim), value, w[None])


for _kind in (LowRankSlots, ReplaceSlots):
    del Node.types[_kind.__name__]  # they are no single task's: no task file has them

Slots = LowRankSlots | ReplaceSlots


@polyadic.register
def _(node: LowRankSlots, shape: tuple[int, ...]) -> Polyadic | None:
    """Read one slot of the node, as `jax.vmap` over slots or examples shows it."""
    return Polyadic(node.factors, node.axes, node.scale)  # pyright: ignore[reportArgumentType]


def plan_slots(
    nodes: Sequence[Node | None],
    shape: tuple[int, ...],
    *,
    rank: int | None = None,
    classes: int | None = None,
) -> Slots:
    """Make the empty slot that has room for each of these nodes.

    Args:
        nodes: what the tasks have at one path, at least one node among them.
        shape: of the weight.
        rank: room for this many terms, where there are low-rank nodes.
        classes: room for this many classes, where heads are replaced.

    Returns:
        Slots without the slot axis, all zero.

    Raises:
        ValueError: if no slot can hold them all (says why).
    """
    found = [n for n in nodes if n is not None]
    kinds = sorted({type(n).__name__ for n in found})
    if len(kinds) > 1:
        raise ValueError(
            f"the tasks' nodes are of types {kinds}; a bank needs one type at a path"
        )
    groups = sorted({n.group for n in found})
    if len(groups) > 1:
        raise ValueError(f"the tasks' nodes have the optimizer groups {groups}")
    dtype = jnp.result_type(*(x.dtype for n in found for x in jax.tree.leaves(n)))
    if all(type(n) is Replace for n in found):
        return _plan_replace(found, shape, classes, dtype, groups[0])
    forms = [_form(n, shape) for n in found]
    if len({f.axes for f in forms}) > 1:
        raise ValueError(
            f"the tasks' factors span the axes {sorted({f.axes for f in forms})}; a "
            "bank needs the same at a path"
        )
    width = max(rank or 0, *(f.rank for f in forms))
    empty = tuple(np.zeros((f.shape[0], width), dtype) for f in forms[0].factors)
    scale = np.zeros((1, width), dtype)
    return LowRankSlots(
        empty,  # pyright: ignore[reportArgumentType]
        scale,  # pyright: ignore[reportArgumentType]
        axes=forms[0].axes,
        kind=kinds[0],
        group=groups[0],
    )


def encode(room: Slots, node: Node | None, shape: tuple[int, ...]) -> Slots:
    """Write a task's node, or that it has none, as one slot of this room.

    Args:
        room: what `plan_slots` made.
        node: the task's.
        shape: of the weight.

    Raises:
        ValueError: if it does not fit (says why).
    """
    if node is None:
        if isinstance(room, ReplaceSlots) and room.ragged:
            raise ValueError(
                "the task has no node where others replace the weight by one of "
                f"another shape, {room.value.shape}; give it a Replace too"
            )
        return jax.tree.map(np.zeros_like, room)
    expected = room.kind if isinstance(room, LowRankSlots) else "Replace"
    found = (type(node).__name__, node.group)
    if found != (expected, room.group):
        raise ValueError(
            f"found a {found[0]} of group {found[1]!r}; the bank holds {expected} of "
            f"group {room.group!r} here"
        )
    if isinstance(room, ReplaceSlots):
        assert isinstance(node, Replace)
        if not room.ragged and node.value.shape != room.value.shape:
            raise ValueError(
                f"found an array of the shape {node.value.shape}, the bank's are all "
                f"{room.value.shape} here; build it with room for others (classes), or "
                "with this task in it"
            )
        size = node.value.shape[-1] if node.value.ndim else 1
        return room.replace(
            value=_filled(room.value, node.value),
            own=np.ones((), bool),
            sizes=np.asarray(size, np.int32),
        )
    form = _form(node, shape)
    if form.axes != room.axes:
        raise ValueError(
            f"the factors span the axes {form.axes}; the bank's {room.axes}"
        )
    scale = np.zeros_like(room.scale)
    scale[:, : form.rank] = form.scale
    pairs = zip(room.factors, form.factors, strict=True)
    return room.replace(factors=tuple(_filled(r, f) for r, f in pairs), scale=scale)


def decode(slot: Slots, skeleton: Node) -> Node:
    """Read a task's node back from a slot, with the shapes and settings it had.

    Args:
        slot: one slot, without the slot axis.
        skeleton: the node with a `jax.ShapeDtypeStruct` for each array.
    """
    if isinstance(slot, ReplaceSlots):
        assert isinstance(skeleton, Replace)
        return skeleton.replace(value=_cut(slot.value, skeleton.value))
    if isinstance(skeleton, LoRA):
        a, b = slot.factors
        return skeleton.replace(a=_cut(a, skeleton.a), b=_cut(b.T, skeleton.b))
    assert isinstance(skeleton, CP)
    pairs = zip(slot.factors, skeleton.factors, strict=True)
    return skeleton.replace(factors=tuple(_cut(x, s) for x, s in pairs))


def _form(node: Node, shape: tuple[int, ...]) -> Polyadic:
    """Return the sum of outer products that a bank keeps of a node."""
    form = polyadic(node, shape) if isinstance(node, (CP, LoRA)) else None
    if form is None:
        raise ValueError(
            f"a bank cannot hold a {type(node).__name__}; it holds CP, LoRA (use "
            "form='conv') and Replace. Serve such tasks one by one, with materialize"
        )
    return form


def _plan_replace(
    nodes: Sequence[Any],
    shape: tuple[int, ...],
    classes: int | None,
    dtype: Any,
    group: str,
) -> ReplaceSlots:
    shapes = {tuple(n.value.shape) for n in nodes}
    ragged = bool(shapes - {shape}) or (classes is not None and group == "head")
    if len({s[:-1] for s in shapes}) > 1 or (ragged and () in shapes):
        raise ValueError(
            f"the tasks replace it by arrays of the shapes {sorted(shapes)}, which "
            "may differ in the last axis only"
        )
    room = next(iter(shapes))
    if ragged:
        room = (*room[:-1], max(classes or 0, *(s[-1] for s in shapes)))
    return ReplaceSlots(
        np.zeros(room, dtype),  # pyright: ignore[reportArgumentType]
        np.zeros((), bool),  # pyright: ignore[reportArgumentType]
        np.zeros((), np.int32),  # pyright: ignore[reportArgumentType]
        ragged=ragged,
        group=group,
    )


def _filled(room: Any, x: Any) -> Any:
    """Fill an array up with zeros along its last axis."""
    fits = x.shape[:-1] == room.shape[:-1] and x.shape[-1:] <= room.shape[-1:]
    if not fits or jnp.promote_types(x.dtype, room.dtype) != room.dtype:
        raise ValueError(
            f"an array {x.dtype}{list(x.shape)} does not fit in the bank's "
            f"{room.dtype}{list(room.shape)}; build the bank with more room (rank, "
            "classes), or with this task in it"
        )
    new = np.zeros(room.shape, room.dtype)
    new[tuple(slice(n) for n in x.shape)] = np.asarray(x)
    return new


def _cut(x: Any, like: Any) -> Any:
    return x[tuple(slice(n) for n in like.shape)].astype(like.dtype)
