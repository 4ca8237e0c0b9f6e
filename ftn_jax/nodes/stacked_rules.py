"""Bring what is written for single layers to a network that scans over its layers."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ftn_jax.node import Node
from ftn_jax.nodes.stacked import STACK, Stacked, numbered
from ftn_jax.paths import path_name

Init = Callable[..., Node]


def stacked_rules(
    shared: Any, rules: Mapping[str, Init | None]
) -> dict[str, Init | None]:
    """Make rules for single layers fit a network that scans over them.

    Args:
        shared: the backbone's tree of arrays or shapes; leaves below a key `blocks`
            are stacked layers. Without one the rules are returned as they are.
        rules: for the network not scanned: `blocks_0/fc/kernel`, ...

    Returns:
        Rules for `make_delta`; each leaf of a stack has one of its own.

    Raises:
        ValueError: if some layers of a stack have a node and others have none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    found: dict[str, Init | None] = {}
    plain, inside = [], set()
    for key_path, w in leaves:
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            plain.append(path)
            continue
        names = [numbered(place, i) for i in range(w.shape[0])]
        hits = [[p for p in rules if re.fullmatch(p, name)] for name in names]
        inside |= {p for h in hits for p in h}
        inits = [rules[h[0]] if h else None for h in hits]
        chosen = [init for init in inits if init is not None]
        if chosen and len(chosen) < len(inits):
            without = [n for n, i in zip(names, inits, strict=True) if i is None]
            raise ValueError(
                f"{path}: layers of one stack need a node each or none at all, found "
                f"none for {without}; adapt the network with separate layers "
                "(unstack_layers)"
            )
        if chosen:
            found[re.escape(path)] = partial(Stacked.init, inits=chosen, place=place)
        elif any(hits):
            found[re.escape(path)] = None
    if len(plain) == len(leaves):
        return dict(rules)
    for pattern, init in rules.items():
        outside = any(re.fullmatch(pattern, path) for path in plain)
        if outside or pattern not in inside:  # one that fits nothing shall be told of
            found[pattern] = init
    return found


def layer_leaves(shared: Any) -> dict[str, Any]:
    """List the leaves by path as in the network not scanned."""
    found = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(shared):
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            found[path] = w
        else:
            found |= {numbered(place, i): w[i] for i in range(w.shape[0])}
    return found


def stack_entries(
    shared: Any, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Bring arrays by path and name, made for single layers, to the paths of `shared`.

    For what lies beside the backbone: `extend(shared, svd=stack_entries(shared, ...))`.
    """
    found: dict[str, dict[str, Any]] = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(shared):
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            if path in entries:
                found[path] = dict(entries[path])
            continue
        own = [entries.get(numbered(place, i)) for i in range(w.shape[0])]
        layers = [x for x in own if x is not None]
        if len(layers) == len(own):
            found[path] = {n: jnp.stack([x[n] for x in layers]) for n in layers[0]}
    return found


def layer_place(path: str) -> str | None:
    """Return the path of a layer's leaf for that of a stack's, else None.

    Example:
        >>> layer_place("blocks/fc/kernel")
        'blocks_{}/fc/kernel'
    """
    before, found, rest = f"/{path}".rpartition(f"/{STACK}/")
    return f"{before}/{STACK}_{{}}/{rest}".lstrip("/") if found else None
