"""Accuracy against rank, as the papers' Figure 3."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ftn_jax.results import Row


def plot_rank(
    rows: Sequence[Row], path: str | Path, *, lines: Sequence[str] = ()
) -> None:
    """Draw accuracy against rank, one line for each task and one for their mean.

    Bars are a task's standard deviation over seeds, where there are several.

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

    ranked = [row for row in rows if "rank" in row.details]
    if not ranked:
        raise ValueError(
            "no row has a rank among its details; there is nothing to draw"
        )
    tasks = list(dict.fromkeys(row.task for row in ranked))
    ranks = sorted({row.details["rank"] for row in ranked})

    def mean(found: Sequence[Row]) -> float:
        """Average over seeds, then over tasks."""
        of_task = {
            row.task: [100 * r.value for r in found if r.task == row.task]
            for row in found
        }
        return statistics.mean(statistics.mean(values) for values in of_task.values())

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label in [*tasks, "mean"]:
        whole = label == "mean"
        wanted = {*tasks} if whole else {label}
        points = []
        for rank in ranks:
            found = [
                r for r in ranked if r.details["rank"] == rank and r.task in wanted
            ]
            if {r.task for r in found} == wanted:
                values = [100 * r.value for r in found]
                bar = 0.0 if whole or len(values) < 2 else statistics.stdev(values)
                points.append((rank, mean(found), bar))
        style = "k*-" if whole else "o-"
        if points:
            axes.errorbar(
                *zip(*points, strict=True),
                fmt=style,
                capsize=0 if whole else 3,
                alpha=1.0 if whole else 0.45,
                label=f"{label} over the tasks" if whole else label,
            )
    for name, dash in zip(lines, ("--", ":", "-.") * len(lines), strict=False):
        found = [row for row in rows if row.method == name]
        if {row.task for row in found} >= {*tasks}:
            axes.axhline(mean(found), color="k", ls=dash, label=f"{name}, mean")
    axes.set(xlabel="rank", ylabel="test accuracy, %", xscale="log", xticks=ranks)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels([str(rank) for rank in ranks])
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
