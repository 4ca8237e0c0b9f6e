"""Keep a training state on disk with Orbax, so that a stopped run goes on."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from ftn_jax.digest import digests
from ftn_jax.events import event
from ftn_jax.manifest import checksum
from ftn_jax.paths import path_name
from ftn_jax.train import TaskState


class StateFileError(ValueError):
    """A saved state that is damaged, or of another configuration."""


class StateFolder:
    """The last states of one training run, and the best, in a folder of their own.

    Saving is atomic and asynchronous (Orbax): the run goes on while a copy is written,
    a crash meanwhile leaves the state before. The tree holds the task, the optimizer's
    state, the step (the position in the input is a function of it) and the PRNG key;
    the backbone is never part of it. Hashes of all arrays lie beside them. The
    processes of a job call every method together.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 1,
        best: str | None = None,
    ) -> None:
        """Name the folder; it is made at the first save.

        Args:
            directory: the folder, used by this run alone.
            keep: how many of the last states stay.
            best: the state of the largest of this metric stays, too.
        """
        self.directory = Path(directory).absolute()
        self.keep, self.best = keep, best

    def of(self, name: str) -> "StateFolder":
        """Return a folder beside this one, for a part of the run."""
        place = self.directory.with_name(f"{self.directory.name}-{name}")
        return StateFolder(place, keep=self.keep, best=self.best)

    def save(
        self,
        state: TaskState,
        *,
        progress: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Begin to write the state, unless it is there.

        Args:
            state: what to save; it may be donated at once.
            progress: what else the run needs to go on, as JSON holds it.
            metrics: what `best` looks at.
            wait: until it is on the disk; `wait()` does so later.

        Raises:
            OSError: if this save, or the one before, could not be written; the state
                before it is whole.
            StateFileError: if the folder holds a later state.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        with self._writing():
            steps = self._manager.all_steps()
        if step < max(steps, default=0):  # Orbax would drop it without a word
            raise StateFileError(
                f"{self.directory} holds a state of step {max(steps)}, later than this "
                f"one of step {step}: go on from there, or delete the folder"
            )
        with self._writing():
            if step in steps:
                if state.finite:
                    return self.wait() if wait else None
                self.wait()
                self._manager.delete(step)  # saved before the next step failed
            about = {
                "arrays": _describe(state, hashes=True),
                "progress": dict(progress or {}),
            }
            about["checksum"] = checksum(about)
            self._manager.save(
                step,
                metrics=dict(metrics or {}),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),  # pyright: ignore
                    about=ocp.args.JsonSave(about),  # pyright: ignore
                ),
            )
        if wait:
            self.wait()
        event("save", step=step, folder=str(self.directory))

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            OSError: if it could not be written.
        """
        if "_manager" in vars(self):
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder; a later call opens it again."""
        self.wait()
        if "_manager" in vars(self):
            vars(self).pop("_manager").close()

    def restore(self, like: TaskState, *, best: bool = False) -> TaskState | None:
        """Read the last state back into `like`'s structure; `None` if there is none.

        Each array lies where that of `like` does, on however many devices.

        Args:
            like: a state of the run's structure, shapes and shardings.
            best: read the state with the best metric instead of the last.

        Raises:
            StateFileError: if the saved state is damaged, or has another structure or
                other shapes, because the run's configuration changed.
        """
        found = self.restore_with_progress(like, best=best)
        return found and found[0]

    def restore_with_progress(
        self, like: TaskState, *, best: bool = False
    ) -> tuple[TaskState, dict[str, Any]] | None:
        """Read the last state back, as `restore` does, and what was saved with it."""
        import orbax.checkpoint as ocp

        if not self.directory.is_dir():
            return None
        self.wait()
        with _reading(self.directory):
            self._manager.reload()
            step = self._step(best)
            if step is None:
                return None
            about = self._manager.restore(
                step,
                args=ocp.args.Composite(about=ocp.args.JsonRestore()),  # pyright: ignore
            )["about"]
            arrays, progress = about["arrays"], about["progress"]
            if about["checksum"] != checksum(about):
                raise ValueError("its description is not what was saved")
        self._check_shapes(arrays, like)
        with _reading(self.directory):
            state = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),  # pyright: ignore
                ),
            )["state"]
            if _describe(state, hashes=True) != arrays or int(state.step) != step:
                raise ValueError("its arrays are not those that were saved")
        event("resume", step=step, folder=str(self.directory))
        return state, progress

    def _step(self, best: bool) -> int | None:
        if best and self.best:
            return self._manager.best_step()
        return self._manager.latest_step()

    def _check_shapes(self, saved: dict[str, list[Any]], like: TaskState) -> None:
        found = {path: tuple(shape) for path, (_, shape, _) in saved.items()}
        expected = {p: tuple(x[1]) for p, x in _describe(like, hashes=False).items()}
        odd = [
            f"{path}: found {found.get(path)}, expected {expected.get(path)}"
            for path in sorted({*found, *expected})
            if found.get(path) != expected.get(path)
        ]
        if odd:
            raise StateFileError(
                f"{self.directory} holds a state of another configuration "
                f"({len(odd)} differences: {'; '.join(odd[:3])}); delete the folder to "
                "start this run afresh"
            )

    def clear(self) -> None:
        """Delete the folder, when the run is done."""
        self.close()
        if jax.process_index() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say which folder cannot be written, whatever the writer raised."""
        try:
            yield
        except Exception as error:  # TensorStore's are of many kinds
            _settle()
            # The manager would raise the same again; the next call opens another.
            vars(self).pop("_manager", None)
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"cannot save the training state ({error!r:.300}); make room or choose "
                "another folder, the same command goes on from the state before",
                str(self.directory),
            ) from error

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        keeping: list[Any] = [policy.LatestN(self.keep)]
        if self.best:
            name = self.best
            keeping.append(
                policy.BestN(
                    get_metric_fn=lambda metrics: metrics[name],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(keeping),
                best_fn=(lambda metrics: metrics[self.best]) if self.best else None,
                cleanup_tmp_directories=True,
            ),
        )


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Say which folder is damaged, whatever the reader raised."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can raise anything at all
        raise StateFileError(
            f"{directory} holds a damaged state ({error!r:.300}); delete the folder to "
            "start this run afresh, or restore it from a copy"
        ) from error


def _settle() -> None:
    """Wait for what is left of a save of which one part failed.

    Orbax raises at the first failure; threads that still write the other parts would
    go on in the folder, and end whenever, with errors that nobody hears.
    """
    if jax.process_count() > 1:  # they may wait for a process that is gone
        return
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # their own would raise what they met


def _describe(state: Any, *, hashes: bool) -> dict[str, list[Any]]:
    """List dtype, shape and hash of each array by path."""
    arrays = {
        path_name(path): jax.random.key_data(x)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    found = digests([*arrays.values()]) if hashes else [None] * len(arrays)
    return {
        path: [str(x.dtype), list(x.shape), value]
        for (path, x), value in zip(arrays.items(), found, strict=True)
    }
