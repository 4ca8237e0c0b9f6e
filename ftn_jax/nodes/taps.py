"""TAPS: a task picks the layers that it trains, and shares the others.

Source: Task Adaptive Parameter Sharing (arXiv 2203.16708).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, is_node, static
from ftn_jax.nodes.bits import straight_through
from ftn_jax.paths import path_name


class TAPS(Node):
    """Add a full change to the weight where the layer's score is high enough.

        W' = W + g * D,    g = 1 where score >= threshold, else 0

    with D of W's shape and one score for the layer, which `sparsity` pulls down. The
    gradient goes straight through the threshold: d score = sum(d W' * D), dD = g *
    d W'. D starts at zero, so the network starts at the pretrained one and the score
    has no gradient from the loss in the first step. A layer that falls below the
    threshold keeps its D while it is trained, and can come back; `compact()` drops it.

    Not copied from the released code: gradients summed (not averaged) over eight
    batches, which multiplies its learning rates by eight, and the fixed number of
    layers, 52, in its penalty.

    Source: Wallingford et al., "Task Adaptive Parameter Sharing for Multi-Task
    Learning" (arXiv 2203.16708), the task weights and their straight-through score.

    Attributes:
        change: D.
        score: decides whether the layer is the task's own; `None` once compact.
        threshold: of the score.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones(2)
        >>> node = TAPS.init(jax.random.key(0), w).replace(change=jnp.ones(2))
        >>> node.merge(w).tolist()
        [2.0, 2.0]
        >>> node.replace(score=jnp.array(0.05)).merge(w).tolist()
        [1.0, 1.0]
    """

    change: Float[Array, "..."]
    score: Float[Array, ""] | None
    threshold: float = static(default=0.1)
    group: str = static(default="weights")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        score: float = 0.15,
        threshold: float = 0.1,
        group: str = "weights",
    ) -> "TAPS":
        """Start at the pretrained weight, every layer the task's own.

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            score: where the score starts. Below the threshold D gets no gradient, and
                with D = 0 the score none either: the layer could never wake.
            threshold: see the class.
            group: optimizer group.

        Raises:
            ValueError: if the score starts below the threshold.
        """
        if not score >= threshold:
            raise ValueError(
                f"need score >= threshold, found score={score!r} and threshold="
                f"{threshold!r}: a layer that starts switched off never learns"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        start = jnp.full((), score, dtype)
        return cls(jnp.zeros(w.shape, dtype), start, threshold=threshold, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w`, plus the change where the layer is the task's own, in w's dtype.

        Raises:
            ValueError: if the change has another shape than `w`.
        """
        change = self.change
        if change.shape != w.shape:
            raise ValueError(
                f"the change has shape {change.shape}, the weight {w.shape}; make the "
                "delta for this backbone"
            )
        if self.score is not None:
            own = straight_through(self.score >= self.threshold, self.score)
            change = own.astype(change.dtype) * change
        dtype = jnp.promote_types(w.dtype, change.dtype)
        return (w.astype(dtype) + change.astype(dtype)).astype(w.dtype)

    def compact(self) -> "TAPS | None":
        """Return the node with its change alone; `None` if it is switched off."""
        if self.score is None:
            return self
        return self.replace(score=None) if self.score >= self.threshold else None


def sparsity(delta: Any, weight: float) -> Float[Array, ""]:
    """Penalize the layers that a task takes for itself, for a training step.

        weight * sum of |score| / number of layers

    Pass it to a step as `penalty=lambda delta, step: sparsity(delta, 0.1)`; the
    released code leaves it out for the first two epochs
    (`jnp.where(step < warmup, 0.0, ...)`). It divides by 52 whatever the network,
    where ResNet-50 has 53 scores and ResNet-34 has 36; here it is their number, so
    multiply the weight by 53/52 or 36/52 for its penalty.

    Source: Wallingford et al. (arXiv 2203.16708), the L1 term of the objective.

    Raises:
        ValueError: if the delta has no TAPS node with a score.
    """
    scores = [node.score for _, node in _nodes(delta) if node.score is not None]
    if not scores:
        raise ValueError(
            "the delta holds no TAPS node with a score, so nothing to penalize; "
            "compact deltas have none"
        )
    return weight * jnp.stack([jnp.abs(s) for s in scores]).mean()


def active(delta: Any) -> list[str]:
    """List the paths of the layers that a task has for its own, in tree order.

    For concrete arrays, of one task; a compact delta has only such layers.
    """
    return [
        path
        for path, node in _nodes(delta)
        if node.score is None or node.score >= node.threshold
    ]


def _nodes(delta: Any) -> list[tuple[str, TAPS]]:
    found = jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_node)
    return [(path_name(path), node) for path, node in found if isinstance(node, TAPS)]
