"""What one training step of a method costs: operations, memory and seconds."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import jax

from ftn_jax.adapt import Recipe
from ftn_jax.atomic import write_atomic
from ftn_jax.core import make_delta
from ftn_jax.forward import Forward, merged
from ftn_jax.method import Backbone, Method
from ftn_jax.optimizer import make_optimizer
from ftn_jax.sizes import stored_size
from ftn_jax.train import TaskState, make_train_step

Row = TypeVar("Row")

_STEPS = 10_000  # of the schedule; a state past them would still train, at rate zero


class CompiledStep:
    """A training step of one method on one batch, compiled; a call runs it once more.

    Attributes:
        params: what the method trains beside its head, in words of 32 bits.
        flops: of the compiled program, as XLA counts them; a scan's body counts once.
        temp_bytes: the program's peak of temporary memory, as the compiler plans it.
    """

    params: int
    flops: float
    temp_bytes: int

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        recipe: Recipe,
        batch: Mapping[str, Any],
        *,
        forward: Forward = merged,
    ) -> None:
        """Compile the step.

        Args:
            backbone: the frozen network; what the method reads beside it is computed
                here.
            method: rules of the delta.
            recipe: how to train; its rates name the optimizer groups.
            batch: arrays on the device.
            forward: how to run the network on `(shared, delta)`.
        """
        if method.prepare:
            backbone = method.prepare(backbone)
        self._shared, self._batch = backbone.shared, batch
        tx = make_optimizer(
            recipe.rates,
            steps=_STEPS,
            weight_decay=recipe.weight_decay,
            adam=recipe.adam,
            clip_norm=recipe.clip_norm,
        )
        key = jax.random.key(0)
        delta = make_delta(key, backbone.shared, method.rules_for(backbone.shared))
        self._state = TaskState.create(delta, backbone.model_state, tx=tx, key=key)
        penalty = method.penalty
        step = make_train_step(
            backbone.network(method.classes),
            tx,
            penalty=penalty and (lambda delta, step: penalty(delta, step / _STEPS)),
            forward=forward,
            frozen_stats=method.frozen_stats,
            compute_dtype=recipe.compute_dtype,
            accumulate=recipe.accumulate,
        )
        lowered = jax.jit(step, donate_argnums=1).lower(
            backbone.shared, self._state, batch
        )
        self._step = lowered.compile()
        cost: Any = self._step.cost_analysis() or {}
        memory = self._step.memory_analysis()
        self.params = stored_size(delta)
        self.flops = float(cost.get("flops", math.nan))
        self.temp_bytes = int(memory.temp_size_in_bytes) if memory else 0

    def __call__(self) -> Any:
        """Run one step from where the last one ended; return its sums."""
        self._state, sums = self._step(self._shared, self._state, self._batch)
        return sums


def compile_together(rows: Mapping[str, Callable[[], Row]]) -> dict[str, Row]:
    """Compile rows in threads, one for each core: XLA leaves Python free meanwhile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(compile_row) for compile_row in rows.values()]
        return {name: row.result() for name, row in zip(rows, started, strict=True)}


def interleave(
    rows: Mapping[str, Callable[[], Any]], *, rounds: int, steps: int = 1
) -> dict[str, list[float]]:
    """Time every row once a round, so that a slow minute slows all of them.

    Args:
        rows: what to time; each returns arrays to wait for.
        rounds: that count; one more comes before them.
        steps: calls of a row in a round.

    Returns:
        Seconds of one call, by row and round.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    for n in range(rounds + 1):
        for name, run in rows.items():
            start = time.perf_counter()
            for _ in range(steps - 1):
                run()
            jax.block_until_ready(run())
            if n:
                times[name].append((time.perf_counter() - start) / steps)
    return times


class StepCost(NamedTuple):
    """What one training step costs.

    Attributes:
        flops: of the compiled program.
        seconds: median over interleaved rounds after compiling.
    """

    flops: float
    seconds: float


def measured_costs(
    path: Path, rows: Mapping[str, Callable[[], CompiledStep]], *, rounds: int = 7
) -> dict[str, StepCost]:
    """Compile and time every row, or read from `path` what an earlier run measured.

    Rows are timed together or not at all: where one is new, all are measured again.
    """
    known = json.loads(path.read_bytes()) if path.exists() else {}
    if {*rows} - {*known}:
        steps = {name: compile_row() for name, compile_row in rows.items()}
        times = interleave(steps, rounds=rounds)
        known |= {name: (steps[name].flops, median(times[name])) for name in rows}
        write_atomic(path, json.dumps(known, indent=1).encode())
    return {name: StepCost(*known[name]) for name in rows}
