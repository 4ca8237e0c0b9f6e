"""What a transform is: steps in a row, and the same as JSON.

A transform is any `(rng, image) -> image`. `describe` and `from_description` turn one
that is made of registered steps into JSON values and back.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

# On a dense example, an image with targets, the steps before the last stackable ones
# take and give a dict of arrays; those last ones work on its "image".
Transform = Callable[[np.random.Generator, Any], Any]

_STEPS: dict[str, type["Step"]] = {}


class Step(ABC):
    """Turns one image into another; a frozen dataclass subclass is registered.

    Attributes:
        random: the step draws from `rng`.
        stackable: the step works on a stack (b, h, w, c) as on one image; a random
            step never does.
    """

    random: ClassVar[bool] = False
    stackable: ClassVar[bool] = False

    def __init_subclass__(cls):
        """Register the step under its class name."""
        _STEPS[cls.__name__] = cls

    @abstractmethod
    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Transform one image."""


@dataclass(frozen=True)
class Compose:
    """Applies steps in order."""

    steps: tuple[Transform, ...]

    def __init__(self, steps: Sequence[Transform]):
        object.__setattr__(self, "steps", tuple(steps))

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Transform one image."""
        for step in self.steps:
            image = step(rng, image)
        return image


def flatten(transform: Transform) -> tuple[Transform, ...]:
    """List the steps of a transform, nested `Compose` opened."""
    if isinstance(transform, Compose):
        return tuple(inner for step in transform.steps for inner in flatten(step))
    return (transform,)


def describe(transform: Transform) -> list[dict[str, Any]]:
    """Write a transform as JSON values: `[{"step": "Flip", "probability": 0.5}, ...]`.

    Raises:
        TypeError: where a step is not a registered `Step`.
    """
    description = []
    for step in flatten(transform):
        name = type(step).__name__
        if not isinstance(step, Step) or not dataclasses.is_dataclass(step):
            raise TypeError(
                f"{step!r} has no description; make it a frozen dataclass that "
                "subclasses Step"
            )
        fields = dataclasses.asdict(step)
        values = {k: list(v) if type(v) is tuple else v for k, v in fields.items()}
        description.append({"step": name, **values})
    return description


def from_description(description: Sequence[dict[str, Any]]) -> Compose:
    """Build the transform that `describe` wrote.

    Raises:
        ValueError: where a step or a field is unknown, missing or out of range; the
            message names its place.
    """
    steps = []
    for place, entry in enumerate(description):
        if not isinstance(entry, dict) or "step" not in entry:
            raise ValueError(
                f"transform {place}: found {entry!r}, expected an object with 'step'"
            )
        name = str(entry["step"])
        if name not in _STEPS:
            raise ValueError(
                f"transform {place}: unknown step {name!r}, expected one of "
                f"{sorted(_STEPS)}"
            )
        cls = _STEPS[name]
        known = {f.name: f.type for f in dataclasses.fields(cls)}  # pyright: ignore
        values = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in entry.items()
            if k != "step"
        }
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"transform {place}: {name} has no field {unknown}, expected {[*known]}"
            )
        for field, value in values.items():
            if known[field] is int and type(value) is not int:
                raise ValueError(
                    f"transform {place}: {name}.{field}: found {value!r}, expected an "
                    "integer"
                )
        try:
            steps.append(cls(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"transform {place}: {name}: {error}") from error
    return Compose(steps)
