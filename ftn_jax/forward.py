"""From `(shared, delta)` to outputs: the ways to run a task's network."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ftn_jax.apply import Apply
from ftn_jax.core import materialize
from ftn_jax.paths import path_name


@runtime_checkable
class Forward(Protocol):
    """Run a network for a task; every way gives the same numbers as `merged`."""

    def __call__(
        self,
        apply: Apply,
        shared: Any,
        delta: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
        compute_dtype: Any = None,
    ) -> tuple[Any, Any]:
        """Return the outputs and the new mutable state."""
        ...


def merged(
    apply: Apply,
    shared: Any,
    delta: Any,
    model_state: Any,
    batch: Mapping[str, Any],
    *,
    train: bool,
    key: Key[Array, ""] | None = None,
    compute_dtype: Any = None,
) -> tuple[Any, Any]:
    """Materialize the parameters and run the untouched network on them.

    Args:
        apply: the network.
        shared: the frozen backbone.
        delta: the task's tree.
        model_state: the task's mutable collections.
        batch: inputs.
        train: training mode, for BatchNorm and dropout.
        key: of dropout.
        compute_dtype: cast parameters and inputs after merging.
    """
    params = cast(materialize(shared, delta), compute_dtype)
    return apply(params, model_state, cast(batch, compute_dtype), train=train, key=key)


def refuse_explicit(batch: Any) -> None:
    """Refuse batches whose types say how they are split over devices.

    Operations of ours would have to say how their outputs are split.

    Raises:
        ValueError: if an array is split over a mesh axis of the type Explicit (names
            it), as those of `jax.make_mesh` are by default.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        spec = jax.typeof(x).sharding.spec
        if any(axes is not None for axes in spec):
            raise ValueError(
                f"the batch's {path_name(path)!r} is split as {spec} over axes of the "
                "type Explicit; make the mesh with axis_types=AxisType.Auto, as "
                "ftn_jax.parallel.Layout does, or use forward=merged"
            )


def cast(tree: Any, dtype: Any) -> Any:
    """Cast the floating-point arrays of a tree; `None` leaves them as they are."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
