"""The papers' table: each task's own metric, parameters of all tasks, delta-m."""

import pytest

from ftn_jax.dense import depth, edges, semseg
from ftn_jax.dense.table import dense_table, plot_curves
from ftn_jax.results import Row

MEASURES = {"semseg": semseg(), "depth": depth(), "edges": edges()}


def row(method, task, value, size=1_000_000, seed=0, **details):
    return Row(
        method=method,
        task=task,
        seed=seed,
        metric=MEASURES[task].metric,
        value=value,
        task_params=size,
        shared_params=10_000_000,
        steps=1,
        seconds=1.0,
        by_group={},
        details=details,
        inputs="",
    )


def cells(table, method):
    (line,) = [x for x in table.splitlines() if x.startswith(f"| {method} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_one_line_for_each_method():
    rows = [
        row("single task", "semseg", 0.4, size=10_000_000),
        row("single task", "depth", 0.5, size=10_000_000),
        row("FTN R=1", "semseg", 0.36),
        row("FTN R=1", "semseg", 0.44, seed=1),
        row("FTN R=1", "depth", 0.6),
    ]
    table = dense_table(rows, MEASURES)
    assert "semseg: mIoU, % ↑" in table and "depth: image_rmse_with_gaps ↓" in table
    assert cells(table, "single task") == ["20.00", "40.0", "0.500", "+0.0"]
    assert cells(table, "FTN R=1") == ["12.00", "40.0 ± 5.7", "0.600", "-10.0"]
    alone = dense_table(rows[2:4], MEASURES)
    assert cells(alone, "FTN R=1")[-1] == "–"  # nothing to compare with
    assert "everywhere" not in table


def test_a_constant_stands_above_what_was_trained():
    rows = [row("FTN R=1", "semseg", 0.36), row("FTN R=1", "depth", 0.6)]
    constant = {"depth": 1.25, "semseg": 0.061}
    table = dense_table(rows, MEASURES, constant=constant)
    assert cells(table, "the mean, everywhere") == ["–", "6.1", "1.250", "–"]
    assert table.splitlines()[2].startswith("| the mean, everywhere")
    # The folder may hold rows of tasks that this run did not ask for.
    table = dense_table(rows, MEASURES, constant={"depth": 1.25})
    assert cells(table, "the mean, everywhere") == ["–", "–", "1.250", "–"]


def test_more_columns_and_the_curve(tmp_path):
    curve = [[0.9, 0.3], [0.5, 0.8]]
    rows = [row("FTN R=1", "edges", 0.6, test_AP=0.5, test_curve=curve)]
    assert cells(dense_table(rows, MEASURES, details=("AP",)), "FTN R=1") == [
        "11.00",
        "60.0",
        "50.0",
        "–",
    ]
    plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(KeyError):
        dense_table(rows, MEASURES, details=("absent",))
