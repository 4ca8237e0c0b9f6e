"""The papers' table of dense tasks: one column for each task's own metric."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftn_jax.dense.metrics import delta_m
from ftn_jax.measure import Measure
from ftn_jax.results import Results, Row

SINGLE = "single task"
CONSTANT = "the mean, everywhere"


def dense_report(
    results: Results,
    measures: Mapping[str, Measure],
    *,
    constant: Mapping[str, float] | None = None,
    details: Sequence[str] = (),
) -> None:
    """Print the table; write `results.md` and `metrics.png` beside `results.json`.

    Args:
        results: what was measured.
        measures: by task.
        constant: by task, the metric of saying the training data's mean (commonest
            class) everywhere; the table's first row.
        details: shares among the measures' other numbers, a column for each.
    """
    workdir = results.path.parent
    table = dense_table(results.rows, measures, constant=constant, details=details)
    (workdir / "results.md").write_text(table)
    plot_metrics(results.rows, measures, workdir / "metrics.png")
    print(f"\n{table}\ntable, pictures and saved tasks: {workdir}")


def dense_table(
    rows: Sequence[Row],
    measures: Mapping[str, Measure],
    *,
    constant: Mapping[str, float] | None = None,
    details: Sequence[str] = (),
) -> str:
    """Lay rows out as the papers do, the methods in the order they were run.

    Parameters are in millions for all tasks together: the backbone once and each
    task's own beside it, decoders left out; networks for one task alone keep no common
    backbone. The last column is the mean relative change against them (`delta_m`).
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    heads = [_heading(task, measures[task]) for task in tasks]
    heads += [f"{name}, %" for name in details]
    lines = [
        f"| method | params, M | {' | '.join(heads)} | Δm, % |",
        "|---|--:|" + "--:|" * (len(heads) + 1),
    ]
    if constant:
        # A task of an earlier run into the same folder may have none.
        known = [[constant[task]] if task in constant else [] for task in tasks]
        said = [_spread(v, measures[t]) for v, t in zip(known, tasks, strict=True)]
        lines.append(
            f"| {' | '.join([CONSTANT, '–', *said, *'–' * len(details), '–'])} |"
        )
    means = {m: _means([r for r in rows if r.method == m]) for m in methods}
    for method in methods:
        own = [row for row in rows if row.method == method]
        cells = [
            _spread([r.value for r in own if r.task == task], measures[task])
            for task in tasks
        ]
        for name in details:
            mean = statistics.mean(row.details[f"test_{name}"] for row in own)
            cells.append(f"{100 * mean:.1f}")
        lines.append(
            f"| {method} | {_millions(own):.2f} | {' | '.join(cells)} "
            f"| {_change(means[method], means.get(SINGLE, {}), measures)} |"
        )
    return "\n".join(lines) + "\n"


def _heading(task: str, measure: Measure) -> str:
    arrow = "↑" if measure.higher_is_better else "↓"
    return f"{task}: {measure.metric}{', %' if measure.percent else ''} {arrow}"


def _millions(own: Sequence[Row]) -> float:
    """Count the backbone once and every task once."""
    sizes = {row.task: row.task_params for row in own}
    shared = own[0].shared_params
    alone = all(size >= shared for size in sizes.values())
    return (sum(sizes.values()) + (0 if alone else shared)) / 1e6


def _means(own: Sequence[Row]) -> dict[str, float]:
    return {
        task: statistics.mean(row.value for row in own if row.task == task)
        for task in {row.task for row in own}
    }


def _spread(values: Sequence[float], measure: Measure) -> str:
    if not values:
        return "–"
    scale, digits = (100, 1) if measure.percent else (1, 3)
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def _change(
    values: Mapping[str, float],
    single: Mapping[str, float],
    measures: Mapping[str, Measure],
) -> str:
    if {*values} != {*single}:
        return "–"
    lower = [task for task in values if not measures[task].higher_is_better]
    return f"{delta_m(values, single, lower_is_better=lower):+.1f}"


def plot_metrics(
    rows: Sequence[Row], measures: Mapping[str, Measure], path: str | Path
) -> None:
    """Draw each task's metric against the parameters that the task adds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(4 * len(tasks), 3.5),
        layout="constrained",
        squeeze=False,
    )
    for place, task in zip(axes[0], tasks, strict=True):
        own = [row for row in rows if row.task == task]
        for method in dict.fromkeys(row.method for row in own):
            values = [row for row in own if row.method == method]
            place.plot(
                [100 * max(r.task_params, 1) / r.shared_params for r in values],
                [r.value for r in values],
                "o",
                label=method,
            )
        place.set(
            xscale="log",
            title=_heading(task, measures[task]).replace(", %", ""),
            xlabel="parameters per task, % of the backbone",
        )
        place.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_curves(rows: Sequence[Row], path: str | Path) -> None:
    """Draw precision over recall of edges, one curve for each method's first row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        first = next(row for row in rows if row.method == method)
        recall, precision = zip(*first.details["test_curve"], strict=True)
        label = f"{method}: odsF {first.value:.3f}"
        axes.plot(recall, precision, ".-", markersize=3, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
