"""Fixtures and switches for every test."""

import atexit
import gc
import os
import tempfile
from pathlib import Path

import jax
import pytest
from forks import Forks
from saved import DESCRIPTION, backbone, task

from ftn_jax import save_task

# Doctest collection would import these a second time, under another name.
collect_ignore = [
    "banks.py",
    "eight_devices.py",
    "forks.py",
    "formulas",
    "golden_tasks.py",
    "job_program.py",
    "kill_program.py",
    "input_program.py",
    "pictures.py",
    "saved.py",
    "toy.py",
    "trees.py",
    "weights.py",
]

# Most of the suite's time is XLA compiling programs that run once, on tiny arrays: a
# third of it is saved by compiling them without the expensive passes. Read when the
# first array is made.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

# One cache of compiled programs for all of the session's processes: its workers, and
# the command lines that tests start. The first of them makes it, and takes it away.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="compiled-")
    atexit.register(_cache.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", _cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Two devices on any machine, so that pmap and shard_map have something to map over.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real domains and weights, from FTN_DATA."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("FTN_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set FTN_DATA to its folder")
    return path


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved task, to be damaged."""
    return save_task(tmp_path / "task", task(), shared=backbone(), **DESCRIPTION)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A server that starts processes of the tests' programs."""
    cache = tmp_path_factory.mktemp("compiled")
    with Forks(cache, "job_program", "kill_program") as forks:
        yield forks


@pytest.fixture
def collected():
    """Orbax leaves what it read or wrote beside a failed array to the collector, which
    complains of it: here, not in a later test."""
    yield
    for _ in range(3):  # what one round frees may hold more
        gc.collect()
