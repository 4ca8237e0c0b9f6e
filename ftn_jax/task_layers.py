"""Task files hold single layers: how stacks of layers are taken apart and put together.

A network may run its layers one after another or scan over a stack of them. Its tasks
are the same, and so are their files.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ftn_jax.core import iter_nodes
from ftn_jax.digest import is_spread
from ftn_jax.manifest import TaskFileError
from ftn_jax.node import Node
from ftn_jax.nodes.stacked import STACK, Stacked
from ftn_jax.paths import path_name


def stacks_of(params: Any, delta: Any) -> list[str]:
    """Name the stacks of a backbone: what stacked nodes say, and what is called so.

    A stack whose leaves differ in their first axis, or have plain nodes, is none.
    """
    found, plain = set(), []
    for path, node in iter_nodes(delta):
        if isinstance(node, Stacked):
            found.add(node.place.partition("_{}")[0])
        else:
            plain.append(path)
    sizes: dict[str, set[Any]] = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(params):
        before, name, _ = f"/{path_name(key_path)}".rpartition(f"/{STACK}/")
        if name:
            stack = f"{before}/{STACK}".lstrip("/")
            sizes.setdefault(stack, set()).add(w.shape[0] if w.shape else None)
    for stack, layers in sizes.items():
        if len(layers) == 1 and None not in layers:
            if not any(path.startswith(f"{stack}/") for path in plain):
                found.add(stack)
    return sorted(found)


def stacks_for(paths: Collection[str], params: Any) -> list[str]:
    """Name those stacks of a backbone whose layers the given paths name one by one."""
    own = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    parents = {path[:n] for path in own for n, c in enumerate(path) if c == "/"}
    named = {path[:n] for path in paths for n, c in enumerate(path) if c == "/"}
    return sorted(p for p in parents if f"{p}_0" in named and f"{p}_0" not in parents)


def single_leaves(params: Any, stacks: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield `(path, weight)` of every leaf, those of stacks layer by layer."""
    for key_path, w in jax.tree_util.tree_leaves_with_path(params):
        path = path_name(key_path)
        place = place_in(stacks, path)
        if place is None:
            yield path, w
        else:
            for i, layer in enumerate(w if is_spread(w) else np.asarray(w)):
                yield place.replace("{}", str(i)), layer


def single_nodes(delta: Any) -> Iterator[tuple[str, Node]]:
    """Yield `(path, node)` of every node, stacked ones layer by layer."""
    for path, node in iter_nodes(delta):
        if isinstance(node, Stacked):
            yield from zip(node.paths(), node.nodes(), strict=True)
        else:
            yield path, node


def take_node(
    nodes: dict[str, Node], path: str, w: Any, stacks: Iterable[str]
) -> Node | None:
    """Take out of `nodes` what belongs to a leaf, stacked if the leaf is.

    Raises:
        TaskFileError: if only some layers of a stack have a node, or they differ.
    """
    place = place_in(stacks, path)
    if place is None:
        return nodes.pop(path, None)
    paths = [place.replace("{}", str(i)) for i in range(w.shape[0])]
    found = [nodes.pop(p) for p in paths if p in nodes]
    if not found:
        return None
    if len(found) < len(paths):
        raise TaskFileError(
            f"the task has {len(found)} nodes for the {len(paths)} layers of {path}; "
            "open it on the network with separate layers (unstack_layers)"
        )
    try:
        return Stacked.of(found, place=place)
    except ValueError as error:
        raise TaskFileError(
            f"{path}: {error}; open the task on the network with separate layers "
            "(unstack_layers)"
        ) from error


def place_in(stacks: Iterable[str], path: str) -> str | None:
    """Write a stacked leaf's path with `{}` for the layer's number; None if it is none.

    Example:
        >>> place_in(["blocks"], "blocks/fc/kernel")
        'blocks_{}/fc/kernel'
    """
    for stack in stacks:
        if path.startswith(f"{stack}/"):
            return f"{stack}_{{}}{path[len(stack) :]}"
    return None
