"""Metrics as sums and counts; the mean is taken once, at the end."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Sums = dict[str, Float[Array, ""]]


def classification(
    logits: Float[Array, "b classes"],
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
) -> Sums:
    """Sum the cross-entropy and the hits over a batch's real examples.

    Args:
        logits: unnormalised scores; `no_logit` for a class that an example lacks.
        batch: `"label"`, int `(b,)`, and optionally `"mask"`, `(b,)`, 0 for padding.
        label_smoothing: share of the target spread evenly over the example's classes.

    Returns:
        `"loss"` (nats), `"correct"` and `"count"`, each summed over the examples.
    """
    labels = batch["label"]
    mask = jnp.asarray(batch.get("mask", jnp.ones(labels.shape)), jnp.float32)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    if label_smoothing:
        # A network may have cast the logits to float32 in the end.
        least = (no_logit(d).astype(logits.dtype) for d in (logits.dtype, jnp.bfloat16))
        real = jnp.asarray(logits > jnp.maximum(*least), jnp.float32)
        even = label_smoothing * real / real.sum(axis=-1, keepdims=True)
        targets = (1 - label_smoothing) * targets + even
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    # where, not a product: an infinite loss on padding must not become NaN.
    losses = jnp.where(mask > 0, losses * mask, 0.0)
    hits = (jnp.argmax(logits, axis=-1) == labels) * mask
    return {"loss": losses.sum(), "correct": hits.sum(), "count": mask.sum()}


def no_logit(dtype: Any) -> Float[Array, ""]:
    """Return the logit of a class that an example lacks; its probability is 0.

    Not minus infinity, in float32 neither: 0 times that, in a cross-entropy with
    one-hot targets, is NaN.
    """
    least = max(float(jnp.finfo(t).min) for t in (dtype, jnp.float32))
    return jnp.asarray(least / 2, dtype)


def add(total: Mapping[str, Any] | None, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Add one batch's sums to the total; `None` is the empty total."""
    if total is None:
        return dict(sums)
    return {name: total[name] + value for name, value in sums.items()}


def means(total: Mapping[str, Any]) -> dict[str, float]:
    """Divide every sum by the count.

    Returns:
        The mean of each entry but `"count"`, as Python floats; classification's
        `"correct"` is called `"accuracy"`.

    Raises:
        ValueError: if nothing was counted.
    """
    total = {name: float(value) for name, value in total.items()}
    count = total.pop("count", 0.0)
    if not count:
        raise ValueError("no example was counted: the source is empty or all masked")
    result = {name: value / count for name, value in total.items()}
    if "correct" in result:
        result["accuracy"] = result.pop("correct")
    return result
