"""The command line of an experiment: flags from a dataclass, errors for people."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

from ftn_jax import jobs
from ftn_jax.fit import NonFiniteLoss, Terminated

# What a batch job's script may look at.
TERMINATED, CANNOT_WRITE, LOST_PROCESS = 75, 74, 76
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def launch(
    config: type[Any], main: Callable[[Any], Any], *, args: Sequence[str] | None = None
) -> None:
    """Read flags into `config`, run `main`, and end with a clear message.

    `config` is a frozen dataclass of scalars whose class method `tiny()` gives settings
    that run the real code path in under a minute; `--tiny` starts from those, other
    flags still apply. The processes of a job (SLURM, Open MPI, TPU slice) find each
    other first, see `ftn_jax.jobs.start`.

    Exit codes: 2 for bad input; 3 for a loss that is not finite; 74 if the disk is full
    or read-only; 75 for SIGTERM, everything saved: run the same command again; 76 if
    another process of the job was lost: run all again; 130 for Ctrl-C. Set
    FTN_TRACEBACK=1 to see where an error came from.
    """
    try:
        import tyro
    except ImportError as error:
        raise SystemExit(
            "experiments need tyro and more: pip install 'ftn_jax[experiments]'"
        ) from error

    args = list(sys.argv[1:] if args is None else args)
    tiny = "--tiny" in args
    flags = [a for a in args if a != "--tiny"]
    cfg = tyro.cli(
        config,
        args=flags,
        default=config.tiny() if tiny else None,
        description=(sys.modules[config.__module__].__doc__ or "")
        + "\n--tiny: settings for a trial of under a minute.",
    )
    with exit_codes():
        jobs.start()
        main(cfg)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a run raises into a line of text and an exit code, see `launch`."""
    try:
        with _terminable():
            yield
    except Terminated:
        print(_STOPPED, file=sys.stderr)
        _leave(TERMINATED)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        _leave(130)
    except NonFiniteLoss as error:
        print(f"\nerror: {error}", file=sys.stderr)
        _leave(3)
    except Exception as error:
        if jobs.lost_touch(error):
            print(
                f"\nerror: process {jax.process_index()} of {jax.process_count()} lost "
                f"touch with another one ({str(error):.300}); start all of them again "
                "with the same command",
                file=sys.stderr,
            )
            _leave(LOST_PROCESS)
        known = isinstance(error, (ValueError, OSError, ImportError))
        if not known or os.environ.get("FTN_TRACEBACK"):
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        full = isinstance(error, OSError) and error.errno in _FULL
        _leave(CANNOT_WRITE if full else 2)


_STOPPED = "\nstopped; the same command goes on from the last saved state"


def _leave(code: int) -> NoReturn:
    """Exit; in a job of several at once, where others would be waited for in vain."""
    if jax.process_count() > 1 and code != TERMINATED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM raise, as Ctrl-C does; in a job of several, JAX listens to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        raise Terminated

    old = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def progress_bar(title: str, *, steps: int, batch_size: int) -> Any:
    """Show a bar with loss, accuracy, images per second and time left.

    Where there is no terminal, a line a minute says the same. Of the processes of a job
    the first one speaks. Yields a function for `fit`'s `on_log`.
    """
    import rich.progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    first, plain = jax.process_index() == 0, not console.is_terminal
    with bars.Progress(
        *columns,
        console=console,
        transient=True,
        disable=not first or plain,
        speed_estimate_period=600,  # many runs side by side log minutes apart
    ) as progress:
        bar = progress.add_task(title, total=steps, note="compiling")
        said = time.monotonic()

        def on_log(step: int, means: dict[str, float]) -> None:
            progress.update(bar, completed=step)
            speed = progress.tasks[bar].speed or 0.0
            note = " ".join(f"{k} {means[k]:.3f}" for k in means if k != "nonfinite")
            note = f"{note} {speed * batch_size:.0f} img/s"
            progress.update(bar, note=note)
            nonlocal said
            if first and plain and time.monotonic() - said > 60:
                print(f"{title}: {step}/{steps} {note}", file=sys.stderr, flush=True)
                said = time.monotonic()

        yield on_log
