"""The papers' table and picture: accuracy beside parameters, method by method."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax

from ftn_jax.atomic import write_atomic
from ftn_jax.comparison import comparison_table
from ftn_jax.labels import place_labels
from ftn_jax.plots import plot_rank
from ftn_jax.results import Results, Row

Columns = Mapping[str, Mapping[str, str]]
_NO_COLUMNS: Columns = MappingProxyType({})
LINES = ("fine-tuning", "BN + head", "feature extractor")
"""Methods that are drawn across the picture of ranks."""


def report(results: Results, *, columns: Columns = _NO_COLUMNS) -> None:
    """Print the table; write it, pictures and comparisons beside `results.json`.

    `results.md` and `accuracy.png` always; `rank.png` where several ranks are there;
    `comparison.md`, paired tests with the largest method, where several tasks are.

    Args:
        results: the rows.
        columns: see `markdown_table`.
    """
    if jax.process_index() > 0:
        return
    workdir, rows = results.path.parent, results.rows
    table = markdown_table(rows, columns=columns)
    write_atomic(workdir / "results.md", table.encode())
    plot_accuracy(rows, workdir / "accuracy.png")
    methods, tasks = _names(rows)
    if len({r.details.get("rank") for r in rows} - {None}) > 1:
        known = [m for m in LINES if m in methods]
        plot_rank(rows, workdir / "rank.png", lines=known)
    if len(tasks) > 1 and len(methods) > 1:
        text = comparison_table(rows, methods[-1])
        write_atomic(workdir / "comparison.md", text.encode())
    print(f"\n{table}\ntable, picture and saved tasks: {workdir}")


def add_table(path: Path, table: str, *, heading: str = "") -> None:
    """Write one more table and print it; of a job's processes the first one does."""
    if jax.process_index() == 0:
        write_atomic(path, table.encode())
        print(f"{heading}\n\n{table}" if heading else table)


def markdown_table(rows: Sequence[Row], *, columns: Columns = _NO_COLUMNS) -> str:
    """Lay rows out as the papers do: one line for each method, the smallest first.

    Accuracies are in percent, mean and (for more than one seed) standard deviation
    over seeds; the last column is the mean over tasks, for the seeds that have all of
    them. Parameters are the task's factors and norms (or weights), heads and running
    statistics left out, as the papers count them; their mean, where tasks differ.

    Args:
        rows: what was measured.
        columns: more of them, before the tasks': a cell for each method, by heading.
    """
    methods, tasks = _names(rows)
    lines = [
        "| method | params per task | share of backbone | "
        + " | ".join([*columns, *tasks, "mean"])
        + " |",
        "|---|--:|--:|" + "--:|" * (len(columns) + len(tasks) + 1),
    ]
    for method in methods:
        own = [row for row in rows if row.method == method]
        cells = [
            _spread([100 * row.value for row in own if row.task == task])
            for task in tasks
        ]
        by_seed = [[r.value for r in own if r.seed == s] for s in {r.seed for r in own}]
        complete = [v for v in by_seed if len(v) == len(tasks)]
        mean = _spread([100 * statistics.mean(values) for values in complete])
        more = [column.get(method, "–") for column in columns.values()]
        params = round(statistics.mean(row.task_params for row in own))
        lines.append(
            f"| {method} | {params:,} | {params / own[0].shared_params:.1%} | "
            + " | ".join([*more, *cells, mean])
            + " |"
        )
    return "\n".join(lines) + "\n"


def plot_accuracy(rows: Sequence[Row], path: str | Path) -> None:
    """Draw accuracy against parameters per task, one line of points for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods, tasks = _names(rows)
    mean = {
        (m, t): statistics.mean(values)
        for m in methods
        for t in tasks
        if (values := [100 * r.value for r in rows if (r.method, r.task) == (m, t)])
    }
    share = {r.method: 100 * r.task_params / r.shared_params for r in rows}
    # A log axis has no zero: the feature extractor stands at the left edge.
    left = min([s for s in share.values() if s] or [1.0]) / 3
    place = {m: share[m] or left for m in methods}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for task in tasks:
        own = sorted((place[m], mean[m, t]) for m, t in mean if t == task)
        axes.plot(*zip(*own, strict=True), "o-", alpha=0.45, label=task)
    complete = [m for m in methods if all((m, t) in mean for t in tasks)]
    stars = {
        m: (place[m], statistics.mean(mean[m, t] for t in tasks)) for m in complete
    }
    for star in stars.values():
        axes.plot(*star, "k*", markersize=13)
    axes.set(
        xscale="log",
        xlabel="parameters per task without head, % of the backbone (left edge: none)",
        ylabel="test accuracy, %",
        title="stars: mean over the tasks",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", fontsize="small")  # pyright: ignore[reportArgumentType]
    place_labels(axes, stars)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    by_size = sorted(rows, key=lambda row: row.task_params)  # stable
    return (
        list(dict.fromkeys(row.method for row in by_size)),
        list(dict.fromkeys(row.task for row in rows)),
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
