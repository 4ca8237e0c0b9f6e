"""Reach the operations of a Flax Linen network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ftn_jax.factored.hooks import BESIDE, FIELDS, Companion


def lay_beside(params: Any, companions: Mapping[str, Companion]) -> Any:
    """Put companions into the parameters, each beside its kernel.

    Args:
        params: nested mappings of arrays.
        companions: by the path of the kernel.
    """

    def walk(tree: Any, prefix: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        new = {name: walk(child, f"{prefix}{name}/") for name, child in tree.items()}
        if f"{prefix}kernel" in companions:
            new[BESIDE] = companions[f"{prefix}kernel"]
        return type(tree)(new)  # pyright: ignore[reportCallIssue]

    return walk(params, "")


@contextmanager
def hooked() -> Iterator[None]:
    """Have every Flax layer that finds a companion in its parameters run through it.

    Enter this inside the function that is traced: a program that was compiled outside
    does not know of it.
    """
    from flax import linen as nn

    layers: tuple[Any, ...] = (nn.Conv, nn.Dense, nn.DenseGeneral)
    calls = {layer.__call__.__wrapped__: layer for layer in layers}

    def intercept(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.orig_method.func
        # A layer's own call, not that of a class made from it (`nn.jit(nn.Conv)`),
        # which copies its fields into a layer of its own.
        layer = calls.get(method)
        own = layer is not None and isinstance(module, layer)
        if not own or not module.has_variable("params", BESIDE):
            return run(*args, **kwargs)
        field = next(name for name in FIELDS if hasattr(module, name))
        if any(getattr(module, n) is not None for n in (field, f"{field}_cls")):
            return run(*args, **kwargs)
        stand_in = FIELDS[field](module.get_variable("params", BESIDE))
        object.__setattr__(module, field, stand_in)
        try:
            return run(*args, **kwargs)
        finally:
            object.__setattr__(module, field, None)

    with nn.intercept_methods(intercept):
        yield
