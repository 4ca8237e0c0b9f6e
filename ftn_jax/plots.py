"""Accuracy against rank, as the papers' Figure 3."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ftn_jax.results import Row


def plot_rank(
    rows: Sequence[Row], path: str | Path, *, lines: Sequence[str] = ()
) -> None:
    """Draw accuracy against rank, a line for each task and one for their mean.

    Bars are standard deviations over seeds.

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
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label in [*tasks, "mean"] if len(tasks) > 1 else tasks:
        mean = label == "mean"
        points = []
        for rank in ranks:
            of_rank = [r for r in ranked if r.details["rank"] == rank]
            values = _by_seed(of_rank, tasks if mean else [label])
            if values:
                std = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((rank, statistics.mean(values), std))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                *(x, y, error),
                fmt="k*-" if mean else "o-",
                capsize=3,
                alpha=1.0 if mean else 0.45,
                label="mean over the tasks" if mean else label,
            )
    for name, dash in zip(lines, ("--", ":", "-.") * len(lines), strict=False):
        values = _by_seed([row for row in rows if row.method == name], tasks)
        if values:
            height = statistics.mean(values)
            axes.axhline(height, color="k", ls=dash, label=f"{name}, mean")
    axes.set(xscale="log", xlabel="rank", ylabel="test accuracy, %")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", fontsize="small")  # pyright: ignore[reportArgumentType]
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_seed(rows: Sequence[Row], tasks: Sequence[str]) -> list[float]:
    """Average over tasks, in percent, for every seed that has all of them."""
    found = {(row.seed, row.task): 100 * row.value for row in rows}
    seeds = sorted({seed for seed, _ in found})
    return [
        statistics.mean(found[seed, task] for task in tasks)
        for seed in seeds
        if all((seed, task) in found for task in tasks)
    ]
