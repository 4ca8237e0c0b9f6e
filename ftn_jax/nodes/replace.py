"""The node of everything that a task owns outright: norms, biases, heads."""

from collections.abc import Callable
from types import EllipsisType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static


class Replace(Node):
    """Put the task's own array in the weight's place, of any shape.

    Attributes:
        value: the array that the network runs with.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((64, 1000))
        >>> head = Replace.init(jax.random.key(0), w, shape=(..., 10), group="head")
        >>> head.merge(w).shape
        (64, 10)
    """

    reads_weight: ClassVar[bool] = False
    value: Float[Array, "..."]
    group: str = static(default="norm")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        group: str = "norm",
        shape: tuple[int | EllipsisType, ...] | None = None,
        initializer: Callable[..., Array] | None = None,
    ) -> "Replace":
        """Start from a copy of `w`, or afresh.

        Args:
            key: PRNG key, used by the initializer only.
            w: the weight.
            group: optimizer group: `"norm"`, `"head"`, `"weights"` (fine-tuning), ...
            shape: start afresh with this shape; a leading `...` stands for w's other
                axes, so that `(..., 10)` makes ten outputs of any kernel or bias.
            initializer: `(key, shape, dtype) -> array` for a fresh start. Default:
                zeros for vectors, LeCun normal for kernels.

        Raises:
            ValueError: if `...` stands anywhere but first, or a size is below 1.
        """
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        if shape is None and initializer is None:
            # A copy: shared must survive the donation of the task's state.
            return cls(jnp.array(w, dtype, copy=True), group=group)
        sizes = _resolve(shape, w.shape)
        if initializer is None:
            lecun = jax.nn.initializers.lecun_normal()
            initializer = lecun if len(sizes) > 1 else jax.nn.initializers.zeros
        return cls(initializer(key, sizes, dtype), group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the task's own array, in w's dtype."""
        return self.value.astype(w.dtype)


def _resolve(shape: Any, found: tuple[int, ...]) -> tuple[int, ...]:
    if shape is None:
        return found
    if shape and shape[0] is ...:
        shape = found[: max(len(found) - len(shape) + 1, 0)] + tuple(shape[1:])
    if any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(
            f"shape must hold sizes >= 1 after an optional leading ..., found {shape}"
        )
    return tuple(shape)
