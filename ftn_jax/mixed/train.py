"""Train and evaluate several tasks on batches that mix their examples."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ftn_jax.apply import Apply
from ftn_jax.bank import Stack
from ftn_jax.core import trainable, with_trained
from ftn_jax.metrics import classification
from ftn_jax.mixed.forward import locate, mixed
from ftn_jax.train import Loss, TaskState

SlotSums = dict[str, Float[Array, " slots"]]


class MixedTrainStep(Protocol):
    """A pure training step of several tasks; jit it with `donate_argnums=1`."""

    def __call__(
        self,
        shared: Any,
        state: TaskState,
        ids: Int[Array, " b"],
        batch: Mapping[str, Any],
    ) -> tuple[TaskState, SlotSums]:
        """Return the next state and each slot's sums."""
        ...


class MixedEvalStep(Protocol):
    """A pure evaluation step of several tasks."""

    def __call__(
        self, shared: Any, stack: Stack, ids: Int[Array, " b"], batch: Mapping[str, Any]
    ) -> Any:
        """Return each slot's sums (or the outputs)."""
        ...


def create_mixed_state(
    stack: Stack, *, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TaskState:
    """Start training from a copy of a bank's stack.

    Every slot has its own optimizer, count of steps and sign of being finite; the key
    is common. When training is over, `bank.trained(state.task)` is the bank.
    """
    stack, key = jax.tree.map(jnp.copy, (stack, key))
    slots = len(stack.filled)
    return TaskState(
        step=jnp.zeros(slots, jnp.int32),
        task=stack,
        opt_state=jax.vmap(tx.init)(trainable(stack.delta)),
        key=key,
        finite=jnp.ones(slots, bool),
    )


def make_mixed_train_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = classification,
    frozen_stats: bool = False,
    compute_dtype: Any = None,
) -> MixedTrainStep:
    """Make `step(shared, state, ids, batch) -> (state, sums)`.

    One step moves each task in the batch as `ftn_jax.make_train_step` would move it on
    its own examples alone: the gradient is that of the mean loss over them, BatchNorm
    sees them alone, and the optimizer's moments, schedule, and clipping are the
    task's own. Tasks that are not in the batch stay as they are, to the last bit, and
    so does a task whose own loss or gradient is not finite (then and from then on);
    the others go on.

    Dropout draws its masks for the whole batch, so that there, and only there, a task
    trained alone would see other random numbers.

    Args:
        apply: the network.
        tx: the optimizer of one task.
        loss: `(outputs, batch) -> sums` with `"loss"` and `"count"`, each a sum over
            examples; it is called for one example at a time.
        frozen_stats: run in evaluation mode, see `ftn_jax.make_train_step`.
        compute_dtype: cast weights, factors and inputs.

    Returns:
        The step. Its sums have one value for each slot, and `"nonfinite"`; examples
        whose id is out of range or of an empty slot are in no sum, and move nothing.
    """

    def objective(
        trained: Any, stack: Stack, shared: Any, ids: Any, batch: Any, key: Any
    ) -> tuple[Any, Any]:
        stack = replace(stack, delta=with_trained(stack.delta, trained))
        outputs, model_state = mixed(
            apply,
            shared,
            stack,
            ids,
            batch,
            train=not frozen_stats,
            key=key,
            compute_dtype=compute_dtype,
        )
        sums = _sums(loss, stack, outputs, ids, batch)
        means = sums["loss"] / jnp.where(sums["count"] > 0, sums["count"], 1)
        model_state = jax.tree.map(
            lambda new, old: new.astype(old.dtype), model_state, stack.model_state
        )
        return means.sum(), (sums, model_state)

    def step(
        shared: Any, state: TaskState, ids: Any, batch: Mapping[str, Any]
    ) -> tuple[TaskState, SlotSums]:
        stack: Any = state.task
        key = jax.random.fold_in(state.key, state.step.sum())
        trained = trainable(stack.delta)
        grads, (sums, model_state) = jax.grad(objective, has_aux=True)(
            trained, stack, shared, ids, batch, key
        )
        updates, opt_state = jax.vmap(tx.update)(grads, state.opt_state, trained)
        delta = with_trained(stack.delta, optax.apply_updates(trained, updates))
        slots, _ = locate(stack, ids)
        present = jnp.zeros(len(stack.filled), bool).at[slots].set(True, mode="drop")
        norms = jax.vmap(optax.tree.norm)(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norms)
        finite = state.finite & (finite | ~present)
        new = (
            state.step + 1,
            replace(stack, delta=delta, model_state=model_state),
            opt_state,
        )
        old = (state.step, stack, state.opt_state)
        moved = jax.tree.map(lambda a, b: _where(present & finite, a, b), new, old)
        state = TaskState(*moved, key=state.key, finite=finite)
        return state, {**sums, "nonfinite": 1.0 - finite}

    return step


def make_mixed_eval_step(
    apply: Apply, *, metrics: Loss | None = classification, compute_dtype: Any = None
) -> MixedEvalStep:
    """Make `step(shared, stack, ids, batch) -> sums`, to be added up over batches.

    Args:
        apply: the network.
        metrics: `(outputs, batch) -> sums` over examples, called for one at a time;
            the step's sums have one value for each slot. `None` returns the outputs.
        compute_dtype: cast weights, factors and inputs.
    """

    def step(shared: Any, stack: Stack, ids: Any, batch: Mapping[str, Any]) -> Any:
        outputs, _ = mixed(
            apply, shared, stack, ids, batch, compute_dtype=compute_dtype
        )
        return (
            outputs if metrics is None else _sums(metrics, stack, outputs, ids, batch)
        )

    return step


def _sums(loss: Loss, stack: Stack, outputs: Any, ids: Any, batch: Any) -> SlotSums:
    """Sum over each slot's examples."""

    def one(outputs: Any, example: Any) -> Any:
        return loss(*jax.tree.map(lambda x: x[None], (outputs, example)))

    slots, valid = locate(stack, ids)
    each = jax.vmap(one)(outputs, dict(batch))
    return jax.tree.map(
        lambda x: jax.ops.segment_sum(
            jnp.where(valid, x, 0.0), slots, len(stack.filled)
        ),
        each,
    )


def _where(keep: Any, new: Any, old: Any) -> Any:
    return jnp.where(keep.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
