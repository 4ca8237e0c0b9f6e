"""The training loop: steps, progress, and stopping without loss."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ftn_jax import metrics
from ftn_jax.train import TaskState, TrainStep

_NOT_FINITE = (
    "the loss or its gradient is not finite after step {}; the last good state is "
    "kept. Lower the learning rates, clip the gradient, or look at the input"
)

OnLog = Callable[[int, dict[str, float]], None]


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
    save: Callable[[TaskState], None] | None = None,
    save_every_s: float = 60.0,
) -> TaskState:
    """Train until `steps`, from wherever `state` stands.

    Ctrl-C (SIGINT) waits for the step under way, saves, and raises
    `KeyboardInterrupt`; a second one does not wait.

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

    Raises:
        NonFiniteLoss: holds the last good state, which was also saved.
        ValueError: if the batches end before `steps`.
    """
    done = int(state.step)
    if not state.finite:  # as it was saved when it failed
        raise NonFiniteLoss(_NOT_FINITE.format(done), state)
    if done >= steps:
        return state
    window: dict[str, Any] | None = None
    saved = time.monotonic()
    stream = batches(done)
    with _interrupt() as interrupted:
        try:
            for batch in stream:
                state, sums = step(shared, state, batch)
                done += 1
                window = metrics.add(window, sums)
                if done % log_every == 0 or done == steps:
                    _check_finite(window, state, save)
                    if on_log:
                        on_log(done, metrics.means(window))
                    window = None
                if interrupted.is_set():
                    _check_finite(window, state, save)
                    if save:
                        save(state)
                    raise KeyboardInterrupt
                if done == steps:
                    return state
                if save and time.monotonic() - saved > save_every_s:
                    _check_finite(window, state, save)
                    save(state)
                    saved = time.monotonic()
        finally:
            if hasattr(stream, "close"):
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    raise ValueError(f"the batches ended after step {done}, expected {steps} steps")


def _check_finite(
    window: Mapping[str, Any] | None,
    state: TaskState,
    save: Callable[[TaskState], None] | None,
) -> None:
    if window is None or not float(window.get("nonfinite", 0.0)):
        return
    if save:
        save(state)
    raise NonFiniteLoss(_NOT_FINITE.format(int(state.step)), state)


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event: a donated state must not be cut in two."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may set handlers
        return

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, old)
        event.set()

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, old)
