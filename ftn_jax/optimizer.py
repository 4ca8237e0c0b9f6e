"""The papers' optimizer: one optax transformation for each group of nodes."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import optax

from ftn_jax.core import groups

Schedule = Literal["cosine", "polynomial", "constant"]


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
        schedule: `"cosine"`, `"polynomial"` (`(1 - t/steps)**power`) or `"constant"`.
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
        rate = _schedule(schedule, peak, steps, warmup_steps, power)
        if group in adam:
            return optax.adamw(rate, weight_decay=decay.get(group, 0.0))
        sgd = optax.sgd(rate, momentum=momentum or None)
        if not decay.get(group):
            return sgd
        return optax.chain(optax.add_decayed_weights(decay[group]), sgd)

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


def _schedule(
    name: str, peak: float, steps: int, warmup_steps: int, power: float
) -> optax.Schedule:
    rest = steps - warmup_steps
    if name == "cosine":
        body = optax.cosine_decay_schedule(peak, rest)
    elif name == "polynomial":
        body = optax.polynomial_schedule(peak, 0.0, power, rest)
    elif name == "constant":
        body = optax.constant_schedule(peak)
    else:
        raise ValueError(
            f"schedule must be cosine, polynomial or constant, found {name!r}"
        )
    if not warmup_steps:
        return body
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, body], [warmup_steps])
