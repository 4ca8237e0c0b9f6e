"""Have Flax Linen's layers serve every example with what its own task has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.factored.hooks import FIELDS
from ftn_jax.metrics import no_logit
from ftn_jax.mixed.layer import PER_EXAMPLE, Layer
from ftn_jax.mixed.norms import affine, along, batch_norm

Run = Callable[..., Any]

_LIFTED = "the layer sees it as {}, as under nn.scan or nn.vmap"


def lay(params: Any, layers: Mapping[str, Layer]) -> Any:
    """Put layers' shares into a copy of the parameters, by the layers' paths."""

    def copy(tree: Any) -> Any:
        return (
            {k: copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
        )

    new = copy(params)
    for path, layer in layers.items():
        place = new
        for name in filter(None, path.split("/")):
            place = place.setdefault(name, {})  # a norm without parameters has no place
        place[PER_EXAMPLE] = layer
    return new


@contextmanager
def served() -> Iterator[None]:
    """Have every Flax layer that finds a `Layer` in its parameters be served by it.

    Enter this inside the function that is traced.
    """
    from flax import linen as nn

    kinds: dict[Any, Callable[..., Any]] = {
        nn.BatchNorm: _batch_norm,
        **dict.fromkeys((nn.Conv, nn.Dense, nn.DenseGeneral), _linear),
        **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _norm),
        **dict.fromkeys((nn.GroupNorm, nn.InstanceNorm), _norm),
    }
    calls = {kind.__call__.__wrapped__: kind for kind in kinds}

    def intercept(run: Run, args: Any, kwargs: Any, context: Any) -> Any:
        module, kind = context.module, calls.get(context.orig_method.func)
        # A layer's own call, not that of a class made from it (`nn.jit(nn.Conv)`).
        own = kind is not None and isinstance(module, kind)
        if not own or not module.has_variable("params", PER_EXAMPLE):
            return run(*args, **kwargs)
        layer = module.get_variable("params", PER_EXAMPLE)
        return kinds[kind](layer, module, run, args, kwargs)

    with nn.intercept_methods(intercept):
        yield


def _linear(layer: Layer, module: Any, run: Run, args: Any, kwargs: Any) -> Any:
    if layer.slots is None:
        alone = layer.ragged and module.use_bias and "bias" not in dict(layer.leaves)
        why = "its kernel's outputs differ in number, and the bias has no node" * alone
        _note(layer, module, ("bias",), why)
        if why:
            layer.record.leaves[_join(layer.path, "kernel")] = why
        return run(*args, **kwargs)
    changes: dict[str, Any] = {}
    if layer.kernel is not None:
        field = next(name for name in FIELDS if hasattr(module, name))
        changes[field] = FIELDS[field](layer)
    if layer.bias is not None:
        changes["use_bias"] = False
    with _changed(module, changes):
        y = run(*args, **kwargs)
    if layer.bias is not None:
        layer.check_examples(y)
        y = y + along(layer.of_examples(layer.bias), y.ndim).astype(y.dtype)
    return y if layer.sizes is None else _hide(layer, y)


def _norm(layer: Layer, module: Any, run: Run, args: Any, kwargs: Any) -> Any:
    if layer.slots is None:
        last = getattr(module, "feature_axes", -1) in (-1, (-1,))
        why = "" if last else "its features do not lie along the last axis"
        _note(layer, module, ("scale", "bias"), why)
        return run(*args, **kwargs)
    names = [n for n in ("use_scale", "use_bias") if hasattr(module, n)]
    with _changed(module, dict.fromkeys(names, False)):
        y = run(*args, **kwargs)
    return affine(layer, module, y)


def _batch_norm(layer: Layer, module: Any, run: Run, args: Any, kwargs: Any) -> Any:
    names = ("x", "use_running_average")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, average = given["x"], given.get("use_running_average")
    if layer.slots is None:
        why = ""
        if module.axis not in (-1, x.ndim - 1):
            why = "its features do not lie along the last axis"
        elif given.get("mask") is not None:
            why = "it is called with a mask"
        elif module.axis_name is not None:
            why = f"it takes statistics over the mapped axis {module.axis_name!r}"
        _note(layer, module, ("scale", "bias"), why)
        for name in ("mean", "var"):
            kept = module.get_variable("batch_stats", name).shape
            lifted = kept != dict(layer.leaves).get(f"batch_stats:{name}")
            path = f"batch_stats:{_join(layer.path, name)}"
            layer.record.leaves[path] = why or _LIFTED.format(kept) * lifted
        return run(*args, **kwargs)
    average = module.use_running_average if average is None else average
    return batch_norm(layer, module, x, train=not average)


def _note(layer: Layer, module: Any, names: tuple[str, ...], why: str) -> None:
    """Note down which leaves with nodes the module reads itself."""
    from flax.core import meta

    for name, shape in layer.leaves:
        if name not in names or not module.has_variable("params", name):
            continue
        found = meta.unbox(module.get_variable("params", name)).shape
        if found != shape:
            why = _LIFTED.format(found)
        layer.record.leaves[_join(layer.path, name)] = why


def _hide(layer: Layer, y: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
    """Give the outputs that an example's task does not have the least logit."""
    sizes = layer.of_examples(layer.sizes)
    real = jnp.arange(y.shape[-1])[None] < sizes[:, None]
    return jnp.where(along(real, y.ndim), y, no_logit(y.dtype))


@contextmanager
def _changed(module: Any, fields: Mapping[str, Any]) -> Iterator[None]:
    """Change fields of a bound module for one call."""
    old = {name: getattr(module, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            object.__setattr__(module, name, value)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
