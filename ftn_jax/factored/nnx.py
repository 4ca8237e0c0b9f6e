"""Reach the operations of a Flax NNX network."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from ftn_jax.apply import around_calls
from ftn_jax.factored.hooks import FIELDS, Companion
from ftn_jax.node import register


@dataclass(frozen=True)
class StandIn:
    """What takes an operation's place: a pytree of its companion's variables.

    A part of the module like its kernel, so that NNX's own jit, scan, vmap and
    checkpoint treat the two alike.
    """

    companion: Companion
    field: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the operation through the companion."""
        from flax import nnx

        companion = jax.tree.map(
            lambda x: x[...],
            self.companion,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return FIELDS[self.field](companion)(*args, **options)


register(StandIn, ("companion",), ("field",))


def is_state(params: Any) -> bool:
    """Tell whether these are the parameters of an NNX network."""
    nnx = sys.modules.get("flax.nnx")  # where it was not loaded, nothing is of it
    return nnx is not None and isinstance(params, nnx.State)


def hooked(companions: Mapping[str, Companion]) -> AbstractContextManager[None]:
    """Have every layer of a network run through its companion, where it has one.

    Args:
        companions: by the path of the kernel.
    """

    @contextmanager
    def around(model: Any) -> Iterator[None]:
        from flax import nnx

        restore = []
        for path, module in nnx.iter_modules(model):
            companion = companions.get("/".join(map(str, (*path, "kernel"))))
            field = _free_field(module)
            if companion is None or field is None:
                continue
            # As parameters: transforms that treat those apart take these along.
            variables = jax.tree.map(nnx.Param, companion)
            restore.append((module, field, getattr(module, field)))
            setattr(module, field, nnx.data(StandIn(variables, field)))
        try:
            yield
        finally:
            for module, field, old in restore:
                setattr(module, field, nnx.static(old))

    return around_calls(around)


def _free_field(module: Any) -> str | None:
    """Return the field of a layer's operation, if the user has not set it."""
    from flax import nnx

    if isinstance(module, nnx.Conv):
        default = module.conv_general_dilated is lax.conv_general_dilated
        return "conv_general_dilated" if default else None
    if isinstance(module, nnx.Linear):
        return "dot_general" if module.dot_general is lax.dot_general else None
    if isinstance(module, nnx.LinearGeneral):
        unset = module.dot_general is None and module.dot_general_cls is None
        return "dot_general" if unset else None
    return None
