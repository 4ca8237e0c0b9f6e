"""The benchmark of serving measures what it says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import serving

pytestmark = pytest.mark.long


def test_serving_measures_what_it_says(tmp_path, capsys):
    serving.main(replace(serving.Config.tiny(), workdir=tmp_path))
    result = json.loads((tmp_path / "serving.json").read_text())
    rows = {row["row"]: row for row in result["rows"]}
    served = ["mixed, 4", "loop, merged before, 4", "loop, merging, 4"]
    assert {"one merged task", "materialize", *served} < {*rows}
    assert rows["one merged task"]["times_one_merged"] == 1
    assert all(row["ms"] > 0 for row in rows.values())
    assert result["task_mib"] < result["backbone_mib"]
    assert result["experiment"] == "serving" and result["commit"]
    assert {"jax", "jaxlib"} < {*result["versions"]} and result["config"]["rounds"] == 2
    assert (tmp_path / "serving.md").read_text() in capsys.readouterr().out


def test_every_way_of_serving_gives_the_same_logits():
    rows, _ = serving.serving_rows(serving.Config.tiny())
    mixed = np.asarray(rows["mixed, 4"]())
    others = ["loop, merged before, 4", "loop, merging, 4", "vmapped merging, 4"]
    for name in others:
        found = np.concatenate([np.asarray(x) for x in rows[name]()])
        np.testing.assert_allclose(found, mixed, atol=1e-4 * np.abs(mixed).max())
    one = np.asarray(rows["one merged task"]())
    assert np.abs(one - mixed).max() > 1e-2 * np.abs(mixed).max()
