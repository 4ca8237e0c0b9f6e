"""Trace a network once, without running it, to see which weights the hooks reach."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from ftn_jax.factored.hooks import Mark, Record, Use
from ftn_jax.factored.provenance import Sight, Trail, follow
from ftn_jax.paths import path_name


class Reach(NamedTuple):
    """How a network uses one weight.

    Attributes:
        uses: its operations, if hooks reach them all.
        layers: how many slices of the weight a scan or a vmap runs through; 0 if the
            network uses the weight as it is.
        why: why the hooks do not reach it, or not every use of it; empty if they do.
    """

    uses: tuple[Use, ...] = ()
    layers: int = 0
    why: str = ""


def probe(
    run: Callable[..., Any], params: Any, *arguments: Any, paths: Iterable[str]
) -> dict[str, Reach]:
    """Find out how a network uses some of its weights.

    The network is traced with a mark beside each of these weights. Where a hook meets
    one, it tags the kernel it was given. A weight counts as reached if the traced
    program does nothing with it but hand it, unchanged, to such tags: a mask, a
    standardized weight, a second use that no hook sees are all found out.

    Args:
        run: `(params, companions by path, *arguments) -> outputs`.
        params: the network's parameters.
        arguments: of the network.
        paths: of the weights in question.
    """
    record = Record({})
    marks = {path: Mark(record, path) for path in paths}
    entries = jax.tree_util.tree_leaves_with_path(params)

    def traced(params: Any, *arguments: Any) -> list[Any]:
        outputs = jax.tree.leaves(run(params, marks, *arguments))
        return [x for x in outputs if isinstance(x, jax.Array)]

    program = jax.make_jaxpr(traced)(params, *arguments)
    trails, strays = follow(program, len(entries), {*record.uses})
    names = [path_name(path) for path, _ in entries]
    foreign = {record.uses[tag].path for tag in strays}
    for name, trail in zip(names, trails, strict=True):
        owners = {record.uses[sight.tag].path for sight in trail.sights}
        if owners - {name}:  # neither weight is its layer's alone
            foreign |= owners | {name}
    return {
        name: _reach(leaf.shape, trail, record, foreign=name in foreign)
        for name, (_, leaf), trail in zip(names, entries, trails, strict=True)
        if name in marks
    }


def _reach(
    shape: tuple[int, ...], trail: Trail, record: Record, *, foreign: bool
) -> Reach:
    if foreign:
        return Reach(why="its layer's operation gets another kernel, or a changed one")
    if not trail.sights:
        return Reach(why="no hook reaches it")
    if trail.others:
        return Reach(why=f"it also goes through {', '.join(sorted(trail.others))}")
    uses = tuple(record.uses[sight.tag] for sight in trail.sights)
    layers = {
        _layers(shape, sight, use.kernel.shape)
        for sight, use in zip(trail.sights, uses, strict=True)
    }
    if not layers <= {0} and not layers <= {1}:
        return Reach(why="it is sliced in a way that factors cannot follow")
    if any(use.op.roles(len(use.kernel.shape)) is None for use in uses):
        return Reach(why=f"its {uses[0].op.name} has no low-rank path")
    return Reach(uses, layers=shape[0] if layers == {1} else 0)


def _layers(
    shape: tuple[int, ...], sight: Sight, kernel: tuple[int, ...]
) -> int | None:
    """Count the leading axes that scans and a vmap take off a weight."""
    if shape[sight.layers :] != sight.shape:
        return None
    if sight.shape == kernel:
        return sight.layers
    places = [
        a
        for a in range(len(sight.shape))
        if sight.shape[:a] + sight.shape[a + 1 :] == kernel
    ]
    # A vmap does not tell its axis; sizes that leave two to choose from may not do.
    return sight.layers + 1 if places == [0] else None
