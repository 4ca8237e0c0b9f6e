"""One network trained on several domains at once: the backbone of the joint setting."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftn_jax.core import make_delta, materialize
from ftn_jax.data import (
    Batch,
    Domain,
    Source,
    Transform,
    prefetch,
    steps_per_epoch,
    train_batches,
)
from ftn_jax.fit import OnLog, fit
from ftn_jax.method import Backbone
from ftn_jax.metrics import Sums, classification, no_logit
from ftn_jax.nodes.replace import Replace
from ftn_jax.presets import fine_tuning
from ftn_jax.resume import StateFolder
from ftn_jax.train import Loss, Task, TaskState, make_train_step


@dataclass(frozen=True)
class JointRecipe:
    """How to train the joint network; the defaults are those of TAPS's code.

    Source: TAPS (arXiv 2203.16708), its published `train_joint`; the FTN papers
    (arXiv 2310.06124, supplement, section D) give no recipe of their own.

    Attributes:
        epochs: an epoch ends when the smallest domain has been seen.
        batch_size: images of each domain in a step.
        rate: of Nesterov SGD with momentum 0.9, cosine.
        weight_decay: of every weight.
    """

    epochs: int = 60
    batch_size: int = 12
    rate: float = 1e-2
    weight_decay: float = 0.0


class Joint(NamedTuple):
    """The outcome.

    Attributes:
        backbone: with the joint weights and running statistics.
        tasks: by domain, the task that runs the network with the head trained for it.
    """

    backbone: Backbone
    tasks: dict[str, Task]


def train_joint(
    backbone: Backbone,
    domains: Sequence[Domain],
    recipe: JointRecipe,
    *,
    transform: Transform,
    seed: int,
    folder: StateFolder,
    on_log: OnLog | None = None,
) -> Joint:
    """Train all weights on all domains together, with a head for each.

    A step takes a batch of every domain. They are run one after another, so that
    BatchNorm normalizes each by its own statistics, while one set of running statistics
    takes them all in; the gradients of the domains' mean losses are added up.

    Args:
        backbone: where to start; its layers name the head.
        domains: at least two.
        recipe: how to train.
        transform: of the training images.
        seed: of heads, order and augmentation.
        folder: keeps the state, at the end too, so that no run is repeated.
        on_log: called with the step and the means since the last call.

    Raises:
        ValueError: for fewer than two domains, or in a job of several processes.
        NonFiniteLoss: see `ftn_jax.fit.fit`.
    """
    if len(domains) < 2:
        raise ValueError(
            f"joint training needs two domains or more, got {len(domains)}"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"joint training runs in one process, found {jax.process_count()}: start "
            "the same command once"
        )
    classes, parts = [d.num_classes for d in domains], len(domains)
    sources = [d.train for d in domains]
    steps = recipe.epochs * joint_epoch(sources, batch_size=recipe.batch_size)
    method = fine_tuning(backbone.layers, classes=sum(classes))
    tx = optax.chain(
        optax.scale(parts),  # the step averages over examples; the recipe adds up
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(
            optax.cosine_decay_schedule(recipe.rate, steps), momentum=0.9, nesterov=True
        ),
    )
    step = make_train_step(
        backbone.network(method.classes),
        tx,
        loss=joint_loss(classes),
        accumulate=parts,
    )
    delta_key, key = jax.random.split(jax.random.key(seed))
    delta = make_delta(delta_key, backbone.shared, method.rules_for(backbone.shared))
    state = TaskState.create(delta, backbone.model_state, tx=tx, key=key)
    state = fit(
        jax.jit(step, donate_argnums=1),
        backbone.shared,
        folder.restore(state) or state,
        lambda start: prefetch(
            joint_batches(
                sources,
                batch_size=recipe.batch_size,
                transform=transform,
                classes=classes,
                seed=seed,
                start_step=start,
            )
        ),
        steps=steps,
        on_log=on_log,
        save=folder.save,
    )
    folder.save(state)
    folder.close()
    params = materialize(backbone.shared, state.task.delta)
    joint = backbone._replace(shared=params, model_state=state.task.model_state)
    ends = np.cumsum(classes)
    tasks = {
        domain.name: _own_head(joint, slice(int(end) - domain.num_classes, int(end)))
        for domain, end in zip(domains, ends, strict=True)
    }
    return Joint(joint, tasks)


def joint_epoch(sources: Sequence[Source], *, batch_size: int) -> int:
    """Count the steps until the smallest domain has been seen."""
    return min(steps_per_epoch(source, batch_size=batch_size) for source in sources)


def joint_batches(
    sources: Sequence[Source],
    *,
    batch_size: int,
    transform: Transform,
    classes: Sequence[int],
    seed: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Yield batches of all domains: example n is of domain n modulo their number.

    `make_train_step` with as many micro-batches as domains then takes them one by one.
    Every domain goes through its own epochs, so that no image of a large one is left
    out for good. A label counts from its domain's first output; `"domain"` says which.

    Args:
        sources: of the domains, in order.
        batch_size: images of each domain.
        transform: of every image.
        classes: of each domain.
        seed: fixes order and augmentation.
        start_step: batches to leave out at the start.
    """
    streams = [
        train_batches(
            source,
            batch_size=batch_size,
            transform=transform,
            seed=len(sources) * seed + n,
            start_step=start_step,
        )
        for n, source in enumerate(sources)
    ]
    firsts = np.cumsum([0, *classes[:-1]])
    for parts in zip(*streams, strict=True):
        for n, part in enumerate(parts):
            part["label"] = part["label"] + np.int32(firsts[n])
            part["domain"] = np.full(batch_size, n, np.int32)
        yield {
            name: np.stack([part[name] for part in parts], axis=1).reshape(
                -1, *parts[0][name].shape[1:]
            )
            for name in parts[0]
        }


def joint_loss(classes: Sequence[int]) -> Loss:
    """Make the loss whose softmax runs over the outputs of an example's own domain."""
    owner = np.repeat(np.arange(len(classes)), classes)

    def loss(logits: Any, batch: Mapping[str, Any]) -> Sums:
        own = owner[None, :] == batch["domain"][:, None]
        return classification(jnp.where(own, logits, no_logit(logits.dtype)), batch)

    return loss


def _own_head(joint: Backbone, outputs: slice) -> Task:
    """Cut a domain's outputs out of the joint head."""
    rules = {
        joint.layers.head: lambda key, w: Replace(w[..., outputs], group="head"),
    }
    return Task(make_delta(jax.random.key(0), joint.shared, rules), joint.model_state)
