"""The papers' optimizer: one optax transformation for each group of nodes."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ftn_jax.core import groups

Schedule = Literal["cosine", "polynomial", "steps", "constant"]


def make_optimizer(
    learning_rates: Mapping[str, float],
    *,
    steps: int,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    power: float = 0.9,
    weight_decay: Mapping[str, float] | None = None,
    momentum: float = 0.9,
    adam: tuple[str, ...] = ("factors", "masks"),
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Build the papers' optimizer: Adam for factors and masks, SGD for the rest.

    Source: FTN supplement (arXiv 2310.06124), training details: Adam 0.005 on the
    factors and SGD 0.005 to 0.008 on BatchNorm and head, cosine.

    Args:
        learning_rates: peak rate of each group that the deltas have, for example
            `{"factors": 5e-3, "norm": 8e-3, "head": 8e-3}`.
        steps: optimizer steps until the rate reaches zero.
        schedule: `"cosine"`, `"polynomial"` (`(1 - t/steps)**power`), `"steps"` (a
            tenth from 2/3 of the steps on, a hundredth from 5/6 on) or `"constant"`.
        warmup_steps: steps of linear warm-up from zero; part of `steps`.
        power: exponent of the polynomial schedule.
        weight_decay: by group, default none. Added to the gradient under SGD (as in
            PyTorch), decoupled under Adam (AdamW).
        momentum: of SGD.
        adam: the groups that Adam trains; all others get SGD.
        clip_norm: clip the gradient of the whole delta to this global norm.

    Raises:
        ValueError: for an unknown schedule, a warm-up that does not fit in `steps`,
            or a weight decay for a group without a rate. Training with a delta whose
            group has no rate raises too, naming the group.
    """
    decay = dict(weight_decay or {})
    if unknown := sorted({*decay} - {*learning_rates}):
        raise ValueError(
            f"weight_decay for groups {unknown}, learning_rates has "
            f"{sorted(learning_rates)}"
        )
    if steps < 1 or not 0 <= warmup_steps < steps:
        raise ValueError(
            f"need 0 <= warmup_steps < steps, found warmup_steps={warmup_steps} and "
            f"steps={steps}"
        )

    def transform(group: str, peak: float) -> optax.GradientTransformation:
        rate = _scale_by_rate(schedule, peak, steps - warmup_steps, warmup_steps, power)
        decayed = optax.add_decayed_weights(decay.get(group, 0.0))
        if group in adam:
            return optax.chain(optax.scale_by_adam(), decayed, rate)
        kept = optax.trace(momentum) if momentum else optax.identity()
        first = [decayed] if decay.get(group) else []
        return optax.chain(*first, kept, rate)

    def labels(delta: Any) -> Any:
        found = groups(delta)
        if missing := sorted({*jax.tree.leaves(found)} - {*learning_rates}):
            raise ValueError(
                f"the delta has groups {missing} without a learning rate; "
                f"learning_rates has {sorted(learning_rates)}"
            )
        return found

    by_group: dict[Hashable, optax.GradientTransformation] = {
        g: transform(g, rate) for g, rate in learning_rates.items()
    }
    tx = optax.multi_transform(by_group, labels)
    if clip_norm is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx)


class _Rate(NamedTuple):
    """The state of a scheduled rate."""

    count: Int[Array, ""]
    peak: Float[Array, ""]
    steps: Float[Array, ""]
    warmup: Float[Array, ""]


def _scale_by_rate(
    schedule: str, peak: float, steps: int, warmup: int, power: float
) -> optax.GradientTransformation:
    """Multiply updates by minus the rate of each step.

    Peak and lengths are part of the state, not of the program: runs that differ in
    nothing else are one program, compiled once.
    """
    shapes: dict[str, Callable[[Any], Any]] = {
        "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
        "polynomial": lambda done: (1 - done) ** power,
        "steps": lambda done: 0.1 ** (0.0 + (done >= 2 / 3) + (done >= 5 / 6)),
        "constant": jnp.ones_like,
    }
    if schedule not in shapes:
        raise ValueError(
            f"schedule must be one of {sorted(shapes)}, found {schedule!r}"
        )

    def init(params: Any) -> _Rate:
        lengths = (jnp.asarray(x, jnp.float32) for x in (peak, steps, warmup))
        return _Rate(jnp.zeros((), jnp.int32), *lengths)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _Rate]:
        done = jnp.clip((state.count - state.warmup) / state.steps, 0, 1)
        rising = jnp.where(
            state.count < state.warmup, state.count / jnp.maximum(state.warmup, 1), 1.0
        )
        rate = state.peak * rising * shapes[schedule](done)
        updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
