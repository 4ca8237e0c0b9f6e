"""Killed at random moments, a run ends as if nothing had been."""

import json
import os
import random
import signal
import time

import pytest
from forks import until

pytestmark = pytest.mark.long


def outcome(workdir):
    """What a run leaves: its rows, and the hashes of the tasks' tensors."""
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    tasks = sorted(workdir.glob("tasks/*/manifest.json"))
    return (
        sorted((row["seed"], row["value"], row["steps"]) for row in rows),
        [json.loads(path.read_text())["tensors"]["sha256"] for path in tasks],
    )


def saving(workdir):
    """Orbax writes a state under a temporary name, and renames it."""
    return [*workdir.glob("state/*/*tmp*")]


def moment(rng, kind, out, workdir):
    """Wait for a random moment of a kind."""

    def said(lines):
        text = out.read_text() if out.exists() else ""
        return text.count("\n") >= lines or "done" in text

    if kind == 3:  # any, start-up included
        time.sleep(rng.uniform(0, 1))
        return
    wanted = rng.randint(2, 4)  # after one to three steps, so that the run moves on
    until(lambda: said(wanted))
    if kind == 1:  # while a state is being written
        until(lambda: saving(workdir) or said(1000))
    else:
        time.sleep(rng.uniform(0, 0.03))


@pytest.mark.parametrize(
    ("kills", "rows_wanted", "steps"),
    [(4, 2, 12), pytest.param(40, 3, 40, marks=pytest.mark.slow)],
)
def test_killed_runs_end_like_a_whole_one(forks, tmp_path, kills, rows_wanted, steps):
    rng, workdir, out = random.Random(kills), tmp_path / "run", tmp_path / "out"
    sizes = rows_wanted, steps
    forks.run(out, "kill_program.main", tmp_path / "whole", *sizes)
    whole = outcome(tmp_path / "whole")
    assert [row[2] for row in whole[0]] == [steps] * rows_wanted
    assert len({*whole[1]}) == rows_wanted
    rows, done, during_save = [], 0, 0
    for n in range(kills):
        out.unlink(missing_ok=True)
        pid = forks.start(out, "kill_program.main", workdir, *sizes)
        moment(rng, n % 4, out, workdir)
        os.kill(pid, signal.SIGKILL)
        code = forks.wait(pid)
        if code == 0:  # it was done already
            break
        assert code == -signal.SIGKILL, out.read_text()
        done += 1
        during_save += bool(saving(workdir))
        if (workdir / "results.json").exists():
            now = json.loads((workdir / "results.json").read_text())["rows"]
            assert now[: len(rows)] == rows  # no finished row is lost
            rows = now
    assert done >= kills // 2 and during_save
    forks.run(out, "kill_program.main", workdir, *sizes)
    assert outcome(workdir) == whole
    assert not [*workdir.glob("state/*")]
