"""The training loop: steps, progress, and stopping without loss."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from ftn_jax import metrics
from ftn_jax.events import event
from ftn_jax.train import TaskState, TrainStep

_NOT_FINITE = (
    "the loss or its gradient is not finite after step {}; the last good state is "
    "kept. Lower the learning rates, clip the gradient, or look at the input"
)

OnLog = Callable[[int, dict[str, float]], None]


class Save(Protocol):
    """Writes a state, and beside it what else the run needs to go on."""

    def __call__(
        self, state: TaskState, *, progress: Mapping[str, Any], wait: bool
    ) -> None:
        """Begin to write it, or wait until it is written."""
        ...


class Terminated(KeyboardInterrupt):
    """The run was asked to end (SIGTERM: a pre-emption, a time limit); it is saved."""


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        state: the last good state; the steps that failed changed nothing.
    """

    def __init__(self, message: str, state: TaskState) -> None:
        super().__init__(message)
        self.state = state


def fit(
    step: TrainStep,
    shared: Any,
    state: TaskState,
    batches: Callable[[int], Iterator[Mapping[str, Any]]],
    *,
    steps: int,
    on_log: OnLog | None = None,
    log_every: int = 20,
    save: Save | None = None,
    save_every_s: float = 60.0,
    progress: Mapping[str, Any] | None = None,
) -> TaskState:
    """Train until `steps`, from wherever `state` stands.

    Ctrl-C (SIGINT) and SIGTERM wait for the step under way, save, and raise
    `KeyboardInterrupt` or `Terminated`; a second one does not wait. In a job of several
    processes SIGTERM to any of them ends all after the same step (JAX's pre-emption
    service), and Ctrl-C does not wait.

    Args:
        step: a jitted training step; it may donate its state.
        shared: the frozen backbone.
        state: where to start; `state.step` steps are taken as done.
        batches: `start_step -> iterator`, so that a resumed run sees the batches
            that an uninterrupted one would have seen.
        steps: total number of steps.
        on_log: called with the step and the means since the last call.
        log_every: steps between two calls; also how often the loss is looked at,
            which waits for the device.
        save: writes a state, every so often and when the run is interrupted.
        save_every_s: seconds between two saves.
        progress: what `save` was given with this state.

    Raises:
        NonFiniteLoss: holds the last good state, which was also saved.
        OSError: if a state cannot be saved.
        ValueError: if the batches end before `steps`.
    """
    done = int(state.step)
    if not state.finite:  # as it was saved when it failed
        raise NonFiniteLoss(_NOT_FINITE.format(done), state)
    if done >= steps:
        return state
    progress = dict(progress or {})
    window: dict[str, Any] | None = progress.get("window")
    began = time.monotonic() - progress.get("seconds", 0.0)
    saved = time.monotonic()

    def keep(*, wait: bool = True) -> None:
        if save:
            so_far = {k: float(v) for k, v in window.items()} if window else None
            seconds = round(time.monotonic() - began, 3)
            save(state, progress={"window": so_far, "seconds": seconds}, wait=wait)

    def check_finite() -> None:
        if window and float(window.get("nonfinite", 0.0)):
            keep()
            raise NonFiniteLoss(_NOT_FINITE.format(int(state.step)), state)

    stream = batches(done)
    with _signals() as asked:
        try:
            for batch in stream:
                state, sums = step(shared, state, batch)
                done += 1
                window = metrics.add(window, sums)
                if done % log_every == 0 or done == steps:
                    check_finite()
                    means = metrics.means(window)
                    event("step", step=done, of=steps, **means)
                    if on_log:
                        on_log(done, means)
                    window = None
                if stop := _stop(asked, done):
                    check_finite()
                    keep()
                    event("stop", step=done, why=stop.__name__)
                    raise stop
                if done == steps:
                    return state
                if save and _due(
                    time.monotonic() - saved > save_every_s, done, log_every
                ):
                    check_finite()
                    keep(wait=False)
                    saved = time.monotonic()
        finally:
            if hasattr(stream, "close"):
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    raise ValueError(f"the batches ended after step {done}, expected {steps} steps")


def _stop(
    asked: list[type[KeyboardInterrupt]], done: int
) -> type[KeyboardInterrupt] | None:
    """Say whether, and how, the run ends after this step; alike in all processes."""
    if jax.process_count() == 1:
        return asked[0] if asked else None
    from jax.experimental import multihost_utils

    return Terminated if multihost_utils.reached_preemption_sync_point(done) else None


def _due(late: bool, done: int, log_every: int) -> bool:
    """Say whether to save after this step; the first process's clock decides."""
    if jax.process_count() == 1 or done % log_every:
        return late and jax.process_count() == 1
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))


@contextmanager
def _signals() -> Iterator[list[type[KeyboardInterrupt]]]:
    """Note the first signal instead of stopping: a donated state must not be cut."""
    asked: list[type[KeyboardInterrupt]] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield asked  # only the main thread may set handlers; jobs have JAX's
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}

    def handler(number: int, frame: Any) -> None:
        asked.append(kinds[signal.Signals(number)])
        restore()

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    old = {number: signal.getsignal(number) for number in kinds}
    for number in kinds:
        signal.signal(number, handler)
    try:
        yield asked
    finally:
        restore()
