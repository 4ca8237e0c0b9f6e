"""The command line of an experiment: flags from a dataclass, errors for people."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from ftn_jax.fit import NonFiniteLoss


def launch(
    config: type[Any], main: Callable[[Any], Any], *, args: Sequence[str] | None = None
) -> None:
    """Read flags into `config`, run `main`, and end with a clear message.

    `config` is a frozen dataclass of scalars whose class method `tiny()` gives settings
    that run the real code path in under a minute; `--tiny` starts from those, other
    flags still apply. Exit codes: 2 for bad input, 3 for a loss that is not finite, 130
    for Ctrl-C. Set FTN_TRACEBACK=1 to see where an error came from.
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
    try:
        main(cfg)
    except KeyboardInterrupt:
        print(
            "\nstopped; the same command goes on from the last saved state",
            file=sys.stderr,
        )
        sys.exit(130)
    except NonFiniteLoss as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FTN_TRACEBACK"):
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def progress_bar(title: str, *, steps: int, batch_size: int) -> Any:
    """Show a bar with loss, accuracy, images per second and time left.

    Where there is no terminal, a line a minute says the same. Yields a function for
    `fit`'s `on_log`.
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
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
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
            if progress.disable and time.monotonic() - said > 60:
                print(f"{title}: {step}/{steps} {note}", file=sys.stderr, flush=True)
                said = time.monotonic()

        yield on_log
