"""Many tasks in one tree of arrays, to be served and trained together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ftn_jax.core import complete, split_extras
from ftn_jax.node import is_node, register
from ftn_jax.paths import at, path_name, some
from ftn_jax.slots import Slots, decode, encode, plan_slots
from ftn_jax.train import Task


@dataclass(frozen=True)
class Stack(Task):
    """The arrays of several tasks, each with a leading axis of slots.

    A pytree, to be passed to compiled functions. Which task lies in which slot is for
    its `Bank` to know: another task in a slot is the same program.

    Attributes:
        delta: a tree with the backbone's paths that holds `ftn_jax.slots` nodes.
        model_state: the tasks' mutable collections.
        filled: whether there is a task in the slot.
    """

    filled: Bool[Array, " slots"]


register(Stack, ("delta", "model_state", "filled"), ())


@dataclass(frozen=True, eq=False)
class Bank:
    """Several tasks of one backbone, stacked; made by `Bank.of`, never changed.

    Ranks and numbers of classes are filled up to the largest with what adds nothing.
    At each path, the tasks have nodes of one type, or none: `CP` with factors over the
    same axes, `LoRA` of the form `"conv"`, or `Replace`, whose arrays may differ from
    task to task in the last axis (heads).

    Attributes:
        stack: the arrays; what `ftn_jax.mixed` takes.
        names: of the task in each slot; `None` for a free one.
        skeletons: each task with a `jax.ShapeDtypeStruct` for every array.
        shapes: the backbone, likewise.
        room: for each path with nodes, an empty slot.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from ftn_jax import Task, make_delta
        >>> from ftn_jax.bank import Bank
        >>> from ftn_jax.nodes import CP
        >>> shared = {"kernel": jnp.ones((3, 3, 8, 16))}
        >>> tasks = {
        ...     name: Task(make_delta(jax.random.key(r), shared,
        ...                           {"kernel": partial(CP.init, rank=r)}), {})
        ...     for name, r in {"signs": 1, "birds": 4}.items()
        ... }
        >>> bank = Bank.of(tasks, shared=shared, capacity=4)
        >>> bank.ids(["birds", "signs", "birds"]).tolist()
        [1, 0, 1]
        >>> bank.take("signs").delta["kernel"].rank
        1
    """

    stack: Stack
    names: tuple[str | None, ...]
    skeletons: Mapping[str, Task]
    shapes: Any
    room: Mapping[str, Slots]

    @classmethod
    def of(
        cls,
        tasks: Mapping[str, Task],
        *,
        shared: Any,
        capacity: int | None = None,
        rank: int | None = None,
        classes: int | None = None,
    ) -> "Bank":
        """Stack tasks.

        Args:
            tasks: by name.
            shared: the backbone that they belong to; only its shapes are used.
            capacity: number of slots, by default one for each task. Tasks put in free
                slots later are served without compiling anew.
            rank: room for tasks of up to this rank, by default the largest there is.
            classes: room for heads of up to this many classes, likewise.

        Raises:
            ValueError: if there are no tasks or more than slots, a task does not fit
                the backbone, or a path's nodes cannot be stacked (names the path).
        """
        slots = len(tasks) if capacity is None else capacity
        if not 1 <= len(tasks) <= slots:
            raise ValueError(f"found {len(tasks)} tasks for {slots} slots")
        shapes = _shapes(split_extras(shared)[0])
        entries = {name: _entries(shapes, name, task) for name, task in tasks.items()}
        room = {}
        for column in zip(*entries.values(), strict=True):
            path, w, _ = column[0]
            nodes = [node for _, _, node in column]
            if any(node is not None for node in nodes):
                with at(path):
                    room[path] = plan_slots(nodes, w.shape, rank=rank, classes=classes)
        rows = [_encode(room, shapes, name, task) for name, task in tasks.items()]
        first, name = jax.tree.map(np.zeros_like, rows[0]), next(iter(tasks))
        for other, row in zip(tasks, rows, strict=True):
            _check_state(row.model_state, first.model_state, other, name)
        rows += [first] * (slots - len(rows))
        return cls(
            stack=jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows),
            names=(*tasks, *[None] * (slots - len(tasks))),
            skeletons={name: _shapes(task) for name, task in tasks.items()},
            shapes=shapes,
            room=room,
        )

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of their slots."""
        return [name for name in self.names if name is not None]

    def ids(self, names: Iterable[str]) -> Int[Array, " examples"]:
        """Return the slot of each example's task.

        Raises:
            ValueError: for a name that the bank does not have.
        """
        names = [names] if isinstance(names, str) else list(names)
        slot = {name: n for n, name in enumerate(self.names) if name is not None}
        if unknown := sorted({n for n in names if n not in slot}, key=str):
            raise ValueError(f"no tasks {unknown} in the bank, it has {self.tasks}")
        return jnp.asarray(np.array([slot[name] for name in names], np.int32))

    def take(self, name: str) -> Task:
        """Return a task as it was put in, or as it has been trained since.

        Raises:
            ValueError: for a name that the bank does not have.
        """
        (slot,) = self.ids([name]).tolist()
        skeleton = self.skeletons[name]

        # On the host: programs that cut each array to size would take long to compile.
        row = jax.device_get(_row(self.stack, slot))
        nodes = {path_name(p): node for p, node in _nodes(skeleton.delta)}
        delta = jax.tree_util.tree_map_with_path(
            lambda path, slots: (
                decode(slots, nodes[path_name(path)])
                if path_name(path) in nodes
                else None
            ),
            row.delta,
            is_leaf=is_node,
        )
        return jax.tree.map(jnp.asarray, Task(delta, row.model_state))

    def put(self, name: str, task: Task) -> "Bank":
        """Return the bank with this task, in a free slot or in its namesake's.

        Nothing that was compiled for the bank is compiled again.

        Raises:
            ValueError: if there is no free slot, or the task does not fit in the
                bank's ranks, classes and types of nodes (names the path).
        """
        if name not in self.names and None not in self.names:
            raise ValueError(
                f"no free slot for {name!r} among {len(self.names)}; drop a task, or "
                "build the bank with a larger capacity"
            )
        slot = self.names.index(name if name in self.names else None)
        row = _encode(self.room, self.shapes, name, task)
        old = _shapes(_row(self.stack, slot)).model_state
        _check_state(row.model_state, old, name, "the bank")
        names = list(self.names)
        names[slot] = name
        return replace(
            self,
            stack=_with_row(self.stack, slot, row),
            names=tuple(names),
            skeletons={**self.skeletons, name: _shapes(task)},
        )

    def drop(self, name: str) -> "Bank":
        """Return the bank without this task; its slot is free.

        Raises:
            ValueError: for a name that the bank does not have.
        """
        (slot,) = self.ids([name]).tolist()
        rest = {n: s for n, s in self.skeletons.items() if n != name}
        return replace(
            self,
            stack=_with_row(
                self.stack, slot, jax.tree.map(jnp.zeros_like, _row(self.stack, slot))
            ),
            names=tuple(None if n == name else n for n in self.names),
            skeletons=rest,
        )

    def trained(self, stack: Any) -> "Bank":
        """Return the bank with arrays that were trained: `bank.trained(state.task)`.

        Raises:
            ValueError: if they are not of this bank's structure and shapes.
        """
        found, expected = _shapes(stack), _shapes(self.stack)
        if jax.tree.structure(found) != jax.tree.structure(expected) or (
            jax.tree.leaves(found) != jax.tree.leaves(expected)
        ):
            raise ValueError(
                "these arrays are not of the bank's structure and shapes; pass the "
                "`task` of a state that was made from this bank's stack"
            )
        return replace(self, stack=stack)


@jax.jit
def _row(stack: Stack, slot: Int[Array, ""]) -> Stack:
    return jax.tree.map(lambda x: x[slot], stack)


@jax.jit
def _with_row(stack: Stack, slot: Int[Array, ""], row: Stack) -> Stack:
    return jax.tree.map(lambda x, new: x.at[slot].set(new), stack, row)


def _nodes(delta: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_node)


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda t: t, tree)


def _entries(shapes: Any, name: str, task: Task) -> list[tuple[str, Any, Any]]:
    """List a task's nodes by path, once it is known that they fit the backbone."""
    try:
        entries = complete(shapes, task.delta)
        held = [
            (p, w, n) for p, w, n in entries if n is not None and not n.beside_fields
        ]
        for path, w, node in held:
            with at(path):
                jax.eval_shape(lambda w, node: node.merge(w), w, node)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    return entries


def _encode(room: Mapping[str, Slots], shapes: Any, name: str, task: Task) -> Stack:
    """Write a task as one row of a stack."""
    rows = []
    for path, w, node in _entries(shapes, name, task):
        if path not in room and node is not None:
            raise ValueError(
                f"task {name!r}: {path}: the bank has no nodes here, the task has a "
                f"{type(node).__name__}; the bank has {some([*room])}"
            )
        with at(f"task {name!r}: {path}"):
            rows.append(encode(room[path], node, w.shape) if path in room else None)
    delta = jax.tree.structure(shapes).unflatten(rows)
    return Stack(delta, jax.tree.map(np.asarray, task.model_state), np.ones((), bool))  # pyright: ignore[reportArgumentType]


def _check_state(found: Any, expected: Any, name: str, other: str) -> None:
    def look(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(p): (x.shape, str(x.dtype)) for p, x in leaves}

    mine, theirs = look(found), look(expected)
    differ = [p for p in {**mine, **theirs} if mine.get(p) != theirs.get(p)]
    if differ:
        raise ValueError(
            f"task {name!r}: its model_state differs from that of {other!r} at "
            f"{some(differ)}; at the first, found {mine.get(differ[0])}, expected "
            f"{theirs.get(differ[0])}"
        )
