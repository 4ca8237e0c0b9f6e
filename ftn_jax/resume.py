"""Keep a training state on disk with Orbax, so that a stopped run goes on."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax

from ftn_jax.train import TaskState


class StateFolder:
    """The last states of one training run, in a folder of their own.

    Saving is atomic (Orbax): a crash while saving leaves the state before. The tree
    holds the task, the optimizer's state, the step and the PRNG key; the backbone is
    never part of it.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 1) -> None:
        """Name the folder; it is made at the first save.

        Args:
            directory: the folder, used by this run alone.
            keep: how many of the last states stay.
        """
        self.directory = Path(directory).absolute()
        self.keep = keep

    def of(self, name: str) -> "StateFolder":
        """Return a folder beside this one, for a part of the run."""
        place = self.directory.with_name(f"{self.directory.name}-{name}")
        return StateFolder(place, keep=self.keep)

    def save(self, state: TaskState) -> None:
        """Write the state, unless it is there."""
        with self._manager() as manager:
            step = int(state.step)
            if step in manager.all_steps():
                if state.finite:
                    return
                manager.delete(step)  # what was saved before the next step failed
            manager.save(step, args=_standard_save(state))

    def restore(self, like: TaskState) -> TaskState | None:
        """Read the last state back into `like`'s structure; `None` if there is none.

        Raises:
            ValueError: if the saved state has another structure or other shapes,
                because the run's configuration changed.
        """
        if not self.directory.is_dir():
            return None
        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            self._check(manager.item_metadata(step), like)
            return manager.restore(step, args=_standard_restore(like))

    def _check(self, saved: Any, like: TaskState) -> None:
        found, expected = _shapes(getattr(saved, "tree", saved)), _shapes(like)
        odd = [
            f"{path}: found {found.get(path)}, expected {expected.get(path)}"
            for path in sorted({*found, *expected})
            if found.get(path) != expected.get(path)
        ]
        if odd:
            raise ValueError(
                f"{self.directory} holds a state of another configuration "
                f"({len(odd)} differences: {'; '.join(odd[:3])}); delete the folder to "
                "start this run afresh"
            )

    def clear(self) -> None:
        """Delete the folder, when the run is done."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(
            self.directory,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, enable_async_checkpointing=False
            ),
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """List shapes by path, but for keys, whose words Orbax counts as an axis."""
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {p: shape for p, shape in shapes.items() if p.split("/")[-1] != "key"}


def _standard_save(state: TaskState) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.StandardSave(state)  # pyright: ignore[reportCallIssue]


def _standard_restore(like: TaskState) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.StandardRestore(like)  # pyright: ignore[reportCallIssue]
