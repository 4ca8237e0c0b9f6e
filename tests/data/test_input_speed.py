"""The benchmark of the input measures what it says."""

import json
from dataclasses import replace

import pytest

from experiments import input_speed

pytestmark = pytest.mark.long

pytest.importorskip("grain")


def test_tiny_run_writes_tables_and_figure(tmp_path, capsys):
    cfg = replace(input_speed.Config.tiny(), workdir=tmp_path)
    result = input_speed.main(cfg)
    assert json.loads((tmp_path / "input_speed.json").read_text()) == result
    assert (tmp_path / "input_speed.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "input_speed.png").stat().st_size > 1000
    core = result["per_core"]
    # The second does the first's work and more; a busy machine may hide how little.
    assert 0 < core["crop, flip"] < 1.5 * core["decode"]
    assert [*result["per_batch"]] == ["one thread", "1 worker process"]
    for row in result["training"].values():
        assert 0 <= row["waiting"] < 1 and row["wait_s"] <= row["step_s"]
    with pytest.raises(ValueError, match="--backbone nothing: unknown"):
        input_speed.main(replace(cfg, backbone="nothing"))
