"""Which of a run's states is kept: the last, or the best epoch's."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ftn_jax.resume import StateFolder
from ftn_jax.train import Task, TaskState

Select = Literal["last", "best_on_validation", "best_on_test"]
"""`last` needs no look at other data. `best_on_test` is what TAPS's and Piggyback's
code do, and so perhaps the FTN papers: it flatters every method, the noisier the more,
and is for comparison with their numbers alone."""


Collect = Callable[[TaskState], TaskState]


def _as_it_is(state: TaskState) -> TaskState:
    return state


class Best:
    """Keeps the best of the states it is shown; the first of equals.

    What is kept lies on disk too, so that an interrupted run ends as a whole one.
    """

    def __init__(
        self,
        score: Callable[[Task], Mapping[str, float]],
        better: Callable[[Mapping[str, float], Mapping[str, float]], bool],
        folder: StateFolder | None = None,
    ) -> None:
        """Say what is good.

        Args:
            score: looks at a task.
            better: `(new, old)`: whether the first scores are the better ones.
            folder: of this run alone.
        """
        self._score, self._better, self._folder = score, better, folder
        self._scores: Mapping[str, float] | None = None
        self._state: TaskState | None = None

    def resume(self, like: TaskState, *, collect: Collect = _as_it_is) -> None:
        """Go on from what an interrupted run had kept.

        Args:
            like: a state as `see` is given them.
            collect: see there.
        """
        state = self._folder and self._folder.restore(like)
        if state:
            self._state = collect(state)
            self._scores = self._score(self._state.task)

    def see(
        self, state: TaskState, *, collect: Collect = _as_it_is
    ) -> Mapping[str, float]:
        """Score a state; keep a copy of the best, since the next step donates it.

        Args:
            state: as the devices hold it.
            collect: brings it whole to one of them, where it is spread over several.
        """
        whole = collect(state)
        scores: Any = self._score(whole.task)
        if self._scores is None or self._better(scores, self._scores):
            self._state, self._scores = jax.tree.map(jnp.copy, whole), scores
            if self._folder:
                # Written before the run goes on: a later state may not be on disk
                # without the best before it.
                self._folder.save(state, wait=True)
        return scores

    def close(self) -> TaskState:
        """Let go of the folder; return the best state.

        Raises:
            RuntimeError: if none was shown.
        """
        if self._folder:
            self._folder.close()
        if self._state is None:
            raise RuntimeError("no state was shown")
        return self._state
