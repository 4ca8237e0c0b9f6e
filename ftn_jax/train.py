"""Train one task: a pure step that differentiates the delta and nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ftn_jax.apply import Apply
from ftn_jax.core import perturb, trainable, with_trained
from ftn_jax.forward import Forward, merged
from ftn_jax.metrics import Sums, classification
from ftn_jax.node import register

Loss = Callable[[Any, Mapping[str, Any]], Sums]
Penalty = Callable[[Any, Int[Array, ""]], Float[Array, ""]]


@dataclass(frozen=True)
class Task:
    """All that belongs to one task, beside the shared backbone.

    Attributes:
        delta: the task's tree of nodes (factors, norm parameters, head).
        model_state: the network's mutable collections, such as `batch_stats`.
    """

    delta: Any
    model_state: Any


@dataclass(frozen=True)
class TaskState:
    """A task in training; holds nothing of the backbone, so it may be donated.

    Attributes:
        step: optimizer steps taken.
        task: what is being trained.
        opt_state: the optimizer's state, for the delta alone.
        key: source of dropout keys.
        finite: whether every step so far was; once one was not, the state stays as it
            was before that step.
    """

    step: Int[Array, "..."]
    task: Task
    opt_state: Any
    key: Key[Array, "..."]
    finite: Bool[Array, "..."]

    @classmethod
    def create(
        cls,
        delta: Any,
        model_state: Any,
        *,
        tx: optax.GradientTransformation,
        key: Key[Array, ""],
    ) -> "TaskState":
        """Start training from copies of `delta` and `model_state`.

        Copies, because a donated state takes its buffers with it: the next task may
        start from the same pretrained statistics.
        """
        task, key = jax.tree.map(jnp.copy, (Task(delta, model_state), key))
        step, finite = jnp.zeros((), jnp.int32), jnp.ones((), bool)
        return cls(step, task, tx.init(trainable(task.delta)), key, finite)


register(Task, ("delta", "model_state"), ())
register(TaskState, ("step", "task", "opt_state", "key", "finite"), ())


@runtime_checkable
class TrainStep(Protocol):
    """A pure training step; jit it with `donate_argnums=1`."""

    def __call__(
        self, shared: Any, state: TaskState, batch: Mapping[str, Any]
    ) -> tuple[TaskState, Sums]:
        """Return the next state and the batch's sums."""
        ...


def make_train_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = classification,
    penalty: Penalty | None = None,
    forward: Forward = merged,
    frozen_stats: bool = False,
    compute_dtype: Any = None,
    remat: bool | Callable[..., bool] = False,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Make `step(shared, state, batch) -> (state, sums)`.

    The step is pure and not jitted: wrap it in `jax.jit(step, donate_argnums=1)`, in
    `jax.vmap` over stacked states, or in `jax.pmap` / `jax.shard_map` with
    `axis_name`. Only `state.task.delta` is differentiated and only `state` is
    replaced. A step whose loss or gradient is not finite reports
    `sums["nonfinite"] = 1` and, like every step after it, changes nothing.

    Args:
        apply: the network, see `ftn_jax.apply`.
        tx: the optimizer, from `make_optimizer` or any of optax's.
        loss: `(outputs, batch) -> sums` with `"loss"` and `"count"` among them; the
            gradient is that of `sums["loss"] / sums["count"]`.
        penalty: `(delta, step) -> scalar`, added to the mean loss, for methods whose
            loss looks at the delta; the sums then hold `"penalty"` times the count.
        forward: how to run the network on `(shared, delta)`.
        frozen_stats: run the network in evaluation mode: BatchNorm uses and keeps the
            statistics of `model_state` (and dropout, where there is any, is off), as
            a feature extractor does.
        compute_dtype: cast parameters and inputs after merging, e.g. `jnp.bfloat16`;
            factors, gradients and optimizer stay in their own precision.
        remat: recompute the forward pass for the backward one; a policy of
            `jax.checkpoint_policies` chooses what is kept. Models that checkpoint
            each block (`remat=True` of ours) save more.
        accumulate: split the batch in this many micro-batches and step once; the
            gradient is that of the whole batch, BatchNorm sees micro-batches.
        axis_name: the mapped axis to sum gradients and metrics and to average the
            running statistics over.

    Raises:
        ValueError: at trace time, if the batch cannot be split in `accumulate` parts.
    """

    def run(trained: Any, task: Task, shared: Any, batch: Any, key: Any) -> Any:
        return forward(
            apply,
            shared,
            perturb(with_trained(task.delta, trained), key),
            task.model_state,
            batch,
            train=not frozen_stats,
            key=key,
            compute_dtype=compute_dtype,
        )

    if remat:
        policy = None if remat is True else remat
        run = jax.checkpoint(run, policy=policy)

    def objective(trained: Any, task: Task, shared: Any, batch: Any, key: Any):
        outputs, new_state = run(trained, task, shared, batch, key)
        sums = loss(outputs, batch)
        return sums["loss"], (sums, _like(new_state, task.model_state))

    def pulled(trained: Any, state: TaskState) -> Any:
        assert penalty is not None
        return penalty(with_trained(state.task.delta, trained), state.step)

    gradient = jax.grad(objective, has_aux=True)

    def step(
        shared: Any, state: TaskState, batch: Mapping[str, Any]
    ) -> tuple[TaskState, Sums]:
        key = jax.random.fold_in(state.key, state.step)
        trained = trainable(state.task.delta)
        task, varied = state.task, trained
        if axis_name is not None:
            # Per-device gradients, summed below in one place: without this,
            # shard_map would sum those of a replicated delta by itself.
            task, varied = _varying((task, varied), axis_name)
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            grads, (sums, model_state) = gradient(varied, task, shared, batch, key)
        else:
            grads, sums, model_state = _accumulated(
                gradient, accumulate, varied, task, shared, batch, key
            )
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums), axis_name)
            model_state = _pmean(model_state, axis_name)
        count = jnp.where(sums["count"] > 0, sums["count"], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        if penalty is not None:
            value, pull = jax.value_and_grad(pulled)(trained, state)
            grads = jax.tree.map(jnp.add, grads, pull)
            sums = {**sums, "penalty": value * sums["count"]}
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        delta = with_trained(state.task.delta, optax.apply_updates(trained, updates))
        new = TaskState(
            step=state.step + 1,
            task=Task(delta, model_state),
            opt_state=opt_state,
            key=state.key,
            finite=state.finite,
        )
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(optax.tree.norm(grads))
        finite = finite & state.finite
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return replace(new, finite=finite), {**sums, "nonfinite": 1.0 - finite}

    return step


@runtime_checkable
class EvalStep(Protocol):
    """A pure evaluation step."""

    def __call__(self, shared: Any, task: Task, batch: Mapping[str, Any]) -> Any:
        """Return the batch's sums (or the outputs)."""
        ...


def make_eval_step(
    apply: Apply,
    *,
    metrics: Loss | None = classification,
    forward: Forward = merged,
    compute_dtype: Any = None,
    axis_name: str | None = None,
) -> EvalStep:
    """Make `step(shared, task, batch) -> sums`, to be added up over batches.

    Args:
        apply: the network.
        metrics: `(outputs, batch) -> sums`; `None` returns the outputs themselves.
        forward: how to run the network on `(shared, delta)`.
        compute_dtype: cast parameters and inputs after merging.
        axis_name: the mapped axis to sum the metrics over.
    """

    def step(shared: Any, task: Task, batch: Mapping[str, Any]) -> Any:
        outputs, _ = forward(
            apply,
            shared,
            task.delta,
            task.model_state,
            batch,
            train=False,
            compute_dtype=compute_dtype,
        )
        if metrics is None:
            return outputs
        sums = metrics(outputs, batch)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return step


def _accumulated(
    gradient: Callable[..., Any],
    parts: int,
    trained: Any,
    task: Task,
    shared: Any,
    batch: Any,
    key: Key[Array, ""],
) -> tuple[Any, Sums, Any]:
    """Sum gradients and metrics over micro-batches; thread the running statistics."""
    size = {x.shape[0] for x in jax.tree.leaves(batch)}
    if any(n % parts for n in size):
        raise ValueError(
            f"a batch of {sorted(size)} examples has no {parts} equal parts"
        )
    # Every parts-th example: each part of a sharded batch is sharded alike.
    split = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(carry: Any, xs: Any) -> tuple[Any, Sums]:
        grads, model_state = carry
        part, n = xs
        new, (sums, model_state) = gradient(
            trained,
            replace(task, model_state=model_state),
            shared,
            part,
            jax.random.fold_in(key, n),
        )
        return (jax.tree.map(jnp.add, grads, new), model_state), sums

    start = (jax.tree.map(jnp.zeros_like, trained), task.model_state)
    # XLA's CPU loops run convolutions on a slow path: unroll there.
    unroll = jax.default_backend() == "cpu"
    (grads, model_state), sums = jax.lax.scan(
        body, start, (split, jnp.arange(parts)), unroll=parts if unroll else 1
    )
    return grads, jax.tree.map(lambda s: s.sum(axis=0), sums), model_state


def _like(tree: Any, old: Any) -> Any:
    """Keep the dtypes of the old state, whatever the network computed in."""
    return jax.tree.map(lambda x, o: x.astype(o.dtype), tree, old)


def _varying(tree: Any, axis_name: str) -> Any:
    return jax.tree.map(
        lambda x: (
            jax.lax.pcast(x, axis_name, to="varying")
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        tree,
    )


def _pmean(tree: Any, axis_name: str) -> Any:
    return jax.tree.map(
        lambda x: (
            jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        tree,
    )
