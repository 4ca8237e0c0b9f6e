"""Results files, tables and pictures."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from ftn_jax.data import ArraySource, Domain
from ftn_jax.results import Results, Row
from ftn_jax.sweep import slug, sweep
from ftn_jax.tables import markdown_table, plot_accuracy, report
from ftn_jax.trial import train_best


def row(method="FTN R=1", task="a", seed=0, value=0.5, params=30):
    return Row(
        method=method,
        task=task,
        seed=seed,
        metric="accuracy",
        value=value,
        task_params=params,
        shared_params=1000,
        steps=3,
        seconds=1.5,
        by_group={"factors": params, "head": 5},
        details={"rates": {"factors": 0.1}},
        inputs="abc",
    )


def open_results(path, **config):
    return Results(path, experiment="test", config=config, free=("seeds",))


def test_every_row_reaches_the_disk_and_comes_back(tmp_path):
    results = open_results(tmp_path, rate=0.1, seeds=(0,))
    results.add(row())
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["experiment"] == "test" and len(on_disk["rows"]) == 1
    assert {"commit", "versions", "device", "config"} <= set(on_disk)
    results.add(row(seed=1))
    again = open_results(tmp_path, rate=0.1, seeds=(0, 1, 2))
    assert again.rows == [row(), row(seed=1)]
    assert again.find("FTN R=1", "a", 1, inputs="abc") == row(seed=1)
    assert again.find("FTN R=1", "a", 2, inputs="abc") is None
    with pytest.raises(ValueError, match="a / FTN R=1 measured with another backbone"):
        again.find("FTN R=1", "a", 1, inputs="other")


def test_two_processes_keep_each_others_rows(tmp_path):
    one, two = open_results(tmp_path), open_results(tmp_path)
    one.add(row(seed=0))
    two.add(row(seed=1))
    one.add(row(seed=2))
    on_disk = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert sorted(r["seed"] for r in on_disk) == [0, 1, 2]


def test_rows_keep_where_they_came_from(tmp_path):
    open_results(tmp_path).add(replace(row(), commit="old", device="other"))
    again = open_results(tmp_path)
    assert (again.rows[0].commit, again.rows[0].device) == ("old", "other")


def test_the_file_is_json_also_where_a_number_is_not_finite(tmp_path):
    bad = {"test_loss": float("nan"), "curve": [1.0, float("inf")]}
    config = {"clip": float("inf")}
    open_results(tmp_path, **config).add(
        replace(row(), value=float("nan"), details=bad)
    )
    text = (tmp_path / "results.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (found,) = json.loads(text, parse_constant=refuse)["rows"]
    assert found["details"] == {"test_loss": "nan", "curve": [1.0, "inf"]}
    (again,) = open_results(tmp_path, **config).rows
    assert math.isnan(again.value)


def test_two_configurations_at_once_are_not_mixed(tmp_path):
    """The second one opened the folder before the first one's file was there."""
    one, two = (
        open_results(tmp_path / "a", rate=1),
        open_results(tmp_path / "b", rate=2),
    )
    two.path = one.path
    with pytest.raises(ValueError, match="rate: there 1, now 2"):
        two.add(row())
    assert open_results(tmp_path / "a", rate=1).rows == []


def test_rows_edited_by_hand(tmp_path):
    open_results(tmp_path).add(row())
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    (entry,) = whole["rows"]
    for name in ("commit", "device"):
        del entry[name]
    path.write_text(json.dumps(whole))
    (found,) = open_results(tmp_path).rows
    assert found.commit == found.device == "unknown"  # not what runs now
    for rows in ([entry, entry], [{**entry, "value": "high"}], [{"value": 1}]):
        path.write_text(json.dumps({**whole, "rows": rows}))
        with pytest.raises(ValueError, match="results.json is no results file"):
            open_results(tmp_path)


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    open_results(tmp_path, rate=0.1).add(row())
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"rate: there 0.1, now 0.2.*--workdir"):
        open_results(tmp_path, rate=0.2)
    with pytest.raises(ValueError, match="experiment: there 'test'"):
        Results(tmp_path, experiment="other", config={"rate": 0.1})
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}'])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json is no results file"):
        open_results(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_two_runs_do_not_train_one_row(tmp_path):
    unused: Any = None
    with FileLock(tmp_path / ".lock"):  # as the other process holds it
        with pytest.raises(ValueError, match="another process is training in .*rows"):
            train_best(
                [],
                seed=0,
                title="",
                evaluator=unused,
                held_out=None,
                folder=tmp_path,
            )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a"), r"two domains have one name: found \['a', 'a'\]"),
        (("A", "a"), "'A' and 'a' would share the folder 'a'; rename one"),
    ],
)
def test_domains_that_cannot_be_told_apart_are_refused(tmp_path, names, message):
    unused: Any = None
    source = ArraySource(np.zeros((2, 2, 2, 1), np.uint8), [0, 1])
    domains = [Domain(name, ("x", "y"), source, source) for name in names]
    with pytest.raises(ValueError, match=message):
        sweep(
            unused,
            domains,
            {},
            results=open_results(tmp_path),
            recipe=unused,
            train_transform=unused,
            eval_transform=unused,
            validation=0.0,
            workdir=tmp_path,
        )


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_results(tmp_path / "file" / "runs")


def test_table_gives_mean_std_and_leaves_gaps_open():
    rows = [
        row(value=0.5),
        row(value=0.7, seed=1),
        row(task="b", value=0.9),
        row(task="b", value=0.9, seed=1),
        row(method="fine-tuning", params=1000, value=0.8),
        row(method="fine-tuning", params=1000, value=0.8, seed=1, task="b"),
    ]
    assert markdown_table(rows) == (
        "| method | params per task | share of backbone | a | b | mean |\n"
        "|---|--:|--:|--:|--:|--:|\n"
        "| FTN R=1 | 30 | 3.0% | 60.0 ± 14.1 | 90.0 ± 0.0 | 75.0 ± 7.1 |\n"
        "| fine-tuning | 1,000 | 100.0% | 80.0 | 80.0 | – |\n"
    )


def test_table_gives_the_mean_size_of_tasks_that_differ():
    """A task by TAPS keeps the layers that it switched on."""
    rows = [row(method="TAPS", params=20), row(method="TAPS", params=60, task="b")]
    assert "| TAPS | 40 | 4.0% |" in markdown_table(rows)


def test_report_writes_table_and_picture(tmp_path, capsys):
    results = open_results(tmp_path)
    for name, params in (("feature extractor", 0), ("FTN R=1", 30)):
        for task in ("a", "b"):
            results.add(row(method=name, task=task, params=params))
    report(results)
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_picture_of_incomplete_rows(tmp_path):
    plot_accuracy([row(), row(task="b"), row(method="x")], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_slug():
    assert slug("FTN R=10, taps") == "ftn_r_10_taps"
    assert slug("gtsrb") == "gtsrb" and slug("数字") == "数字"
    names = ["a-b", "a b", "a_b", "A_b", "../../etc", "etc", "..", ""]
    assert len({slug(name) for name in names}) >= len(names) - 2  # case, space
    assert not any("/" in slug(name) or "." in slug(name) for name in names)
