"""What one training step of a method costs: operations as compiled, and seconds."""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.core import make_delta
from ftn_jax.data import Source, Transform, train_batches
from ftn_jax.method import Backbone, Method
from ftn_jax.optimizer import make_optimizer
from ftn_jax.results import Row
from ftn_jax.train import TaskState, make_train_step


class StepCost(NamedTuple):
    """What one training step costs.

    Attributes:
        flops: of the compiled program, as XLA counts them; a scan's body counts once.
        seconds: median of five steps after compiling; batches are there already.
    """

    flops: float
    seconds: float


def measure_step(
    backbone: Backbone,
    method: Method,
    recipe: Recipe,
    source: Source,
    *,
    transform: Transform,
) -> StepCost:
    """Compile a method's training step, count its operations, and time it.

    Args:
        backbone: the frozen network; what the method reads beside it is computed here.
        method: rules of the delta.
        recipe: how to train; its rates name the optimizer groups.
        source: training examples, of which one batch is used.
        transform: their augmentation and normalisation.
    """
    if method.prepare:
        backbone = method.prepare(backbone)
    tx = make_optimizer(
        recipe.rates,
        steps=1000,
        weight_decay=recipe.weight_decay,
        adam=recipe.adam,
        clip_norm=recipe.clip_norm,
    )
    key = jax.random.key(0)
    delta = make_delta(key, backbone.shared, method.rules_for(backbone.shared))
    state = TaskState.create(delta, backbone.model_state, tx=tx, key=key)
    batches = train_batches(
        source, batch_size=recipe.batch_size, transform=transform, seed=0
    )
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    step = make_train_step(
        backbone.network(method.classes),
        tx,
        frozen_stats=method.frozen_stats,
        compute_dtype=recipe.compute_dtype,
        accumulate=recipe.accumulate,
    )
    lowered = jax.jit(step, donate_argnums=1).lower(backbone.shared, state, batch)
    compiled = lowered.compile()
    seconds = []
    for _ in range(6):  # the first one fills caches
        start = time.perf_counter()
        state, sums = compiled(backbone.shared, state, batch)
        jax.block_until_ready((state, sums))
        seconds.append(time.perf_counter() - start)
    analysis: Any = compiled.cost_analysis() or {}
    return StepCost(float(analysis.get("flops", math.nan)), median(seconds[1:]))


def cost_table(
    rows: Sequence[Row], costs: Mapping[str, StepCost], steps: Mapping[str, int]
) -> str:
    """Lay accuracy beside parameters, operations and time, one line for each method.

    Methods that lack a domain are left out. An epoch's seconds are those of its steps,
    the mean over the domains.

    Args:
        rows: the results.
        costs: what a step costs, by method.
        steps: of an epoch, by domain.
    """
    domains = [name for name in steps if any(r.task == name for r in rows)]
    lines = [
        "| method | parameters per task | GFLOPs per step | s per epoch | "
        + " | ".join([*domains, "mean"])
        + " |",
        "|---|--:|--:|--:|" + "--:|" * (len(domains) + 1),
    ]
    for name, cost in costs.items():
        own = [r for r in rows if r.method == name]
        scores = [[100 * r.value for r in own if r.task == d] for d in domains]
        if not all(scores):
            continue
        means = [mean(values) for values in scores]
        epoch = cost.seconds * mean(steps[d] for d in domains)
        lines.append(
            f"| {name} | {own[0].task_params:,} | {cost.flops / 1e9:.2f} | "
            f"{epoch:.1f} | "
            + " | ".join(f"{x:.1f}" for x in [*means, mean(means)])
            + " |"
        )
    return "\n".join(lines) + "\n"
