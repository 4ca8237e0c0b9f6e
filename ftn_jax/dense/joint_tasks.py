"""All of a backbone's tasks on the same images, in one program."""

import hashlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ftn_jax.apply import Apply
from ftn_jax.core import materialize
from ftn_jax.train import Task


class JointTasks:
    """Run several tasks' networks on the same images and share what is equal.

    Weights and statistics that hold the same values become one array. What the tasks'
    networks then compute alike, from the first layer on, XLA computes once: tasks that
    train a decoder alone share the whole backbone, tasks with their own BatchNorm
    share its first convolution.

    Example:
        `JointTasks({"depth": apply, ...}, shared, {"depth": task, ...})(batch)` gives
        `{"depth": outputs, ...}`, as separate evaluations would.
    """

    def __init__(
        self, applies: Mapping[str, Apply], shared: Any, tasks: Mapping[str, Task]
    ) -> None:
        """Merge every task's parameters and find what is equal.

        Args:
            applies: each task's network, by the task's name.
            shared: the frozen backbone.
            tasks: their deltas and statistics, by the same names.

        Raises:
            ValueError: if the names differ.
        """
        if {*applies} != {*tasks}:
            raise ValueError(
                f"found networks for {sorted(applies)} and tasks {sorted(tasks)}, "
                "expected the same names"
            )
        variables = {
            name: (materialize(shared, task.delta), task.model_state)
            for name, task in tasks.items()
        }
        leaves, treedef = jax.tree.flatten(variables)
        places: dict[Any, int] = {}
        self.arrays: list[Any] = []
        order = []
        for leaf in leaves:
            values = np.asarray(leaf)
            key = (
                values.shape,
                values.dtype,
                hashlib.sha256(values.tobytes()).digest(),
            )
            if key not in places:
                places[key] = len(self.arrays)
                self.arrays.append(leaf)
            order.append(places[key])

        def run(arrays: list[Any], batch: Mapping[str, Any]) -> dict[str, Any]:
            rebuilt = treedef.unflatten([arrays[i] for i in order])
            outputs = {}
            for name in tasks:
                params, state = rebuilt[name]
                outputs[name], _ = applies[name](params, state, batch, train=False)
            return outputs

        self.run = jax.jit(run)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return every task's outputs."""
        return self.run(self.arrays, batch)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Count the floating-point operations of a call, as XLA does."""
        compiled = self.run.lower(self.arrays, batch).compile()
        cost: Any = compiled.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return float(cost["flops"])


def compare_costs(
    applies: Mapping[str, Apply],
    methods: Mapping[str, tuple[Any, Mapping[str, Task]]],
    batch: Mapping[str, Any],
    *,
    repeats: int = 7,
) -> str:
    """Set all tasks in one program beside one pass for each, method by method.

    Args:
        applies: each task's network.
        methods: by name, the backbone's values and the tasks.
        batch: what every call sees.
        repeats: timed calls, of which the medians are compared.

    Returns:
        A Markdown table of two ratios, joint over separate: floating-point operations
        as XLA counts them, and time.
    """
    lines = [
        "| method | operations, joint / separate | time, joint / separate |",
        "|---|--:|--:|",
    ]
    for method, (shared, tasks) in methods.items():
        joint = JointTasks(applies, shared, tasks)
        alone = [JointTasks({n: applies[n]}, shared, {n: tasks[n]}) for n in tasks]
        work = joint.flops(batch) / sum(one.flops(batch) for one in alone)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):  # the first call compiles
            for kind, runs in zip(seconds, ([joint], alone), strict=True):
                start = time.perf_counter()
                jax.block_until_ready([run(batch) for run in runs])
                kind.append(time.perf_counter() - start)
        together, apart = (statistics.median(kind[1:]) for kind in seconds)
        lines.append(f"| {method} | {work:.2f} | {together / apart:.2f} |")
    return "\n".join(lines) + "\n"
