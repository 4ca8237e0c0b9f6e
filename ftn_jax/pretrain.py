"""Train a backbone on a domain of its own, where no checkpoint is at hand."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.atomic import write_atomic
from ftn_jax.command import progress_bar
from ftn_jax.core import materialize
from ftn_jax.data import Domain, Transform
from ftn_jax.method import Backbone, Method
from ftn_jax.paths import path_name
from ftn_jax.resume import StateFolder


def pretrain(
    start: Backbone,
    method: Method,
    recipe: Recipe,
    domain: Domain,
    *,
    train_transform: Transform,
    eval_transform: Transform,
    path: Path,
    seed: int = 0,
) -> Backbone:
    """Train every weight of a network on one domain, once.

    Pretraining is fine-tuning from a random start. The result lies at `path`, a
    safetensors file of parameters and state; where there is one it is read. A run that
    was interrupted goes on from its last state, kept beside it. The accuracy on the
    domain's test images is printed.

    Args:
        start: the network with fresh values.
        method: the fine-tuning preset of its layers, for the domain's classes.
        recipe: how to train.
        domain: what to train on.
        train_transform: augmentation and normalisation.
        eval_transform: the same without randomness.
        path: of the result. Name it after all that it depends on.
        seed: of the order of examples and their augmentation.

    Returns:
        `start` with the trained values.

    Raises:
        NonFiniteLoss: see `ftn_jax.fit.fit`.
        ValueError: if the file that is there holds another network.
    """
    if not path.exists():
        adaptation = Adaptation(
            start, method, recipe, domain.train, transform=train_transform
        )
        folder = StateFolder(path.with_suffix(".state"))
        with progress_bar(
            "pretraining", steps=adaptation.steps, batch_size=recipe.batch_size
        ) as on_log:
            task = adaptation.run(seed, folder=folder, on_log=on_log).task
        evaluator = Evaluator(
            start, classes=domain.num_classes, transform=eval_transform
        )
        accuracy = evaluator.score(task, domain.test)["accuracy"]
        print(f"backbone: {accuracy:.1%} on {domain.name}", flush=True)
        trained = {"params": materialize(start.shared, task.delta), **task.model_state}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({k: np.asarray(x) for k, x in _named(trained)}))
        folder.clear()
    found, fresh = load_file(path), {"params": start.shared, **start.model_state}
    there = {name: x.shape for name, x in found.items()}
    expected = {name: x.shape for name, x in _named(fresh)}
    for name in sorted({*there, *expected}):
        if there.get(name) != expected.get(name):
            raise ValueError(
                f"{path} is of another network: {name} has shape {there.get(name)}, "
                f"expected {expected.get(name)} (None: it is not there); move it away "
                "or choose another --workdir"
            )
    leaves = [jnp.asarray(found[name]) for name in expected]
    state = jax.tree.structure(fresh).unflatten(leaves)
    params = state.pop("params")
    return start._replace(shared=params, model_state=state)


def _named(variables: dict[str, Any]) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return [(path_name(path), x) for path, x in leaves]
