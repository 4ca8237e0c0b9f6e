"""Add up and scale tasks' deltas, factor by factor."""

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ftn_jax.core import iter_nodes
from ftn_jax.node import Node, is_node
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.replace import Replace
from ftn_jax.paths import at, path_name, some

MEAN = "mean"


def combine(
    deltas: Mapping[str, Any],
    weights: Mapping[str, float],
    *,
    replaced: str | Mapping[str, str] | None = None,
) -> Any:
    """Make the weighted sum of several tasks' updates, or a multiple of one's.

    The factors are laid side by side, so that every term keeps its own partners: the
    update is the weighted sum of the updates, exactly, where adding up the factors
    themselves would mix one task's with another's. Only ratios of the weights times
    the nodes' scales are multiplied into a factor: powers of two cost no rounding.
    A task of weight 0 adds no terms. `ftn_jax.recompress` brings the rank down again.

    Running statistics are no part of a delta, and belong to none of the tasks any
    more: take new ones on data.

    Args:
        deltas: the tasks' trees, by name.
        weights: one number for each task.
        replaced: what becomes of the `Replace` nodes, of all or by their group:
            `"mean"` for the mean of their arrays by these weights, or the name of the
            task to take them from. There is no default: they are no updates that
            could be added, and the mean of two tasks' heads means nothing if their
            classes differ.

    Raises:
        ValueError: if there is not one finite weight for each task, the tasks' trees
            differ, nodes at a path cannot be added, or a group of `Replace` nodes has
            no choice or one that is impossible (names the path).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ftn_jax.nodes import CP
        >>> w = jnp.ones((3, 3, 8, 16))
        >>> a, b = ({"kernel": CP.init(jax.random.key(r), w, rank=r)} for r in (2, 3))
        >>> combine({"a": a, "b": b}, {"a": 1.0, "b": -0.5})["kernel"].rank
        5
    """
    if {*weights} != {*deltas} or not deltas:
        raise ValueError(
            f"weights are for {sorted(weights)}, the deltas are {sorted(deltas)}; give "
            "one number for each"
        )
    if bad := {n: x for n, x in weights.items() if not math.isfinite(x)}:
        raise ValueError(f"weights must be finite numbers, found {bad}")
    weights = {n: float(x) for n, x in weights.items()}  # NumPy's would set the dtype
    if MEAN in deltas:
        raise ValueError(f"{MEAN!r} is a choice of `replaced`; name the task otherwise")
    nodes = [node for delta in deltas.values() for _, node in iter_nodes(delta)]
    if isinstance(replaced, str):
        replaced = {n.group: replaced for n in nodes if isinstance(n, Replace)}
    choices = dict(replaced or {})
    if unknown := {g: c for g, c in choices.items() if c not in (MEAN, *deltas)}:
        raise ValueError(
            f"replaced has the choices {unknown}; expected {MEAN!r} or one of "
            f"{sorted(deltas)}"
        )
    paths = {name: _paths(delta) for name, delta in deltas.items()}
    (name, expected), *others = paths.items()
    for other, found in others:
        if {*found} != {*expected}:
            raise ValueError(
                f"the trees of {other!r} and {name!r} have different paths: only in "
                f"one of them are {some(sorted({*found} ^ {*expected}))}"
            )
    new = []
    for path in expected:
        with at(path):
            column = {name: nodes[path] for name, nodes in paths.items()}
            new.append(_combine(column, weights, choices))
    treedef = jax.tree.structure(deltas[name], is_leaf=_is_entry)
    return treedef.unflatten(new)


def _is_entry(x: Any) -> bool:
    return x is None or is_node(x)


def _paths(delta: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(delta, is_leaf=_is_entry)
    return {path_name(path): node for path, node in leaves}


def _combine(
    column: Mapping[str, Any], weights: Mapping[str, float], choices: Mapping[str, str]
) -> Node | None:
    """Combine what the tasks have at one path."""
    found = {name: node for name, node in column.items() if node is not None}
    if not found:
        return None
    if any(isinstance(node, Replace) for node in found.values()):
        return _combine_replaced(column, weights, choices)
    return _concatenated([*found.values()], [weights[name] for name in found])


def _combine_replaced(
    column: Mapping[str, Any], weights: Mapping[str, float], choices: Mapping[str, str]
) -> Node | None:
    groups = {n.group for n in column.values() if n is not None}
    chosen = {choices.get(group) for group in groups}
    if len(chosen) > 1 or None in chosen:
        raise ValueError(
            f"Replace nodes of the groups {sorted(groups)} cannot be added; say what "
            f"becomes of each in replaced={{group: {MEAN!r} or the name of a task}}, "
            f"found {dict(choices)}"
        )
    (choice,) = chosen
    if choice != MEAN:
        return column[str(choice)]
    missing = [n for n, node in column.items() if not isinstance(node, Replace)]
    shapes = {n: x.value.shape for n, x in column.items() if isinstance(x, Replace)}
    if missing or len({*shapes.values()}) > 1:
        raise ValueError(
            "a mean needs a Replace of one shape in every task, found the shapes "
            f"{shapes}" + (f" and none in {missing}" if missing else "")
        )
    total = sum(weights.values())
    if total == 0:
        raise ValueError(f"a mean needs weights that do not add up to 0: {weights}")
    terms = [weights[name] / total * node.value for name, node in column.items()]
    return next(iter(column.values())).replace(value=sum(terms[1:], terms[0]))


def _concatenated(nodes: Sequence[Node], weights: Sequence[float]) -> Node:
    """Lay the factors of nodes of one type side by side."""
    kinds = {type(node).__name__ for node in nodes}
    if len(kinds) > 1:
        raise ValueError(
            f"updates of the types {sorted(kinds)} cannot be added factor by factor"
        )
    check_low_rank(nodes[0])
    many: Any = nodes
    scales = [float(n.scale * x) for n, x in zip(many, weights, strict=True)]
    live = [n for n, s in enumerate(scales) if s] or [0]
    unit = scales[live[0]]
    ratios = [scales[n] / unit if unit else 1.0 for n in live]
    return _side_by_side(many[0], [many[n] for n in live], ratios, unit)


def check_low_rank(node: Node) -> None:
    """Check that a node is a sum of products of factors, CP or LoRA.

    Raises:
        ValueError: if not.
    """
    if type(node) not in (CP, LoRA):
        raise ValueError(
            f"a {type(node).__name__} is no sum of factors' products; CP and LoRA are"
        )


@singledispatch
def _side_by_side(
    like: Node, nodes: Sequence[Any], ratios: Sequence[float], unit: float
) -> Node:
    raise TypeError(f"no rule for {type(like).__name__}")


@_side_by_side.register
def _(like: CP, nodes: Sequence[CP], ratios: Sequence[float], unit: float) -> CP:
    if len({node.axes for node in nodes}) > 1:
        raise ValueError(
            f"the factors span the axes {sorted({node.axes for node in nodes})}; only "
            "updates over the same axes can be added factor by factor"
        )
    columns = zip(*(node.factors for node in nodes), strict=True)
    *front, last = [[*column] for column in columns]
    last = [_times(f, r) for f, r in zip(last, ratios, strict=True)]
    factors = tuple(jnp.concatenate(column, axis=1) for column in (*front, last))
    return CP(factors, axes=nodes[0].axes, scale=unit, group=like.group)


@_side_by_side.register
def _(like: LoRA, nodes: Sequence[LoRA], ratios: Sequence[float], unit: float) -> LoRA:
    if len({node.form for node in nodes}) > 1:
        raise ValueError("the LoRA nodes are of different forms, conv and reshape")
    lasts = [_times(node.b, r) for node, r in zip(nodes, ratios, strict=True)]
    rank = (1, 0) if nodes[0].form == "conv" else (0, 1)
    a = jnp.concatenate([node.a for node in nodes], axis=rank[0])
    b = jnp.concatenate(lasts, axis=rank[1])
    return LoRA(a, b, form=nodes[0].form, scale=unit, group=like.group)


def _times(x: Array, ratio: float) -> Array:
    return x if ratio == 1 else x * jnp.asarray(ratio, x.dtype)
