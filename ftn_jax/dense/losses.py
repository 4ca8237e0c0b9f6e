"""Losses of the four NYUD tasks, as sums over pixels and the number of pixels.

Each is `(outputs, batch) -> sums` for `make_train_step`: `"loss"` over `"count"` is
the published mean times the task's weight. Pixels without truth do not count; a batch
without any has loss and gradient 0.

Source: RCM (arXiv 2007.12540), the settings of its published configurations.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ftn_jax.metrics import Sums

IGNORED = 255
LARGEST_EDGE = 1.1
"""Edge maps hold 0 to 1; what is padded holds 255 and is above this."""


def counted(batch: Mapping[str, Any]) -> Bool[Array, "b 1 1"]:
    """Tell which examples are real and not only there to fill the batch."""
    size = len(batch["image"])
    return jnp.asarray(batch.get("mask", jnp.ones(size)))[:, None, None] > 0


def shifted_labels(labels: Any, *, classes: int) -> Any:
    """Give labels for this number of classes.

    With 40 classes the background (0) is ignored, as in the other published variant of
    NYUD. Any other number of classes takes the labels as they are.
    """
    if classes != 40:
        return labels
    nothing = (labels == 0) | (labels == IGNORED)
    return jnp.where(nothing, IGNORED, labels - 1)


def cross_entropy(
    outputs: Float[Array, "b h w classes"],
    batch: Mapping[str, Any],
    *,
    weight: float = 1.0,
) -> Sums:
    """Sum the cross-entropy (nats) of `batch["semseg"]`, integers (b, h, w)."""
    classes = outputs.shape[-1]
    labels = shifted_labels(jnp.asarray(batch["semseg"], jnp.int32), classes=classes)
    valid = (labels != IGNORED) & counted(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs.astype(jnp.float32), jnp.where(valid, labels, 0)
    )
    return _sums(losses, valid, weight)


def depth_l1(
    outputs: Float[Array, "b h w 1"], batch: Mapping[str, Any], *, weight: float = 1.0
) -> Sums:
    """Sum the absolute error (metres) against `batch["depth"]`; 0 and NaN are gaps."""
    truth = jnp.asarray(batch["depth"])
    valid = jnp.isfinite(truth) & (truth != 0) & counted(batch)
    error = outputs[..., 0].astype(jnp.float32) - jnp.where(valid, truth, 0.0)
    return _sums(jnp.abs(error), valid, weight)


def normals_l1(
    outputs: Float[Array, "b h w 3"], batch: Mapping[str, Any], *, weight: float = 10.0
) -> Sums:
    """Sum the absolute error of unit vectors against `batch["normals"]`.

    A pixel counts thrice, once for each component; where the truth is 0 or not finite
    there is none.
    """
    truth = jnp.asarray(batch["normals"])
    valid = jnp.isfinite(truth).all(-1) & (truth != 0).any(-1) & counted(batch)
    error = unit(outputs.astype(jnp.float32)) - jnp.where(valid[..., None], truth, 0.0)
    sums = _sums(jnp.abs(error).sum(-1), valid, weight)
    return sums | {"count": 3 * sums["count"]}


def edge_cross_entropy(
    outputs: Float[Array, "b h w 1"],
    batch: Mapping[str, Any],
    *,
    weight: float = 50.0,
    positive: float = 0.95,
    threshold: float = 0.5,
) -> Sums:
    """Sum the weighted binary cross-entropy against `batch["edge"]`.

    Args:
        outputs: logits.
        batch: `"edge"` (b, h, w) from 0 to 1; above 1.1 there is no truth.
        weight: of the task.
        positive: weight of edges; that of other pixels is 1 less it.
        threshold: values from here on are edges.
    """
    truth = jnp.asarray(batch["edge"])
    valid = (truth <= LARGEST_EDGE) & counted(batch)
    edge = truth >= threshold
    losses = optax.sigmoid_binary_cross_entropy(
        outputs[..., 0].astype(jnp.float32), edge.astype(jnp.float32)
    )
    return _sums(losses * jnp.where(edge, positive, 1 - positive), valid, weight)


def unit(vectors: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
    """Divide vectors by their length; the zero vector stays, with a finite gradient."""
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _sums(losses: Array, valid: Array, weight: float) -> Sums:
    # where, not a product: an infinite loss on a gap must not become NaN.
    total = jnp.where(valid, losses, 0.0).sum()
    return {"loss": weight * total, "count": valid.sum(dtype=jnp.float32)}
