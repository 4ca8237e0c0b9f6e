"""The layout of the papers' Tables 1 and 2: what all tasks cost together."""

import statistics
from collections.abc import Mapping, Sequence

from ftn_jax.results import Row


def paper_table(
    rows: Sequence[Row],
    *,
    published: Mapping[str, Mapping[str, str]] = {},
    base_beside_copies: bool = True,
) -> str:
    """Lay rows out as the FTN papers do, with published figures in brackets.

    The parameters are those of the network and all its tasks' additions together, in
    millions and as a multiple of the network; heads and running statistics are left
    out. Where a task keeps a whole network of its own (fine-tuning), the papers' Table
    1 counts the pretrained one beside the copies (five tasks, 6x) and Table 2 does not
    (six tasks, 6x).

    Args:
        rows: of an experiment; accuracies are means over seeds.
        published: by method, by column (`"parameters"` or a task's name), the figure
            as printed.
        base_beside_copies: the choice for whole copies just named.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    by_size = sorted(rows, key=lambda row: row.task_params)  # stable
    lines = [
        f"| method | parameters, M | multiple | {' | '.join([*tasks, 'mean'])} |",
        "|---|--:|--:|" + "--:|" * (len(tasks) + 1),
    ]
    for method in dict.fromkeys(row.method for row in by_size):
        own = [row for row in rows if row.method == method]
        printed = published.get(method, {})
        base = own[0].shared_params
        added = {row.task: row.task_params for row in own}
        copies = all(size >= base for size in added.values())
        total = sum(added.values()) + base * (base_beside_copies or not copies)
        means = {
            task: statistics.mean(100 * r.value for r in own if r.task == task)
            for task in tasks
            if task in added
        }
        cells = [
            f"{means[task]:.2f}{_bracket(printed, task)}" if task in means else "–"
            for task in tasks
        ]
        whole = len(means) == len(tasks)
        cells.append(
            f"{statistics.mean(means.values()):.2f}{_bracket(printed, 'mean')}"
            if whole
            else "–"
        )
        parameters = f"{total / 1e6:.2f}{_bracket(printed, 'parameters')}"
        line = [method, parameters, f"{total / base:.3f}x", *cells]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def _bracket(printed: Mapping[str, str], column: str) -> str:
    return f" [{printed[column]}]" if column in printed else ""
