"""Adapt one backbone to one domain by one method: the papers' unit of work."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ftn_jax.core import make_delta, materialize
from ftn_jax.data import (
    Batch,
    Source,
    Transform,
    eval_batches,
    prefetch,
    steps_per_epoch,
    train_batches,
)
from ftn_jax.fit import OnLog, fit
from ftn_jax.forward import Forward, merged
from ftn_jax.measure import CLASSIFICATION, Measure
from ftn_jax.method import Backbone, Method
from ftn_jax.optimizer import Schedule, make_optimizer
from ftn_jax.parallel import Layout
from ftn_jax.resume import StateFolder
from ftn_jax.selection import Best
from ftn_jax.train import (
    Penalty,
    Task,
    TaskState,
    make_eval_step,
    make_train_step,
)


@dataclass(frozen=True)
class Recipe:
    """How to train a task.

    Attributes:
        epochs: passes over the training data.
        batch_size: images per step.
        rates: peak learning rate of each optimizer group.
        schedule: of every rate, over all steps.
        warmup_epochs: of linear warm-up.
        weight_decay: by optimizer group.
        adam: the groups that Adam trains; all others get SGD.
        clip_norm: global norm that gradients are clipped to.
        compute_dtype: of the network's arithmetic, e.g. `jnp.bfloat16`.
        accumulate: micro-batches per step.
    """

    epochs: int
    batch_size: int
    rates: Mapping[str, float]
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    adam: tuple[str, ...] = ("factors", "masks")
    clip_norm: float | None = None
    compute_dtype: Any = None
    accumulate: int = 1


class Adaptation:
    """Train a task's delta on one source; compiled once for all seeds.

    Example:
        `Adaptation(backbone, ftn(RESNET, classes=10, rank=8), recipe, source,
        transform=transform).run(seed=0)` returns the trained `TaskState`.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        recipe: Recipe,
        source: Source,
        *,
        transform: Transform,
        measure: Measure = CLASSIFICATION,
        forward: Forward = merged,
        device: Transform | None = None,
        workers: int = 0,
        layout: Layout | None = None,
    ) -> None:
        """Prepare the optimizer and the jitted step of each of the method's stages.

        Args:
            backbone: the frozen network, with what the method reads beside it.
            method: rules of the delta, from `ftn_jax.presets` or your own.
            recipe: how to train.
            source: training examples.
            transform: their augmentation and normalisation.
            measure: has the loss.
            forward: how to run the network on `(shared, delta)`.
            device: steps of the transform that run on the accelerator.
            workers: processes that make the batches; 0 is a thread of this one.
            layout: the devices to train on; default: the first one.

        Raises:
            ValueError: if the shares of the method's stages do not add up to 1, or
                the batch cannot be split over the devices.
        """
        self.backbone, self.method, self.recipe = backbone, method, recipe
        self.source, self.transform, self.layout = source, transform, layout
        self.device, self.workers = device, workers
        self._shard = layout.rows(recipe.batch_size) if layout else (0, 1)
        self._per_epoch = steps_per_epoch(source, batch_size=recipe.batch_size)
        self.steps = recipe.epochs * self._per_epoch
        shares = [stage.share for stage in method.stages]
        if min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"the stages' shares must be positive and add up to 1, found {shares}"
            )
        ends = [round(self.steps * x) for x in accumulate(shares)]
        self._bounds = list(zip([0, *ends], ends, strict=False))
        if any(first == last for first, last in self._bounds):
            raise ValueError(
                f"{self.steps} steps are too few for the method's stages, which have "
                f"shares of {shares}; train longer or in smaller batches"
            )
        apply = backbone.network(method.classes)
        self._steps = []
        for stage, (first, _) in enumerate(self._bounds):
            make = partial(
                make_train_step,
                apply,
                self._optimizer(stage),
                loss=measure.loss,
                penalty=self._penalty(first),
                forward=forward,
                frozen_stats=method.frozen_stats,
                compute_dtype=recipe.compute_dtype,
                accumulate=recipe.accumulate,
            )
            self._steps.append(
                layout.train_step(make) if layout else jax.jit(make(), donate_argnums=1)
            )

    def at(self, rates: Mapping[str, float]) -> Self:
        """Return the same training at other peak rates of the same groups.

        Rates are numbers in the optimizer's state: the two share their compiled steps.
        """
        other = copy(self)
        other.recipe = replace(self.recipe, rates=rates)
        return other

    def _optimizer(self, stage: int) -> Any:
        recipe, (first, last) = self.recipe, self._bounds[stage]
        factor = self.method.stages[stage].rate
        return make_optimizer(
            {group: factor * rate for group, rate in recipe.rates.items()},
            steps=last - first,
            schedule=recipe.schedule,
            warmup_steps=round(recipe.warmup_epochs * self._per_epoch),
            weight_decay={
                g: decay for g, decay in recipe.weight_decay.items() if decay
            },
            adam=recipe.adam,
            clip_norm=recipe.clip_norm,
        )

    def _penalty(self, first: int) -> Penalty | None:
        penalty = self.method.penalty
        if penalty is None:
            return None
        return lambda delta, step: penalty(delta, (first + step) / self.steps)

    def start(self, seed: int) -> TaskState:
        """Make the state before the first step."""
        delta_key, _ = jax.random.split(jax.random.key(seed))
        shared = self.backbone.shared
        delta = make_delta(delta_key, shared, self.method.rules_for(shared))
        return self._begin(seed, 0, Task(delta, self.backbone.model_state))

    def _begin(self, seed: int, stage: int, task: Task) -> TaskState:
        _, key = jax.random.split(jax.random.key(seed))
        change = self.method.stages[stage].change
        return TaskState.create(
            change(task.delta) if change else task.delta,
            task.model_state,
            tx=self._optimizer(stage),
            key=jax.random.fold_in(key, stage) if stage else key,
        )

    def run(
        self,
        seed: int,
        *,
        folder: StateFolder | None = None,
        keep: bool = False,
        task: Task | None = None,
        best: Best | None = None,
        on_log: OnLog | None = None,
    ) -> TaskState:
        """Train; go on from `folder`'s last state where there is one.

        Args:
            seed: of the delta's init, the order of examples and their augmentation.
            folder: keeps the state, so that the run can be interrupted.
            keep: also write the finished state there.
            task: where to start, instead of the method's rules and init.
            best: looks at the state after every epoch of the last stage, and says
                which is returned; without it that is the last.
            on_log: called with the step and the means since the last call.

        Raises:
            NonFiniteLoss: see `ftn_jax.fit.fit`.
        """
        state = self._begin(seed, 0, task) if task else self.start(seed)
        shared, layout = self.backbone.shared, self.layout
        watched: dict[str, Any] = {"collect": layout.collect} if layout else {}
        if layout:
            shared = layout.place(shared)
        for stage, (first, last) in enumerate(self._bounds):
            if stage:
                state = self._begin(seed, stage, state.task)
            if layout:
                state = layout.place(state)
            watching = best if last == self.steps else None
            if watching:
                watching.resume(state, **watched)
            place = folder and (folder if not stage else folder.of(f"stage{stage}"))
            state, progress = (place and place.restore_with_progress(state)) or (
                state,
                None,
            )
            for end in self._ends(first + int(state.step), last, each=bool(watching)):
                state = fit(
                    self._steps[stage],
                    shared,
                    state,
                    lambda start, first=first: self._batches(seed, first + start),
                    steps=end - first,
                    on_log=_shifted(on_log, first),
                    save=place.save if place else None,
                    progress=progress,
                )
                progress = None
                if place and (keep or end < self.steps):
                    place.save(state)  # the next epoch or stage starts here
                if watching:
                    watching.see(state, **watched)
            if place:
                place.close()
            if layout:
                state = layout.collect(state)
        return best.close() if best else state

    def _ends(self, done: int, last: int, *, each: bool) -> list[int]:
        """List where to stop: the last step, or each epoch's, one just reached too."""
        epoch = steps_per_epoch(self.source, batch_size=self.recipe.batch_size)
        first = -(-max(done, 1) // epoch) * epoch
        return [*range(first, last, epoch), last] if each else [last]

    def _batches(self, seed: int, start_step: int) -> Any:
        stream = train_batches(
            self.source,
            batch_size=self.recipe.batch_size,
            transform=self.transform,
            seed=seed,
            start_step=start_step,
            device=self.device,
            workers=self.workers,
            shard=self._shard,
        )
        return prefetch(_put(self.layout, stream) if self.layout else stream)


def _put(
    layout: Layout, stream: Generator[Batch, None, None]
) -> Generator[Any, None, None]:
    """Give every device its part of each batch."""
    with closing(stream):
        for batch in stream:
            yield layout.put(batch)


def _shifted(on_log: OnLog | None, first: int) -> OnLog | None:
    """Let a stage's log count the steps of those before."""
    return on_log and (lambda step, means: on_log(first + step, means))


class Tested(NamedTuple):
    """What a look at the test data gives.

    Attributes:
        scores: the measure's numbers.
        outputs_sha256: of all outputs, in order.
    """

    scores: dict[str, Any]
    outputs_sha256: str


class Evaluator:
    """Evaluate a backbone's tasks of one size of head and one measure."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        classes: int,
        transform: Transform,
        batch_size: int = 256,
        measure: Measure = CLASSIFICATION,
        workers: int = 0,
        layout: Layout | None = None,
    ) -> None:
        """Prepare the jitted steps.

        Args:
            backbone: the frozen network.
            classes: number of the tasks' classes.
            transform: resizing and normalisation, nothing random.
            batch_size: images per step; the last batch is padded and masked.
            measure: what the outputs are judged by.
            workers: processes that make the batches; 0 is a thread of this one.
            layout: the devices to run on; default: the first one. Every process of a
                job reads all examples, and has all outputs.
        """
        self.shared, self.transform = backbone.shared, transform
        self.batch_size, self.measure = batch_size, measure
        self.workers, self.layout = workers, layout
        step = make_eval_step(backbone.network(classes), metrics=None)
        self._outputs = layout.eval_step(step) if layout else jax.jit(step)
        if layout:
            self.batch_size = layout.round_up(batch_size)

    def on(self, shared: Any) -> Self:
        """Return the same evaluator, compiled once, on another backbone's values."""
        other = copy(self)
        other.shared = shared
        return other

    def outputs(self, task: Task, source: Source) -> Any:
        """Return the network's outputs for every example, in order."""
        parts = [_real(*pair) for pair in self._run(task, source)]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def score(self, task: Task, source: Source) -> dict[str, Any]:
        """Return the measure's numbers over all of the source."""
        collect = self.measure.collect
        return self.measure.score([collect(*pair) for pair in self._run(task, source)])

    def test(self, task: Task, source: Source) -> Tested:
        """Score, and hash the outputs."""
        seen, collected = sha256(), []
        for outputs, batch in self._run(task, source):
            collected.append(self.measure.collect(outputs, batch))
            for leaf in jax.tree.leaves(_real(outputs, batch)):
                seen.update(leaf.tobytes())
        return Tested(self.measure.score(collected), seen.hexdigest())

    def _run(self, task: Task, source: Source) -> Iterator[tuple[Any, Batch]]:
        # Merged once for all batches; what runs then is the same for every method.
        params = materialize(self.shared, task.delta)
        merged = Task(jax.tree.map(lambda _: None, params), task.model_state)
        layout = self.layout
        if layout:
            params, merged = layout.place((params, merged))
        stream = eval_batches(
            source,
            batch_size=self.batch_size,
            transform=self.transform,
            workers=self.workers,
        )
        for batch in prefetch(stream):
            if layout is None:
                yield self._outputs(params, merged, batch), batch
                continue
            outputs = self._outputs(params, merged, layout.put_whole(batch))
            yield jax.tree.map(np.asarray, outputs), batch


def _real(outputs: Any, batch: Batch) -> Any:
    """Leave out what only fills the batch."""
    return jax.tree.map(lambda x: np.asarray(x)[batch["mask"] > 0], outputs)
