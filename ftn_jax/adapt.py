"""Adapt one backbone to one domain by one method: the papers' unit of work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ftn_jax import metrics
from ftn_jax.apply import Apply
from ftn_jax.core import make_delta, materialize
from ftn_jax.data import (
    Source,
    Transform,
    eval_batches,
    prefetch,
    steps_per_epoch,
    train_batches,
)
from ftn_jax.fit import OnLog, fit
from ftn_jax.optimizer import Schedule, make_optimizer
from ftn_jax.presets import Layers, Method
from ftn_jax.resume import StateFolder
from ftn_jax.train import Task, TaskState, make_eval_step, make_train_step


class Backbone(NamedTuple):
    """A pretrained network, frozen.

    Attributes:
        network: `classes -> Apply`: how to run it with a head of so many outputs. A
            Linen module checks the shapes of its parameters, so each task runs the
            module that was built for its number of classes.
        shared: its parameters.
        model_state: its mutable collections, where every task starts from.
        layers: which of its paths are kernels, norms and head.
    """

    network: Callable[[int], Apply]
    shared: Any
    model_state: Any
    layers: Layers


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
    ) -> None:
        """Prepare the optimizer and the jitted step.

        Args:
            backbone: the frozen network.
            method: rules of the delta, from `ftn_jax.presets` or your own.
            recipe: how to train.
            source: training examples.
            transform: their augmentation and normalisation.
        """
        self.backbone, self.method, self.recipe = backbone, method, recipe
        self.source, self.transform = source, transform
        per_epoch = steps_per_epoch(source, batch_size=recipe.batch_size)
        self.steps = recipe.epochs * per_epoch
        self.tx = make_optimizer(
            recipe.rates,
            steps=self.steps,
            schedule=recipe.schedule,
            warmup_steps=round(recipe.warmup_epochs * per_epoch),
            weight_decay={
                g: decay for g, decay in recipe.weight_decay.items() if decay
            },
            clip_norm=recipe.clip_norm,
        )
        step = make_train_step(
            backbone.network(method.classes),
            self.tx,
            frozen_stats=method.frozen_stats,
            compute_dtype=recipe.compute_dtype,
            accumulate=recipe.accumulate,
        )
        self.step = jax.jit(step, donate_argnums=1)

    def start(self, seed: int) -> TaskState:
        """Make the state before the first step."""
        delta_key, train_key = jax.random.split(jax.random.key(seed))
        delta = make_delta(delta_key, self.backbone.shared, self.method.rules)
        return TaskState.create(
            delta, self.backbone.model_state, tx=self.tx, key=train_key
        )

    def run(
        self,
        seed: int,
        *,
        folder: StateFolder | None = None,
        on_log: OnLog | None = None,
    ) -> TaskState:
        """Train; go on from `folder`'s last state where there is one.

        Args:
            seed: of the delta's init, the order of examples and their augmentation.
            folder: keeps the state, so that the run can be interrupted.
            on_log: called with the step and the means since the last call.

        Raises:
            NonFiniteLoss: see `ftn_jax.fit.fit`.
        """
        state = self.start(seed)
        if folder:
            state = folder.restore(state) or state

        def batches(start_step: int) -> Any:
            stream = train_batches(
                self.source,
                batch_size=self.recipe.batch_size,
                transform=self.transform,
                seed=seed,
                start_step=start_step,
            )
            return prefetch(stream)

        return fit(
            self.step,
            self.backbone.shared,
            state,
            batches,
            steps=self.steps,
            on_log=on_log,
            save=folder.save if folder else None,
        )


class Evaluator:
    """Evaluate a backbone's tasks of one size of head."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        classes: int,
        transform: Transform,
        batch_size: int = 256,
    ) -> None:
        """Prepare the jitted steps.

        Args:
            backbone: the frozen network.
            classes: number of the tasks' classes.
            transform: resizing and normalisation, nothing random.
            batch_size: images per step; the last batch is padded and masked.
        """
        self.shared, self.transform = backbone.shared, transform
        self.batch_size = batch_size
        apply = backbone.network(classes)
        self._outputs = jax.jit(make_eval_step(apply, metrics=None))

    def outputs(self, task: Task, source: Source) -> np.ndarray:
        """Return the network's outputs for every example, in order."""
        params, merged = self._merge(task)
        stream = eval_batches(
            source, batch_size=self.batch_size, transform=self.transform
        )
        return np.concatenate(
            [
                np.asarray(self._outputs(params, merged, batch))[batch["mask"] > 0]
                for batch in prefetch(stream)
            ]
        )

    def score(self, task: Task, source: Source) -> dict[str, float]:
        """Return the mean loss (nats) and the accuracy over all of the source."""
        return score(self.outputs(task, source), source)

    def _merge(self, task: Task) -> tuple[Any, Task]:
        """Merge once for all batches; what runs then is the same for every method."""
        params = materialize(self.shared, task.delta)
        nothing = jax.tree.map(lambda _: None, params)
        return params, Task(nothing, task.model_state)


def score(logits: Float[np.ndarray, "n classes"], source: Source) -> dict[str, float]:
    """Return the mean loss (nats) and the accuracy of a source's logits."""
    labels = jnp.asarray(source.labels)
    return metrics.means(metrics.classification(jnp.asarray(logits), {"label": labels}))
