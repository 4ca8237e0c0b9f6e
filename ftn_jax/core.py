"""One frozen tree, many small ones: `params = materialize(shared, delta)`.

`shared` is a pretrained network's pytree of arrays. A task's `delta` is a tree with
the same paths that holds, at every leaf of `shared`, either `None` or a `Node`: a
small pytree that knows how to change that one weight. Only `delta` is ever
differentiated, so "frozen" is not a flag that can be wrong: no gradient, no update
and no donated buffer of `shared` exists.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
from jaxtyping import Array, Float, Key

Init = Callable[[Any, Any], "Node"]
Rules = Mapping[str, Init | None]


def static(**options: Any) -> Any:
    """Declare a node field that is configuration, not data (hashable, never traced)."""
    return field(metadata={"static": True}, **options)


def register(cls: type[Any], data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    """Make a dataclass a pytree that is rebuilt without running its `__init__`.

    Tree operations put placeholders, shapes and stacked arrays where arrays were;
    the checks of building an object must not see them.
    """

    def flatten(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children = [(jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in data]
        return children, tuple(getattr(x, n) for n in meta)

    def unflatten(aux: Any, children: Any) -> Any:
        x = object.__new__(cls)
        x.__dict__.update(zip(meta + data, (*aux, *children), strict=True))
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
class Node(ABC):
    """What one task adds to one weight; subclass it to add a method.

    A subclass declares its arrays as annotated fields and its configuration as
    `static()` fields, and defines `merge(w)`. Subclassing is the registration: the
    class becomes a frozen dataclass, a pytree, and a type that task files can hold.

    By convention it also has `init(key, w, ...)`, a class method that checks its
    arguments and copies whatever it keeps of `w` (a node that held one of shared's
    own buffers would delete the backbone when a training step donates its state).

    Attributes:
        group: which optimizer trains the node's arrays; declare it as a `static()`
            field to let each instance choose.
        reads_weight: whether `merge` depends on the weight's values; if not, a task
            file opens on a backbone that differs in that leaf alone.
        types: every node type by name.
        data_fields: names of the fields that hold arrays.
        static_fields: names of the fields that hold configuration.
    """

    group: str = "factors"
    reads_weight: ClassVar[bool] = True
    types: ClassVar[dict[str, type["Node"]]] = {}
    data_fields: ClassVar[tuple[str, ...]] = ()
    static_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(frozen=True, eq=False)(cls)
        is_static = {f.name: f.metadata.get("static", False) for f in fields(cls)}  # pyright: ignore[reportArgumentType]
        cls.data_fields = data = tuple(n for n, s in is_static.items() if not s)
        cls.static_fields = meta = tuple(n for n, s in is_static.items() if s)
        if "group" in data:
            raise TypeError(f"{cls.__name__}: declare `group: str = static(...)`")
        old = Node.types.get(cls.__name__, cls)
        names = [f"{c.__module__}.{c.__qualname__}" for c in (old, cls)]
        if names[0] != names[1]:  # redefining a class in a notebook is fine
            raise TypeError(
                f"two node types of one name: {names[0]} and {names[1]}; task files "
                "store this name, so rename one of them"
            )
        Node.types[cls.__name__] = cls
        register(cls, data, meta)

    @abstractmethod
    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the task's weight for the frozen weight `w`."""


class Count(NamedTuple):
    """Number of parameters of a delta: in all, by optimizer group, by path."""

    total: int
    by_group: dict[str, int]
    by_path: dict[str, int]


def make_delta(key: Key[Array, ""], shared: Any, rules: Rules) -> Any:
    """Build a task's delta: one node (or `None`) for each leaf of `shared`.

    Args:
        key: each node gets its own key, derived from its path, so adding or removing
            a layer or a rule does not change any other node's start.
        shared: the frozen backbone, a pytree of arrays (or of `ShapeDtypeStruct`
            under `jax.eval_shape`).
        rules: ordered mapping from a regular expression, matched against the whole
            path (`"layer1_0/conv1/kernel"`), to `init(key, w) -> Node`, or to `None`
            to leave those leaves as they are. The first match wins; leaves that no
            rule matches stay frozen.

    Returns:
        A tree with the structure of `shared` and a `Node` or `None` at each leaf.

    Raises:
        ValueError: if a rule matches no path or every leaf it matches is taken by
            earlier rules, or if a node's init refuses its weight (names the path).
    """
    paths, leaves, treedef = _flatten(shared)
    hits = [[p for p in rules if re.fullmatch(p, path)] for path in paths]
    matched, used = {p for h in hits for p in h}, {h[0] for h in hits if h}
    if nothing := [p for p in rules if p not in matched]:
        raise ValueError(
            f"rules that match no leaf: {nothing} (a pattern must match the whole "
            f"path); shared has the leaves {_some(paths)}"
        )
    if shadowed := [p for p in rules if p not in used]:
        raise ValueError(
            f"rules that never apply: {shadowed}; earlier rules take all their leaves"
        )
    nodes: list[Node | None] = []
    for path, w, patterns in zip(paths, leaves, hits, strict=True):
        init = rules[patterns[0]] if patterns else None
        with _at(path):
            if init and not jax.numpy.issubdtype(w.dtype, jax.numpy.inexact):
                raise ValueError(f"a node needs a float weight, found {w.dtype}")
            nodes.append(None if init is None else init(fold_in_name(key, path), w))
    return treedef.unflatten(nodes)


@jax.jit
def materialize(shared: Any, delta: Any) -> Any:
    """Combine the two trees: the parameters that the task's network runs with.

    Pure, jitted, and differentiable in `delta`; `shared` is only read. The result
    has `shared`'s structure; a leaf with a node is `node.merge(w)`, any other leaf
    is `w` itself.

    Raises:
        ValueError: if the trees do not have the same paths (lists those on one side
            only), or if a node does not fit its weight (names path and shapes).
    """
    paths, leaves, treedef = _flatten(shared)
    nodes = _nodes_like(shared, delta)
    params = []
    for path, w, node in zip(paths, leaves, nodes, strict=True):
        with _at(path):
            params.append(w if node is None else node.merge(w))
    return treedef.unflatten(params)


def groups(delta: Any) -> Any:
    """Label every array of `delta` with its node's group, for `optax.multi_transform`.

    Returns:
        A tree with the structure of `delta` and a string in place of each array.
    """
    treedef = jax.tree.structure(delta, is_leaf=is_node)
    return treedef.unflatten(
        jax.tree.map(lambda _, node=node: node.group, node)
        for _, node in iter_nodes(delta)
    )


def count(delta: Any) -> Count:
    """Count a delta's parameters; `jax.eval_shape`'s output does as well as arrays."""
    by_group: dict[str, int] = {}
    by_path: dict[str, int] = {}
    for path, node in iter_nodes(delta):
        size = sum(leaf.size for leaf in jax.tree.leaves(node))
        by_path[path] = size
        by_group[node.group] = by_group.get(node.group, 0) + size
    return Count(sum(by_path.values()), by_group, by_path)


def is_node(x: Any) -> bool:
    """Tell whether `x` is a node (for `jax.tree` functions' `is_leaf`)."""
    return isinstance(x, Node)


def iter_nodes(delta: Any) -> Iterator[tuple[str, Node]]:
    """Yield `(path, node)` for every node of a delta, in tree order."""
    for path, node in jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_node):
        if not is_node(node):
            raise TypeError(
                f"{path_name(path)}: a delta holds nodes and None, found "
                f"{type(node).__name__}"
            )
        yield path_name(path), node


def fold_in_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Derive a key by a hash of `name` that is the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def path_name(path: tuple[Any, ...]) -> str:
    """Write a key path as rules see it: `"layer1_0/conv1/kernel"`.

    A Flax NNX variable's last key, `value`, is left out: the same rules then serve
    a Linen tree and an `nnx.State`.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_name(path) for path, _ in entries]
    if len(set(paths)) < len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(f"two leaves of one path: {twice}; rename a key with a '/'")
    return paths, [w for _, w in entries], treedef


def _nodes_like(shared: Any, delta: Any) -> list[Node | None]:
    """List delta's entry for each leaf of shared, or say how the trees differ."""
    paths, _, treedef = _flatten(shared)
    try:
        nodes = treedef.flatten_up_to(delta)
    except (ValueError, TypeError) as error:
        entries = jax.tree_util.tree_leaves_with_path(
            delta, is_leaf=lambda x: x is None or is_node(x)
        )
        found = [path_name(path) for path, _ in entries]
        raise ValueError(
            "shared and delta do not have the same paths; only in shared: "
            f"{_some([p for p in paths if p not in found])}; only in delta: "
            f"{_some([p for p in found if p not in paths])} ({error})"
        ) from None
    for path, node in zip(paths, nodes, strict=True):
        if node is not None and not is_node(node):
            raise ValueError(
                f"{path}: shared has an array here and delta a {type(node).__name__}, "
                "expected a node or None"
            )
    return nodes


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Put the path in front of a node's complaint."""
    try:
        yield
    except (TypeError, ValueError) as error:  # shapes that do not fit raise either
        raise ValueError(f"{path}: {error}") from error


def _some(paths: list[str], limit: int = 6) -> str:
    rest = f", ... ({len(paths)} in all)" if len(paths) > limit else ""
    return f"[{', '.join(paths[:limit])}{rest}]"
