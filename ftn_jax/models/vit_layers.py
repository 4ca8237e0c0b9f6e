"""Turn a ViT's separate blocks into one stack of layers, and back."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = re.compile(r"blocks_(\d+)")
_STACK = "blocks"


def stack_layers(tree: Any) -> Any:
    """Replace `blocks_0` ... `blocks_{L-1}` by one `blocks` with a leading layer axis.

    Works on any pytree that holds them at any depth: parameters, optimizer states,
    trees with other pytrees at the leaves. What is beside the blocks stays as it is.

    Raises:
        ValueError: If there are no blocks, if one is missing, or if they differ in
            structure, shapes or types.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"blocks_0": {"w": jnp.ones(3)}, "blocks_1": {"w": jnp.ones(3)}}
        >>> jax.tree.map(jnp.shape, stack_layers(params))
        {'blocks': {'w': (2, 3)}}
    """
    return _convert(tree, _stack, holds=_holds_blocks, wanted="blocks_0, blocks_1, ...")


def unstack_layers(tree: Any) -> Any:
    """Replace `blocks` by `blocks_0` ... `blocks_{L-1}`, the reverse of `stack_layers`.

    Raises:
        ValueError: If there is no `blocks`, or its leaves do not have one common
            leading axis.
    """
    return _convert(tree, _unstack, holds=_holds_stack, wanted="blocks")


def _holds_blocks(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(map(_BLOCK.fullmatch, map(str, tree)))


def _holds_stack(tree: Any) -> bool:
    return isinstance(tree, Mapping) and _STACK in tree


def _convert(
    tree: Any,
    change: Callable[[Mapping[str, Any]], dict[str, Any]],
    *,
    holds: Callable[[Any], bool],
    wanted: str,
) -> Any:
    if not any(map(holds, jax.tree.leaves(tree, is_leaf=holds))):
        raise ValueError(
            f"found no {wanted} in the tree: give the parameters of a ViT, or a tree "
            "with the same paths"
        )
    return jax.tree.map(lambda t: change(t) if holds(t) else t, tree, is_leaf=holds)


def _stack(tree: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: t for name, t in tree.items() if not _BLOCK.fullmatch(str(name))}
    count = len(tree) - len(rest)
    names = [f"blocks_{i}" for i in range(count)]
    missing = [name for name in names if name not in tree]
    if missing or _STACK in rest:
        raise ValueError(
            f"found {count} blocks among {[*tree]}"
            + (f", without {missing}" if missing else " and already a stack of them")
        )
    blocks = [tree[name] for name in names]
    first = _describe(blocks[0])
    for name, block in zip(names, blocks, strict=True):
        if jax.tree.structure(block) != jax.tree.structure(blocks[0]):
            raise ValueError(
                f"{name} has another structure than blocks_0, found\n"
                f"  {jax.tree.structure(block)}\nexpected\n"
                f"  {jax.tree.structure(blocks[0])}\n"
                "Only equal blocks can be stacked: treat all of them alike"
            )
        for path, (found, expected) in _differences(_describe(block), first).items():
            raise ValueError(
                f"{name}{path} is {found}, blocks_0{path} is {expected}: only equal "
                "blocks can be stacked; pad what differs (ranks, for example)"
            )
    return rest | {_STACK: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def _unstack(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves = _describe(tree[_STACK])
    counts = {path: leaf.shape[:1] for path, leaf in leaves.items()}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            "the leaves of a stack have one common leading axis, found "
            + ", ".join(f"{path}: {leaf}" for path, leaf in leaves.items())
        )
    ((count,),) = set(counts.values())
    rest = {name: t for name, t in tree.items() if name != _STACK}
    clash = [name for name in rest if _BLOCK.fullmatch(str(name))]
    if clash:
        raise ValueError(f"found both {_STACK!r} and {clash}: keep one of the two")
    return rest | {
        f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree[_STACK])
        for i in range(count)
    }


def _describe(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = jax.eval_shape(lambda t: t, tree)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _differences(
    found: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    return {p: (found[p], expected[p]) for p in expected if found[p] != expected[p]}
