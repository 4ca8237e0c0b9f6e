"""Full disks, signals, lost rows: what is kept, and the exit code that says so."""

import errno
import json
import os
import resource
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import chex
import jax
import pytest
from saved import backbone, task
from toy import batch, setup

from ftn_jax import restore_task, save_task
from ftn_jax.command import launch
from ftn_jax.events import event, read_events, write_events
from ftn_jax.fit import NonFiniteLoss
from ftn_jax.results import Results
from ftn_jax.resume import StateFolder


@contextmanager
def no_room(size=1):
    """No file can grow beyond `size` bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_state_before(tmp_path, collected):
    shared, state, step = setup()
    folder = StateFolder(tmp_path / "run")
    one, _ = jax.jit(step)(shared, state, batch(seed=1))
    folder.save(one)
    folder.wait()
    two, _ = jax.jit(step)(shared, one, batch(seed=2))
    with no_room(), pytest.raises(OSError, match="cannot save .* make room") as caught:
        folder.save(two)
        folder.wait()
    assert caught.value.filename == str(tmp_path / "run")
    # Nothing goes on writing.
    left = [t.name for t in threading.enumerate() if "orbax" in type(t).__module__]
    assert not left
    again = StateFolder(tmp_path / "run")  # as the next process would
    chex.assert_trees_all_equal(again.restore(state), one)
    again.close()
    folder.save(two)
    folder.close()
    chex.assert_trees_all_equal(again.restore(state), two)
    again.close()


def test_a_full_disk_leaves_task_and_results_whole(tmp_path):
    save_task(tmp_path / "task", task(), shared=backbone(), name="old")
    results = Results(tmp_path, experiment="x", config={})
    before = (tmp_path / "results.json").read_bytes()
    with no_room():
        with pytest.raises(OSError):
            save_task(tmp_path / "task", task(1), shared=backbone(), name="new")
        with pytest.raises(OSError):
            results._write()
    assert (tmp_path / "results.json").read_bytes() == before
    found = restore_task(tmp_path / "task", backbone())
    assert found.name == "old"
    chex.assert_trees_all_equal(found.task, task())
    assert not [*tmp_path.rglob("*.partial")]


@dataclass(frozen=True)
class Config:
    """No settings."""

    @classmethod
    def tiny(cls):
        return cls()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("odd"), 2, "error: odd"),
        (FileNotFoundError(errno.ENOENT, "no file"), 2, "no file"),
        (NonFiniteLoss("not finite", None), 3, "not finite"),
        (OSError(errno.ENOSPC, "disk full"), 74, "disk full"),
        (OSError(errno.EROFS, "read-only"), 74, "read-only"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_exit_codes(error, code, said, capsys, monkeypatch):
    monkeypatch.delenv("FTN_TRACEBACK", raising=False)

    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as caught:
        launch(Config, main, args=[])
    assert caught.value.code == code
    assert said in capsys.readouterr().err


def test_sigterm_outside_of_training_ends_a_run_too(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        launch(Config, lambda cfg: os.kill(os.getpid(), signal.SIGTERM), args=[])
    assert caught.value.code == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_log_is_lines_of_json_whatever_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    write_events(path)
    event("step", step=1, loss=0.5)
    with path.open("ab") as file:
        file.write(b'{"event": "ste')  # a crash
    assert [e["event"] for e in read_events(path)] == ["step"]
    write_events(path)  # the next run
    event("save", folder=tmp_path)
    (first, last) = read_events(path)
    assert first["loss"] == 0.5 and first["process"] == 0 and first["time"] > 1e9
    assert last["folder"] == str(tmp_path)


def test_results_tell_the_log(tmp_path):
    Results(tmp_path / "a", experiment="x", config={"rank": 2})
    Results(tmp_path / "b", experiment="y", config={})
    event("row", value=1.0)
    found = [*read_events(tmp_path / "b" / "log.jsonl")]
    assert [e["event"] for e in found] == ["start", "row"]
    (start,) = read_events(tmp_path / "a" / "log.jsonl")
    assert start["config"] == {"rank": 2}
    json.loads((tmp_path / "a" / "results.json").read_text())
