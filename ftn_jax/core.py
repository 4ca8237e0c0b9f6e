"""One frozen tree, many small ones: `params = materialize(shared, delta)`.

`shared` is a pretrained network's pytree of arrays. A task's `delta` is a tree with
the same paths that holds, at every leaf of `shared`, either `None` or a `Node`: a
small pytree that knows how to change that one weight. Only `delta` is ever
differentiated, so "frozen" is not a flag that can be wrong: no gradient, no update
and no donated buffer of `shared` exists.

What several tasks read but none owns (bases of the weights, for example) lies beside
the backbone in an `Extended`, which stands wherever `shared` does.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from ftn_jax.node import Node, is_node, register
from ftn_jax.paths import at, fold_in_name, path_name, some

Init = Callable[..., Node]
Rules = Mapping[str, Init | None]


@dataclass(frozen=True)
class Extended:
    """A backbone and the frozen arrays beside it; stands wherever `shared` does.

    Attributes:
        params: the backbone's tree.
        extras: arrays that nodes with `beside()` fields read:
            `extras[kind][path of the weight, or share label][name]`.
    """

    params: Any
    extras: dict[str, dict[str, dict[str, Any]]]


register(Extended, ("params", "extras"), ())


def extend(shared: Any, **kinds: Mapping[str, Mapping[str, Any]]) -> Extended:
    """Lay arrays beside the backbone, by kind, path and name; others there stay.

    Raises:
        ValueError: if another set of arrays of one of these kinds is there already.
    """
    params, extras = split_extras(shared)
    if taken := sorted({*kinds} & {*extras}):
        raise ValueError(
            f"the backbone already has {taken} beside it (it has {sorted(extras)}); "
            "extend the plain backbone, or build a new Extended"
        )
    new = {k: {p: dict(x) for p, x in entries.items()} for k, entries in kinds.items()}
    return Extended(params, extras | new)


class Count(NamedTuple):
    """What a task owns: its trained parameters, and the bytes of all its arrays."""

    total: int
    by_group: dict[str, int]
    by_path: dict[str, int]
    bytes: int


def make_delta(key: Key[Array, ""], shared: Any, rules: Rules) -> Any:
    """Build a task's delta: one node (or `None`) for each leaf of `shared`.

    Args:
        key: each node gets its own key, derived from its path, so adding or removing
            a layer or a rule does not change any other node's start.
        shared: the frozen backbone, a pytree of arrays (or of `ShapeDtypeStruct`
            under `jax.eval_shape`), or an `Extended`.
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
    shared, extras = split_extras(shared)
    paths, leaves, treedef = _flatten(shared)
    hits = [[p for p in rules if re.fullmatch(p, path)] for path in paths]
    matched, used = {p for h in hits for p in h}, {h[0] for h in hits if h}
    if nothing := [p for p in rules if p not in matched]:
        raise ValueError(
            f"rules that match no leaf: {nothing} (a pattern must match the whole "
            f"path); shared has the leaves {some(paths)}"
        )
    if shadowed := [p for p in rules if p not in used]:
        raise ValueError(
            f"rules that never apply: {shadowed}; earlier rules take all their leaves"
        )
    nodes: list[Node | None] = []
    owners: dict[Any, Node] = {}
    for path, w, patterns in zip(paths, leaves, hits, strict=True):
        init = rules[patterns[0]] if patterns else None
        with at(path):
            node = None if init is None else _start(init, key, path, w, extras)
            nodes.append(None if node is None else _tie(owners, node))
    return treedef.unflatten(nodes)


@jax.jit
def materialize(shared: Any, delta: Any) -> Any:
    """Combine the two trees: the parameters that the task's network runs with.

    Pure, jitted, and differentiable in `delta`; `shared` is only read. The result
    has `shared`'s structure; a leaf with a node is `node.merge(w)`, any other leaf
    is `w` itself.

    Raises:
        ValueError: if the trees do not have the same paths (lists those on one side
            only), if a node does not fit its weight (names path and shapes), or if
            what it reads does not lie beside the backbone.
    """
    params = [
        w if node is None else _merge(path, w, node)
        for path, w, node in complete(shared, delta)
    ]
    return jax.tree.structure(split_extras(shared)[0]).unflatten(params)


def complete(shared: Any, delta: Any) -> list[tuple[str, Any, Node | None]]:
    """List `(path, weight, node)` for every leaf of shared, the nodes complete.

    A complete node holds the arrays that it shares with other nodes or that lie
    beside the backbone, and can merge by itself.

    Raises:
        ValueError: if the trees do not have the same paths, or if a node finds
            nothing where its arrays should be (names path and kind).
    """
    params, extras = split_extras(shared)
    paths, leaves, _ = _flatten(params)
    owners: dict[Any, Node] = {}
    nodes = []
    for path, node in zip(paths, _nodes_like(params, delta), strict=True):
        with at(path):
            nodes.append(node and _fill(owners, extras, path, node))
    return list(zip(paths, leaves, nodes, strict=True))


def trainable(delta: Any) -> Any:
    """Leave only what is trained: `None` in the place of every other array."""
    return _over_nodes(lambda n: n.replace(**dict.fromkeys(n.frozen_fields)), delta)


def with_trained(delta: Any, trained: Any) -> Any:
    """Put the arrays of `trainable(delta)`'s structure back beside the frozen ones."""

    def put(node: Node, new: Node) -> Node:
        return new.replace(**{n: getattr(node, n) for n in node.frozen_fields})

    return jax.tree.map(put, delta, trained, is_leaf=is_node)


def perturb(delta: Any, key: Key[Array, ""]) -> Any:
    """Return the delta that one training step runs with: dropout, where nodes have it.

    Each node draws from a key of its own path.
    """

    def one(path: Any, node: Node) -> Node:
        if type(node).perturb is Node.perturb:
            return node
        return node.perturb(fold_in_name(key, path_name(path)))

    return jax.tree_util.tree_map_with_path(one, delta, is_leaf=is_node)


def compact(delta: Any) -> Any:
    """Return the delta to keep when training is over: same parameters, fewer bytes.

    Straight-through masks become bits, what was switched off is dropped. The result
    is for `materialize` and task files; it may not be trainable any more.
    """
    return _over_nodes(lambda n: n.compact(), delta)


def groups(delta: Any) -> Any:
    """Label every trained array with its node's group, for `optax.multi_transform`.

    Returns:
        A tree with the structure of `trainable(delta)` and a string in place of each
        array.
    """
    return _over_nodes(
        lambda node: jax.tree.map(lambda _: node.group, node), trainable(delta)
    )


def count(delta: Any) -> Count:
    """Count a delta's parameters; `jax.eval_shape`'s output does as well as arrays."""
    by_group: dict[str, int] = {}
    by_path: dict[str, int] = {}
    for path, node in iter_nodes(trainable(delta)):
        size = sum(leaf.size for leaf in jax.tree.leaves(node))
        by_path[path] = size
        by_group[node.group] = by_group.get(node.group, 0) + size
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(delta))
    return Count(sum(by_path.values()), by_group, by_path, nbytes)


def iter_nodes(delta: Any) -> Iterator[tuple[str, Node]]:
    """Yield `(path, node)` for every node of a delta, in tree order."""
    for path, node in jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_node):
        if not is_node(node):
            raise TypeError(
                f"{path_name(path)}: a delta holds nodes and None, found "
                f"{type(node).__name__}"
            )
        yield path_name(path), node


def split_extras(shared: Any) -> tuple[Any, dict[str, Any]]:
    """Return the backbone's tree and what lies beside it."""
    if isinstance(shared, Extended):
        return shared.params, shared.extras
    return shared, {}


def _start(init: Init, key: Any, path: str, w: Any, extras: Any) -> Node:
    if not jax.numpy.issubdtype(w.dtype, jax.numpy.inexact):
        raise ValueError(f"a node needs a float weight, found {w.dtype}")
    offered = {
        "extra": {k: x[path] for k, x in extras.items() if path in x},
        "keys": partial(fold_in_name, key),
    }
    parameters = inspect.signature(init).parameters
    wanted = {
        name: value
        for name, value in offered.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }
    return init(fold_in_name(key, path), w, **wanted)


def _tie(owners: dict[Any, Node], node: Node) -> Node:
    """Leave the arrays that a share label has in common with its first node."""
    if node.share is None:
        return node
    common = {n: getattr(node, n) for n in node.tied_fields}
    owner = owners.setdefault((type(node), node.share), node)
    if owner is node:
        return node
    for name, mine in common.items():
        theirs = getattr(owner, name)
        found, expected = (jax.tree.map(jax.numpy.shape, x) for x in (mine, theirs))
        if found != expected:
            raise ValueError(
                f"nodes of the label {node.share!r} share {name!r}, found the shape "
                f"{found} here and {expected} in an earlier node; give this one "
                "another label"
            )
    return node.replace(**dict.fromkeys(common))


def _fill(owners: dict[Any, Node], extras: Any, path: str, node: Node) -> Node:
    """Give a node the arrays that its share label or the backbone keeps for it."""
    values = {}
    if node.share is not None:
        owner = owners.setdefault((type(node), node.share), node)
        values = {n: getattr(owner, n) for n in node.tied_fields}
    for name, kind in node.beside_fields.items():
        place = node.share or path
        if name not in extras.get(kind, {}).get(place, {}):
            raise ValueError(
                f"a {type(node).__name__} reads {name!r} of {kind!r} beside the "
                f"backbone, found nothing at {place!r} (the backbone has "
                f"{sorted(extras)} beside it); pass the Extended that the task was "
                "made with"
            )
        values[name] = extras[kind][place][name]
    return node.replace(**values) if values else node


def _merge(path: str, w: Any, node: Node) -> Any:
    with at(path):
        return node.merge(w)


def _over_nodes(function: Callable[[Node], Any], delta: Any) -> Any:
    treedef = jax.tree.structure(delta, is_leaf=is_node)
    return treedef.unflatten(function(node) for _, node in iter_nodes(delta))


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
            f"{some([p for p in paths if p not in found])}; only in delta: "
            f"{some([p for p in found if p not in paths])} ({error})"
        ) from None
    for path, node in zip(paths, nodes, strict=True):
        if node is not None and not is_node(node):
            raise ValueError(
                f"{path}: shared has an array here and delta a {type(node).__name__}, "
                "expected a node or None"
            )
    return nodes
