"""Steps on many devices equal the step on one; meshes and start-up from flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ftn_jax.jobs import start
from ftn_jax.parallel import Layout, parse_mesh

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent
FORMS = {
    "data": 0,
    "data, model": 1,
    "data, local": 0,
    "data, model, local": 1,
    "task": 0,
    "two tasks a device": 0,
    "task, data, local": 0,
    "pmap": 0,
}


@pytest.fixture(scope="module")
def eight():
    """What eight_devices.py found."""
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    done = subprocess.run(
        [sys.executable, TESTS / "eight_devices.py"],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMS)
def test_steps_on_eight_devices_equal_those_on_one(eight, form):
    found = eight[form]
    assert "error" not in found, found
    assert found["devices"] == 8
    assert found["state"] < 1e-5 and found["sums"] < 1e-5
    assert found["moved"] > 1e-2
    assert found["donated"] and found["kept"] and found["same_backbone"]
    assert found["traced_again"] == found.get("compiled_again", 0) == 0
    assert found["split"] == FORMS[form]  # the kernel, where there is an axis for it


def test_evaluation_over_devices(eight):
    found = eight["evaluation"]
    assert found["sums"] < 1e-6 and found["outputs"] < 1e-5 and found["whole"]


def test_meshes_are_read():
    assert parse_mesh("data=8") == {"data": 8}
    assert parse_mesh("task=4, data=2") == {"task": 4, "data": 2}
    layout = Layout.of("data=2")
    assert layout.rows(8) == (0, 1)
    with pytest.raises(ValueError, match="batch of 7 cannot be split over 2 devices"):
        layout.rows(7)
    with pytest.raises(ValueError, match="has 64 devices, JAX sees .*NUM_CPU_DEVICES"):
        Layout.of("data=32,model=2")


@pytest.mark.parametrize(
    "text", ["", "data", "data=0", "data=x", "batch=2", "data=2,data=2", "data=-1"]
)
def test_a_wrong_mesh_is_refused(text):
    with pytest.raises(ValueError, match="expected axes of .*data=4,model=2"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # in a batch script, before srun
        ({"SLURM_STEP_NUM_TASKS": "8"}, (None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({"FTN_LAUNCHER": "tpu"}, (None, None, None)),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "3",
                "JAX_PROCESS_ID": "0",
            },
            ("h:1", 3, 0),
        ),
    ],
)
def test_start_joins_the_job_that_the_launcher_describes(monkeypatch, env, expected):
    for name in {*os.environ} - {"PATH", "HOME"}:
        if name.startswith(("SLURM", "OMPI", "TPU_", "JAX_COOR", "JAX_NUM_P")):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda c, **k: calls.append((c, k["num_processes"], k["process_id"])),
    )
    start()
    assert calls == ([expected] if expected else [])


def test_start_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"also needs \['processes', 'process'\]"):
        start(coordinator="localhost:1")
