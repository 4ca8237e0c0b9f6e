"""The papers' layout of a table, and accuracy against rank."""

import pytest

from ftn_jax.paper_table import paper_table
from ftn_jax.plots import plot_rank, rank_curves
from ftn_jax.published import printed_parameters
from ftn_jax.results import Row


def row(method, task, value, size, seed=0, **details):
    return Row(
        *(method, task, seed, "accuracy", value, size, 1_000_000, 1, 1.0, {}, details),
        *("x", "", ""),
    )


ROWS = [
    row("fine-tuning", "cats", 0.9, 1_000_000),
    row("fine-tuning", "dogs", 0.8, 1_000_000),
    row("FTN R=1, xavier", "cats", 0.80, 10_000, rank=1),
    row("FTN R=1, xavier", "cats", 0.82, 10_000, seed=1, rank=1),
    row("FTN R=1, xavier", "dogs", 0.7, 10_000, rank=1),
    row("FTN R=40, xavier", "cats", 0.85, 400_000, rank=40),
    row("FTN R=40, xavier", "dogs", 0.75, 400_000, rank=40),
    row("BN + head", "cats", 0.7, 5_000),
]


def test_totals_and_printed_figures():
    assert not printed_parameters("DomainNet", ROWS, backbone="resnet18")
    printed = printed_parameters("DomainNet", ROWS, backbone="resnet34")
    table = paper_table(ROWS, published=printed)
    assert table.splitlines()[2:] == [
        "| BN + head | 1.00 [21.35] | 1.005x | 70.00 | – | – |",
        "| FTN R=1, xavier | 1.02 [21.44!] | 1.020x | 81.00 | 70.00 | 75.50 |",
        "| FTN R=40, xavier | 1.80 [25.22!] | 1.800x | 85.00 | 75.00 | 80.00 |",
        "| fine-tuning | 3.00 | 3.000x | 90.00 | 80.00 | 85.00 |",
    ]
    table = paper_table(ROWS, base_beside_copies=False)
    assert "| fine-tuning | 2.00 | 2.000x |" in table
    assert "| BN + head | 1.00 | 1.005x |" in table


def test_curves_of_accuracy_against_rank():
    found = rank_curves(ROWS)
    assert [*found] == ["cats", "dogs", "mean over the tasks"]
    assert found["cats"] == [(1, pytest.approx(81), pytest.approx(2**0.5)), (40, 85, 0)]
    # Only seed 0 has both tasks.
    assert found["mean over the tasks"] == [(1, 75, 0), (40, 80, 0)]


def test_methods_of_one_rank_are_not_mixed():
    taps = [row(f"FTN R={r}, taps", t, 0.5, r, rank=r) for r in (1, 40) for t in "ab"]
    other = [row("FTN R=40, xavier", t, 0.9, 40, rank=40) for t in "ab"]
    assert rank_curves(taps + other) == {
        "FTN R=r, taps, mean over the tasks": [(1, 50, 0), (40, 50, 0)],
        "FTN R=r, xavier, mean over the tasks": [(40, 90, 0)],
    }


def test_accuracy_against_rank(tmp_path):
    plot_rank(ROWS, tmp_path / "rank.png", lines=("fine-tuning", "BN + head"))
    assert (tmp_path / "rank.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no row has a rank"):
        plot_rank(ROWS[:2], tmp_path / "none.png")
