"""Normalize each example with what its own task has."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.mixed.layer import Layer


def batch_norm(
    layer: Layer, module: Any, x: Float[Array, "b ... c"], *, train: bool
) -> Float[Array, "b ... c"]:
    """Run Flax's BatchNorm as each task alone would run it.

    In training, the mean and the biased variance are those of each task's own
    examples, and the running statistics of the tasks in the batch are moved; the
    others' stay as they are, to the last bit.

    Args:
        layer: what the examples have of their own.
        module: the bound `flax.linen.BatchNorm`; its running statistics have a
            leading axis of slots.
        x: its input.
        train: whether it uses the batch's statistics.
    """
    layer.check_examples(x)
    old = {n: module.get_variable("batch_stats", n) for n in ("mean", "var")}
    stats = old
    if train:
        stats, present = _by_task(layer, module, x, len(old["mean"]))
        if module.is_mutable_collection("batch_stats"):
            keep = module.momentum
            for name, value in old.items():
                moved = keep * value + (1 - keep) * stats[name]
                new = jnp.where(present[:, None], moved, value)
                module.put_variable("batch_stats", name, new)
    scale = own_or_shared(layer, module, "scale")
    bias = own_or_shared(layer, module, "bias")
    factor = jax.lax.rsqrt(stats["var"] + module.epsilon)
    if scale is not None:
        factor = factor * scale
    mean, factor = layer.of_examples((stats["mean"], factor))
    y = (x - along(mean, x.ndim)) * along(factor, x.ndim)
    if bias is not None:
        y = y + along(layer.of_examples(bias), x.ndim)
    given = [a for a in (x, scale, bias) if a is not None]
    return y.astype(module.dtype or jnp.result_type(*given))


def affine(
    layer: Layer, module: Any, y: Float[Array, "b ... c"]
) -> Float[Array, "b ... c"]:
    """Scale and shift what a norm without scale and bias made."""
    layer.check_examples(y)
    scale = own_or_shared(layer, module, "scale")
    bias = own_or_shared(layer, module, "bias")
    if scale is not None:
        y = y * along(layer.of_examples(scale), y.ndim)
    if bias is not None:
        y = y + along(layer.of_examples(bias), y.ndim)
    return y if module.dtype is None else y.astype(module.dtype)


def own_or_shared(layer: Layer, module: Any, name: str) -> Float[Array, "_ c"] | None:
    """Return the tasks' own scale or bias, else the backbone's, if there is one."""
    own = getattr(layer, name)
    if own is not None or not getattr(module, f"use_{name}", False):
        return own
    from flax.core import meta

    return meta.unbox(module.get_variable("params", name))[None]


def along(x: Float[Array, "b ..."], ndim: int) -> Float[Array, "..."]:
    """Lay the examples' vectors along the last axes of an array of `ndim` axes."""
    return x.reshape(len(x), *(1,) * (ndim - x.ndim), *x.shape[1:])


def _by_task(
    layer: Layer, module: Any, x: Any, slots: int
) -> tuple[dict[str, Float[Array, "slots c"]], Any]:
    """Take mean and biased variance over each task's examples, as Flax does."""
    dtype = jnp.promote_types(module.dtype or x.dtype, jnp.float32)
    x = x.astype(dtype)
    # Over each example first, then over the examples of a task: a sum by segments,
    # not a product with a mask, keeps one task's NaN from the others.
    counts = _sum(layer, jnp.ones(len(x), dtype), slots)
    share = jnp.maximum(counts, 1)[:, None]

    def mean_of(x: Any) -> Any:
        return _sum(layer, x.mean(axis=tuple(range(1, x.ndim - 1))), slots) / share

    mean = mean_of(x)
    if module.use_fast_variance:
        var = jnp.maximum(0.0, mean_of(x * x) - mean * mean)
    else:
        gap = x - along(layer.of_examples(mean), x.ndim)
        var = mean_of(gap * gap)
    return {"mean": mean, "var": var}, counts > 0


def _sum(layer: Layer, x: Any, slots: int) -> Any:
    assert layer.slots is not None
    return jax.ops.segment_sum(x, layer.slots, slots)  # drops examples of no slot
