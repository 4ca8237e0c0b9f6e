"""The processes of a job: how they find each other, and wait for each other."""

import os
import re

import jax

# How XLA's errors begin; on a CPU they are no class of their own.
_STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    "|UNKNOWN): "
)


def start(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat_s: int = 100,
) -> None:
    """Join the processes of a job; call it before anything asks for a device.

    With a coordinator the three arguments say all; `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say the same. Without one, JAX finds out by
    itself under SLURM (`srun` with several tasks), Open MPI (`mpirun -n`) and on a TPU
    slice (where its list of hosts is not in the environment, set `FTN_LAUNCHER=tpu`).
    A process that is alone is left alone.

    Args:
        coordinator: `host:port` of the first process.
        processes: how many processes the job has.
        process: which of them this one is, from 0.
        heartbeat_s: a process that is silent for so long counts as lost, and the
            others end.

    Raises:
        ValueError: if only some of the three are known.
        RuntimeError: if the others are not there within five minutes.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ.get
    coordinator = coordinator or env("JAX_COORDINATOR_ADDRESS")
    processes = _number(processes, env("JAX_NUM_PROCESSES"))
    process = _number(process, env("JAX_PROCESS_ID"))
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and not _launched_by_many():
        if len(missing) < len(given):
            raise ValueError(f"a job of several processes also needs {missing}")
        return
    jax.distributed.initialize(
        coordinator,
        num_processes=processes,
        process_id=process,
        heartbeat_timeout_seconds=heartbeat_s,
    )


def _number(given: int | None, text: str | None) -> int | None:
    return int(text) if given is None and text else given


def _launched_by_many() -> bool:
    """Say whether SLURM, Open MPI or a TPU slice started several of us."""
    env = os.environ.get
    # In a batch script outside srun SLURM_NTASKS is set too, but we are alone there.
    tasks = (env("SLURM_STEP_NUM_TASKS"), env("OMPI_COMM_WORLD_SIZE"))
    hosts = env("TPU_WORKER_HOSTNAMES", "") + env("TPU_PROCESS_ADDRESSES", "")
    many = any(int(n or 1) > 1 for n in tasks)
    return many or "," in hosts or env("FTN_LAUNCHER") == "tpu"


def sync(what: str) -> None:
    """Wait until all processes of a job are here; nothing in a process alone."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)


def lost_touch(error: BaseException | None) -> bool:
    """Say whether an error, or its cause, is that another process is gone."""
    if error is None or jax.process_count() == 1:
        return False
    found = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and _STATUS.match(str(error)) is not None
    )
    return found or lost_touch(error.__cause__)
