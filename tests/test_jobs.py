"""Jobs of several real processes: equal to one, loud when one is lost, resumable."""

import json
import os
import signal
import socket

import chex
import numpy as np
import pytest
from forks import until
from toy import setup

from ftn_jax import restore_task
from ftn_jax.command import LOST_PROCESS, TERMINATED

pytestmark = pytest.mark.long

STEPS = 8


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def coordinator(processes):
    """The explicit form: one environment for each process."""
    address = f"localhost:{free_port()}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(n),
        }
        for n in range(processes)
    ]


def srun(processes):
    """What `srun -n` sets in each of its tasks."""
    job = free_port() % 2**12  # JAX makes the port of it
    return [
        {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(processes),
            "SLURM_STEP_NUM_TASKS": str(processes),
            "SLURM_PROCID": str(n),
            "SLURM_LOCALID": str(n),
        }
        for n in range(processes)
    ]


def launch(forks, workdir, mesh, environments, *, steps=STEPS, **env):
    workdir.mkdir(exist_ok=True)
    outs = [workdir / f"out{n}" for n in range(len(environments))]
    pids = [
        forks.start(out, "job_program.main", workdir, mesh, steps, **own, **env)
        for out, own in zip(outs, environments, strict=True)
    ]
    return pids, outs


def finish(forks, pids, outs):
    codes = [forks.wait(pid) for pid in pids]
    assert codes == [0] * len(pids), (codes, [o.read_text()[-2000:] for o in outs])


def restored(out):
    """The step that a process went on from."""
    lines = out.read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("restored ")]
    return int(line.split()[1])


def outcome(workdir):
    shared, _, _ = setup()
    result = json.loads((workdir / "result.json").read_text())
    return result, restore_task(workdir / "task", shared).task


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    finish(forks, *launch(forks, workdir, "data=1", [{}], SAVE_EVERY="60"))
    result, task = outcome(workdir)
    assert result["processes"] == 1
    _, start, _ = setup()
    moved = np.abs(
        task.delta["head"]["bias"].value - start.task.delta["head"]["bias"].value
    )
    assert moved.max() > 1e-2
    return result, task


def same(found, expected, processes):
    assert found[0]["processes"] == processes
    assert found[0]["means"] == pytest.approx(expected[0]["means"], rel=1e-4)
    chex.assert_trees_all_close(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "environments"),
    [
        ("data=2", srun),
        pytest.param("data=1,model=2", coordinator, marks=pytest.mark.slow),
        pytest.param("data=4", coordinator, marks=pytest.mark.slow),
        pytest.param("data=2,model=2", srun, marks=pytest.mark.slow),
    ],
)
def test_a_job_equals_one_process(forks, alone, tmp_path, mesh, environments):
    processes = int(np.prod([int(part[-1]) for part in mesh.split(",")]))
    job = launch(
        forks, tmp_path / "job", mesh, environments(processes), SAVE_EVERY="60"
    )
    finish(forks, *job)
    same(outcome(tmp_path / "job"), alone, processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_lost_process_ends_the_job_which_goes_on_when_started_again(
    forks, alone, tmp_path, processes
):
    mesh, workdir = f"data={processes}", tmp_path / "job"
    pids, outs = launch(forks, workdir, mesh, coordinator(processes), PAUSE="0.1")
    until(lambda: outs[-1].exists() and "step 4" in outs[-1].read_text())
    os.kill(pids[-1], signal.SIGKILL)
    codes = [forks.wait(pid) for pid in pids]
    assert codes.pop() == -signal.SIGKILL
    for code, out in zip(codes, outs, strict=False):
        assert code in (LOST_PROCESS, -signal.SIGABRT), (code, out.read_text()[-3000:])
        assert (
            "start all of them again" in out.read_text()
            or "abort" in out.read_text().lower()
        )
    assert not (workdir / "result.json").exists()
    pids, outs = launch(forks, workdir, mesh, coordinator(processes))
    finish(forks, pids, outs)
    assert 0 < restored(outs[0]) == restored(outs[1]) < STEPS
    same(outcome(workdir), alone, processes)


@pytest.mark.slow
def test_sigterm_to_one_process_ends_all_with_a_saved_state(forks, alone, tmp_path):
    workdir = tmp_path / "job"
    pids, outs = launch(
        forks, workdir, "data=2", coordinator(2), PAUSE="0.2", SAVE_EVERY="60"
    )
    until(lambda: outs[1].exists() and "step 2" in outs[1].read_text())
    os.kill(pids[1], signal.SIGTERM)
    codes = [forks.wait(pid) for pid in pids]
    assert codes == [TERMINATED] * 2, [out.read_text()[-3000:] for out in outs]
    pids, outs = launch(forks, workdir, "data=2", coordinator(2))
    finish(forks, pids, outs)
    assert 0 < restored(outs[0]) == restored(outs[1]) < STEPS
    same(outcome(workdir), alone, 2)


@pytest.mark.slow
def test_the_states_of_a_job_open_in_one_process(forks, tmp_path):
    """Also on another number of processes the run goes on."""
    workdir = tmp_path / "job"
    job = launch(forks, workdir, "data=2", coordinator(2), steps=3)
    finish(forks, *job)
    finish(forks, *launch(forks, workdir, "data=1", [{}], steps=STEPS))
    assert 0 < restored(workdir / "out0") < STEPS


@pytest.mark.slow
def test_an_experiment_of_two_processes_gives_the_table_of_one(forks, tmp_path):
    rows = []
    for mesh, environments in (("none", [{}]), ("data=2", srun(2))):
        workdir = tmp_path / mesh
        workdir.mkdir()
        outs = [workdir / f"out{n}" for n in range(len(environments))]
        pids = [
            forks.start(out, "job_program.experiment", workdir, mesh, **own)
            for out, own in zip(outs, environments, strict=True)
        ]
        finish(forks, pids, outs)
        rows.append(json.loads((workdir / "results.json").read_text())["rows"])
        assert len([*workdir.glob("tasks/*/*/*/manifest.json")]) == len(rows[-1]) == 2
        assert not [*workdir.glob("state/*/*/*")]
    for one, two in zip(*rows, strict=True):
        assert (one["method"], one["inputs"]) == (two["method"], two["inputs"])
        assert two["value"] == pytest.approx(one["value"], abs=0.02)
        assert two["details"]["test_loss"] == pytest.approx(
            one["details"]["test_loss"], rel=1e-3
        )
