"""The size of a method's delta before anything is trained, and sizes that fit."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from ftn_jax.core import count, make_delta
from ftn_jax.method import Backbone, Method
from ftn_jax.sizes import backbone_size, stored_size


class Knob(NamedTuple):
    """The option that sets a method's size.

    Attributes:
        name: of the preset's option.
        values: what it may be, the smallest first.
    """

    name: str
    values: tuple[Any, ...]


_RANKS = tuple(range(1, 513))

KNOBS: Mapping[str, Knob] = {
    "ftn": Knob("rank", _RANKS),
    "lora": Knob("rank", _RANKS),
    "dora": Knob("rank", _RANKS),
    "kadaptation": Knob("rank", _RANKS),
    "svft": Knob("off_diagonals", tuple(range(512))),
    "factored_adapters": Knob("rank", _RANKS),
}
"""The methods that come in sizes; the others have one."""


def plan(backbone: Backbone, method: Method) -> Any:
    """Make the method's delta by shapes alone."""
    if method.prepare:
        backbone = method.prepare(backbone)
    make = partial(make_delta, rules=method.rules_for(backbone.shared))
    return jax.eval_shape(make, jax.random.key(0), backbone.shared)


def planned_groups(backbone: Backbone, method: Method) -> set[str]:
    """Name the optimizer groups that the method's delta has."""
    return {*count(plan(backbone, method)).by_group}


def planned_size(backbone: Backbone, method: Method) -> int:
    """Count what the method trains beside its head.

    Straight-through masks and scores count as they are trained, 32 bits each; what
    `compact` leaves of them is known afterwards.

    Returns:
        Words of 32 bits, which is parameters for factors, norms and weights.
    """
    return stored_size(plan(backbone, method))


def fit_to(
    backbone: Backbone,
    preset: Callable[..., Method],
    *,
    name: str,
    share: float,
    **options: Any,
) -> dict[str, Any]:
    """Find the size of a method that is nearest to a share of the backbone.

    Args:
        backbone: the network to adapt.
        preset: makes the method from `layers`, `classes` and its options.
        name: of the preset, in `KNOBS`.
        share: of the backbone's parameters (its head left out), norms included.
        options: the preset's other options.

    Returns:
        The knob's option with its value.

    Raises:
        ValueError: if the smallest size costs more than twice the share (says how
            much).
    """
    knob, budget = KNOBS[name], share * backbone_size(backbone)

    def size(value: Any) -> float:
        chosen = {knob.name: value} | options
        try:
            method = preset(backbone.layers, classes=2, **chosen)
            return planned_size(backbone, method._replace(prepare=None))
        except ValueError:
            if value == knob.values[0]:
                raise
            return math.inf  # too large for a small layer

    if size(knob.values[0]) > 2 * budget:
        raise ValueError(
            f"{name} at its smallest, {knob.name} = {knob.values[0]}, stores "
            f"{size(knob.values[0]):,.0f} numbers; {share:.1%} of the backbone are "
            f"{int(budget):,}. Raise the budget"
        )
    above = bisect_left(knob.values, budget, key=size)  # sizes grow
    around = knob.values[max(above - 1, 0) : above + 1]
    nearest = min((size(value) for value in around), key=lambda n: abs(n - budget))
    # A rank cut to the layers' own limit stops growing: the first that gives the size.
    return {knob.name: knob.values[bisect_left(knob.values, nearest, key=size)]}
