"""Accuracy against rank, as the papers' Figure 3."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ftn_jax.results import Row


class Point(NamedTuple):
    """A point of a curve: accuracy in percent, its deviation over seeds."""

    rank: int
    mean: float
    std: float


def plot_rank(
    rows: Sequence[Row], path: str | Path, *, lines: Sequence[str] = ()
) -> None:
    """Draw `rank_curves`; bars are standard deviations over seeds.

    Args:
        rows: of an experiment; those with a `"rank"` among their details are drawn.
        path: of the picture.
        lines: methods without a rank (fine-tuning, BN + head) whose mean over tasks is
            drawn across.

    Raises:
        ValueError: if no row has a rank.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = rank_curves(rows)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, points in curves.items():
        mean = "mean over the tasks" in label
        x, y, error = zip(*points, strict=True)
        axes.errorbar(
            *(x, y, error),
            fmt="*-" if mean else "o-",
            color="k" if label == "mean over the tasks" else None,
            capsize=3,
            alpha=1.0 if mean else 0.45,
            label=label,
        )
    tasks = list(dict.fromkeys(r.task for r in rows if "rank" in r.details))
    for name, dash in zip(lines, ("--", ":", "-.") * len(lines), strict=False):
        values = _by_seed([row for row in rows if row.method == name], tasks)
        if values:
            height = statistics.mean(values)
            axes.axhline(height, color="k", ls=dash, label=f"{name}, mean")
    axes.set(xscale="log", xlabel="rank", ylabel="test accuracy, %")
    ranks = sorted({point.rank for points in curves.values() for point in points})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", fontsize="small")  # pyright: ignore[reportArgumentType]
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rank_curves(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Average accuracies at each rank: a curve for each task, and one for their mean.

    Of methods that differ in more than their rank (two inits of FTN) each has one
    curve, its mean over the tasks.

    Raises:
        ValueError: if no row has a rank.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if "rank" in row.details:
            kind = re.sub(rf"\b{row.details['rank']}\b", "r", row.method)
            kinds.setdefault(kind, []).append(row)
    if not kinds:
        raise ValueError(
            "no row has a rank among its details; there is nothing to draw"
        )
    tasks = list(dict.fromkeys(r.task for own in kinds.values() for r in own))
    if len(kinds) > 1:
        found = {
            f"{kind}, mean over the tasks": _curve(own, tasks)
            for kind, own in kinds.items()
        }
    else:
        (own,) = kinds.values()
        found = {task: _curve(own, [task]) for task in tasks}
        if len(tasks) > 1:
            found["mean over the tasks"] = _curve(own, tasks)
    return {label: points for label, points in found.items() if points}


def _curve(rows: Sequence[Row], tasks: Sequence[str]) -> list[Point]:
    points = []
    for rank in sorted({row.details["rank"] for row in rows}):
        values = _by_seed([r for r in rows if r.details["rank"] == rank], tasks)
        if values:
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append(Point(rank, statistics.mean(values), std))
    return points


def _by_seed(rows: Sequence[Row], tasks: Sequence[str]) -> list[float]:
    """Average over tasks, in percent, for every seed that has all of them."""
    found = {(row.seed, row.task): 100 * row.value for row in rows}
    seeds = sorted({seed for seed, _ in found})
    return [
        statistics.mean(found[seed, task] for task in tasks)
        for seed in seeds
        if all((seed, task) in found for task in tasks)
    ]
