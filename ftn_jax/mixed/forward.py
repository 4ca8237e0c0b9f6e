"""Run one batch whose examples belong to different tasks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ftn_jax.apply import Apply
from ftn_jax.bank import Stack
from ftn_jax.core import complete, split_extras
from ftn_jax.factored.nnx import is_state
from ftn_jax.forward import cast, refuse_explicit
from ftn_jax.mixed.layer import Layer, Record
from ftn_jax.mixed.linen import lay, served
from ftn_jax.mixed.reach import check_reach, norm_paths, split
from ftn_jax.slots import ReplaceSlots


def mixed(
    apply: Apply,
    shared: Any,
    stack: Stack,
    ids: Int[Array, " b"],
    batch: Mapping[str, Any],
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    compute_dtype: Any = None,
) -> tuple[Any, Any]:
    """Run the network on a batch of several tasks' examples.

    The numbers are those of running each example with its own task's materialized
    parameters. Frozen operations run once on the whole batch; what is low-rank runs
    beside them with each example's own factors; biases, norms, running statistics and
    heads are each example's own. In training, BatchNorm normalizes each task's
    examples by themselves, and only the running statistics of the tasks in the batch
    move.

    The network is any Flax Linen one, unchanged, whose layers keep the examples along
    their first axis. Tasks in slots and their mix are data: jit once, and another
    mix, another order, or another task put in the bank runs the same program.

    Args:
        apply: the network, see `ftn_jax.apply.from_linen`. Its head may have another
            size than the tasks'.
        shared: the frozen backbone.
        stack: the tasks, `bank.stack`.
        ids: the slot of each example's task, from `bank.ids(names)`.
        batch: inputs; examples along the first axis.
        train: training mode, for BatchNorm and dropout.
        key: of dropout.
        compute_dtype: cast weights, factors and inputs.

    Returns:
        The outputs, and the new stacked mutable state. Outputs of classes that an
        example's task does not have are `finfo(dtype).min / 2`: of probability 0, and
        finite, so that a cross-entropy is too. Outputs of examples whose id is out of
        range, or of an empty slot, are NaN.

    Raises:
        ValueError: at trace time, if ids do not fit the batch, or the network has
            nodes or state where no layer that is understood reads them (lists the
            paths), or the batch is split over mesh axes of the type Explicit.
    """
    params = split_extras(shared)[0]
    _check(params, ids, batch)
    refuse_explicit(batch)
    entries = [(p, w, n) for p, w, n in complete(shared, stack.delta) if n is not None]
    nodes: Any = entries
    batch = cast(batch, compute_dtype)
    one = jax.tree.map(lambda x: x[0], stack.model_state)
    check_reach(apply, params, nodes, one, batch, key, train=train)
    slots, valid = locate(stack, ids)
    layers = _layers(nodes, stack.model_state, slots, compute_dtype)
    params = lay(cast(params, compute_dtype), layers)
    with served():  # inside the traced function: a compiled one does not know of it
        outputs, state = apply(params, stack.model_state, batch, train=train, key=key)
    return jax.tree.map(lambda y: _only(valid, y), outputs), state


def locate(stack: Stack, ids: Int[Array, " b"]) -> tuple[Any, Any]:
    """Return each example's slot (one past the last: none) and whether it has one."""
    count = len(stack.filled)
    inside = (ids >= 0) & (ids < count)
    valid = inside & stack.filled.at[ids].get(mode="clip")
    return jnp.where(valid, ids, count), valid


def _layers(
    entries: list[tuple[str, Any, Any]], model_state: Any, slots: Any, dtype: Any
) -> dict[str, Layer]:
    """Hand out what the tasks have of their own, layer by layer."""
    parts: dict[str, dict[str, Any]] = {path: {} for path in norm_paths(model_state)}
    leaves: dict[str, list[Any]] = {path: [] for path in parts}
    for path, w, node in entries:
        layer, name = split(path)
        part = parts.setdefault(layer, {})
        leaves.setdefault(layer, []).append((name, w.shape))
        if isinstance(node, ReplaceSlots) and node.ragged:
            part["sizes"] = node.sizes
        part[name] = node if name == "kernel" else cast(node.merge(w), dtype)
    record = Record({})
    return {
        path: Layer(
            kernel=part.get("kernel"),
            bias=part.get("bias"),
            scale=part.get("scale"),
            sizes=part.get("sizes"),
            slots=slots,
            path=path,
            leaves=tuple(leaves[path]),
            ragged="sizes" in part,
            record=record,
        )
        for path, part in parts.items()
    }


def _only(valid: Any, y: Any) -> Any:
    """Put NaN where an example has no task."""
    if y.shape[:1] != valid.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        return y
    return jnp.where(valid.reshape(-1, *(1,) * (y.ndim - 1)), y, jnp.nan)


def _check(params: Any, ids: Any, batch: Mapping[str, Any]) -> None:
    if is_state(params) or not isinstance(params, Mapping):
        raise ValueError(
            "mixed batches run on Flax Linen networks, whose parameters are nested "
            f"mappings; found {type(params).__name__}"
        )
    sizes = sorted({x.shape[:1] for x in jax.tree.leaves(batch)})
    shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", type(ids))
    if not jnp.issubdtype(dtype, jnp.integer) or sizes != [shape]:
        raise ValueError(
            "ids must be an array of one integer for each example of the batch, as "
            f"bank.ids(names) makes it; found {dtype} of the shape {shape} for a batch "
            f"of the sizes {sizes}"
        )
