"""Invert a generator: fit latents to images, alone or together with a delta."""

import time
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Float, UInt8

from ftn_jax import metrics
from ftn_jax.apply import Apply
from ftn_jax.core import Rules, make_delta
from ftn_jax.data import ArraySource, Normalize, eval_batches, train_batches
from ftn_jax.fit import OnLog, fit
from ftn_jax.forward import Forward, merged
from ftn_jax.latents import GROUP, beside, make_latents, tables, with_latents
from ftn_jax.optimizer import Schedule, make_optimizer
from ftn_jax.reconstruction import p_norm
from ftn_jax.resume import StateFolder
from ftn_jax.selection import Best
from ftn_jax.train import Task, TaskState, make_eval_step, make_train_step

RANGE = Normalize(mean=(0.5,), std=(0.5,))
"""From pixels to the generator's range, -1 to 1."""


_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Inversion:
    """How to fit latents, and a delta beside them.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        rates: Adam's peak rate of each optimizer group; latents are `"latents"`.
        schedule: of every rate, over all steps.
        warmup_steps: steps of linear warm-up from zero. Adam's first steps move every
            factor at its full rate at once; without a warm-up they can leave a
            generator that draws one image for all latents, which has no gradient.
        p: exponent of the loss.
        frozen_stats: whether BatchNorm uses the generator's running statistics; if
            not, an image depends on those it is drawn with.
        look_every: steps between two looks at the mean PSNR of all images; the best
            state seen is kept, of which the start is one.
        patience: stop when so many looks in a row brought no gain; 0 never stops.
        min_gain: what counts as a gain, dB.
    """

    steps: int
    batch_size: int
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"factors": 0.05, "linear": 1e-3, GROUP: 0.05}
    )
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    p: float = 2.0
    frozen_stats: bool = True
    look_every: int = 20
    patience: int = 0
    min_gain: float = 0.02


class Inverted(NamedTuple):
    """What an inversion ended with.

    Attributes:
        task: delta over the generator and tables of latents, see `ftn_jax.latents`.
        curve: at every look, the steps taken and the images' mean PSNR (dB).
        steps: steps taken; the task is the best of the curve.
        seconds: wall-clock of this call.
    """

    task: Task
    curve: list[tuple[int, float]]
    steps: int
    seconds: float

    @property
    def reached(self) -> tuple[int, float]:
        """The step of the task that was kept, and its images' mean PSNR (dB)."""
        return max(self.curve, key=lambda point: point[1])


class Inverter:
    """Fit latents (and a delta) to sets of images; compiled once for all of them.

    Sets of one size share a program, and so do generators of one shape: the generator
    is an argument.
    """

    def __init__(
        self,
        apply: Apply,
        rules: Rules,
        recipe: Inversion,
        *,
        forward: Forward = merged,
    ) -> None:
        """Prepare the jitted steps.

        Args:
            apply: the generator; it finds the rows of its latents in the batch, by
                their table's name.
            rules: of the delta over the generator; `{}` trains the latents alone.
            recipe: how to fit.
            forward: how to run the generator on `(shared, delta)`.

        Raises:
            ValueError: if `p` or the schedule is out of range.
        """
        self.rules, self.recipe = rules, recipe
        loss, run = p_norm(recipe.p), with_latents(forward)
        step = make_train_step(
            apply,
            self._optimizer(),
            loss=loss,
            forward=run,
            frozen_stats=recipe.frozen_stats,
        )
        self._step = jax.jit(step, donate_argnums=1)
        self._look = jax.jit(make_eval_step(apply, metrics=loss, forward=run))

    def at(self, rates: Mapping[str, float], *, steps: int | None = None) -> Self:
        """Return the same inverter at other peak rates of the same groups.

        Rates, and over how many steps they fall, are numbers in the optimizer's state:
        the two share their compiled steps.
        """
        other = copy(self)
        other.recipe = replace(
            self.recipe, rates=rates, steps=steps or self.recipe.steps
        )
        return other

    def _optimizer(self) -> Any:
        recipe = self.recipe
        return make_optimizer(
            recipe.rates,
            steps=recipe.steps,
            schedule=recipe.schedule,
            warmup_steps=recipe.warmup_steps,
            adam=tuple(recipe.rates),
        )

    def start(
        self,
        shared: Any,
        model_state: Any,
        latents: Mapping[str, Float[jax.Array, "n _"]],
        *,
        seed: int,
    ) -> TaskState:
        """Make the state before the first step."""
        delta_key, key = jax.random.split(jax.random.key(seed))
        delta = beside(
            make_delta(delta_key, shared, self.rules), make_latents(**latents)
        )
        return TaskState.create(delta, model_state, tx=self._optimizer(), key=key)

    def run(
        self,
        shared: Any,
        model_state: Any,
        images: UInt8[np.ndarray, "n h w 3"],
        latents: Mapping[str, Float[jax.Array, "n _"]],
        *,
        seed: int = 0,
        folder: StateFolder | None = None,
        on_log: OnLog | None = None,
    ) -> Inverted:
        """Fit the images.

        Args:
            shared: the generator.
            model_state: its running statistics.
            images: of the generator's size.
            latents: where each table starts, one row for each image.
            seed: of the delta's init and the order of images.
            folder: keeps the state, so that the run can be interrupted.
            on_log: called with the step and the means since the last call.

        Raises:
            ValueError: if images are not uint8, or their number or size does not fit.
            NonFiniteLoss: see `ftn_jax.fit.fit`.
        """
        source = _source(images, latents)
        recipe, began = self.recipe, time.perf_counter()
        state, progress = self.start(shared, model_state, latents, seed=seed), {}
        if folder:
            state, progress = folder.restore_with_progress(state) or (state, progress)
        curve: list[tuple[int, float]] = [(s, v) for s, v in progress.get("curve", [])]

        best = Best(
            lambda task: self._score(shared, task, source),
            lambda new, old: new["psnr"] > old["psnr"],
            folder and folder.of("best"),
        )
        best.resume(state)

        def look(state: TaskState) -> None:
            if not curve or curve[-1][0] < int(state.step):
                curve.append((int(state.step), best.see(state)["psnr"]))

        def save(state: TaskState, *, progress: Mapping[str, Any], wait: bool) -> None:
            assert folder
            folder.save(state, progress={**progress, "curve": curve}, wait=wait)

        saved = time.monotonic()
        if int(state.step) % recipe.look_every == 0:
            look(state)
        while int(state.step) < recipe.steps and not self._stops(curve):
            # From look to look: what was seen at the last decides on going on.
            ahead = recipe.look_every - int(state.step) % recipe.look_every
            state = fit(
                self._step,
                shared,
                state,
                lambda first: _indexed(source, recipe.batch_size, seed, first),
                steps=min(int(state.step) + ahead, recipe.steps),
                on_log=on_log,
                log_every=recipe.look_every,
                save=save if folder else None,
                progress=progress,
            )
            progress = {}  # of an unfinished look
            look(state)
            if folder and time.monotonic() - saved > _SAVE_EVERY_S:
                save(state, progress={}, wait=False)
                saved = time.monotonic()
        if folder:
            save(state, progress={}, wait=True)
            folder.close()
        seconds = time.perf_counter() - began
        return Inverted(best.close().task, curve, int(state.step), seconds)

    def _score(self, shared: Any, task: Task, source: ArraySource) -> dict[str, float]:
        """Measure all images, the last batch padded."""
        total = None
        for batch in _renamed(
            eval_batches(source, batch_size=self.recipe.batch_size, transform=RANGE)
        ):
            total = metrics.add(total, self._look(shared, task, batch))
        return metrics.means(total or {})

    def _stops(self, curve: list[tuple[int, float]]) -> bool:
        """Tell whether the last `patience` looks all were without a gain."""
        patience = self.recipe.patience
        values = [value for _, value in curve]
        if not patience or len(values) <= patience:
            return False
        before, last = values[:-patience], values[-patience:]
        return max(last) < max(before) + self.recipe.min_gain


class Drawer:
    """Draw the images that a task's latents stand for; compiled once for all tasks."""

    def __init__(self, apply: Apply, *, forward: Forward = merged) -> None:
        """Prepare the jitted step."""
        self._step = jax.jit(
            make_eval_step(apply, metrics=None, forward=with_latents(forward))
        )

    def __call__(
        self, shared: Any, task: Task, *, batch_size: int = 64
    ) -> Float[np.ndarray, "n h w 3"]:
        """Return the images of all rows, in order.

        Args:
            shared: the generator that the task's delta belongs to.
            task: delta and latents.
            batch_size: images per step; the last batch is filled with the first rows.
        """
        n = len(next(iter(tables(task.delta).values())))
        drawn = [
            self._step(shared, task, {"index": (np.arange(batch_size) + first) % n})
            for first in range(0, n, batch_size)
        ]
        return np.concatenate([np.asarray(x) for x in drawn])[:n]


def _source(images: Any, latents: Mapping[str, Any]) -> ArraySource:
    """Label each image with its place, which is its row in the tables."""
    for name, table in latents.items():
        if len(table) != len(images):
            raise ValueError(
                f"{len(images)} images but {len(table)} rows of {name!r}: every image "
                "has a row of its own"
            )
    return ArraySource(images, np.arange(len(images)))


def _indexed(
    source: ArraySource, batch_size: int, seed: int, first: int
) -> Iterator[Mapping[str, Any]]:
    return _renamed(
        train_batches(
            source,
            batch_size=batch_size,
            transform=RANGE,
            seed=seed,
            start_step=first,
        )
    )


def _renamed(stream: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    """Call what the source holds as labels by its name here."""
    for batch in stream:
        yield {"index": batch.pop("label"), **batch}


def in_range(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h w 3"]:
    """Bring pixels to the generator's range."""
    places = np.arange(len(images))
    stream = eval_batches(
        ArraySource(images, places), batch_size=len(images), transform=RANGE
    )
    return next(stream)["image"]
