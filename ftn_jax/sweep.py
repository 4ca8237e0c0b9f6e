"""Fill an experiment's table: every domain by every method with every seed."""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ftn_jax.adapt import Adaptation, Backbone, Evaluator, Recipe, score
from ftn_jax.checkpoint import fingerprint, save_task
from ftn_jax.command import progress_bar
from ftn_jax.core import count
from ftn_jax.data import Domain, Source, Transform, describe, digest, split
from ftn_jax.fit import NonFiniteLoss
from ftn_jax.paths import path_name
from ftn_jax.presets import Layers, Method
from ftn_jax.results import Results, Row
from ftn_jax.resume import StateFolder
from ftn_jax.train import TaskState


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
        method: `classes -> Method`.
        rates: learning rates by optimizer group, one mapping for each candidate; the
            first seed tries all, and validation data chooses for every seed.
    """

    method: Callable[[int], Method]
    rates: Sequence[Mapping[str, float]]


class _Trained(NamedTuple):
    state: TaskState
    rates: dict[str, float]
    validation: dict[str, float] | None
    seconds: float
    steps: int


def sweep(
    backbone: Backbone,
    domains: Sequence[Domain],
    contenders: Mapping[str, Contender],
    *,
    results: Results,
    recipe: Recipe,
    train_transform: Transform,
    eval_transform: Transform,
    seeds: Sequence[int] = (0,),
    validation: float = 0.1,
    workdir: Path,
) -> None:
    """Train and test what `results` does not hold yet.

    Validation data is held out of the training data, by class, for every method
    alike; the test data is looked at once, with the rates that validation chose.
    Every finished task is saved under `workdir/tasks/DOMAIN/METHOD/seedN`; a row that
    was interrupted goes on from its last state.

    Args:
        backbone: the frozen network.
        domains: the tasks.
        contenders: rows of the table by name.
        results: where rows go, and which rows are done.
        recipe: how to train; a contender's rates replace its own.
        train_transform: augmentation and normalisation.
        eval_transform: the same without randomness; saved with each task.
        seeds: of init, data order and augmentation.
        validation: share of the training data that is held out; 0 for none.
        workdir: the experiment's folder.

    Raises:
        ValueError: if a contender has several candidate rates and no validation data,
            two names would share a folder, the evaluation transform cannot be written
            down, or `results` holds a row of another backbone or of other data.
        NonFiniteLoss: if no candidate of a row trains to the end.
    """
    for name, contender in contenders.items():
        if len(contender.rates) > 1 and not validation:
            raise ValueError(
                f"{name} has {len(contender.rates)} candidate rates; choosing needs "
                "validation data: set the validation share above 0"
            )
    _check_folders([d.name for d in domains] + [r.task for r in results.rows])
    _check_folders([*contenders, *(r.method for r in results.rows)])
    preprocessing = describe(eval_transform)  # complains before, not after training
    network = "".join(fingerprint(backbone.shared).values())
    for domain in domains:
        inputs = _short(network, digest(domain.train), digest(domain.test))
        evaluator = Evaluator(
            backbone, classes=domain.num_classes, transform=eval_transform
        )
        train, held_out = domain.train, None
        if validation:
            train, held_out = split(domain.train, validation, seed=0)
        for name, contender in contenders.items():
            find = partial(results.find, name, domain.name, inputs=inputs)
            todo = [seed for seed in seeds if not find(seed)]
            if not todo:
                continue
            method = contender.method(domain.num_classes)
            candidates = [
                Adaptation(
                    backbone,
                    method,
                    replace(recipe, rates=rates),
                    train,
                    transform=train_transform,
                )
                for rates in _chosen(results, name, domain.name) or contender.rates
            ]
            for seed in todo:
                place = Path(slug(domain.name), slug(name), f"seed{seed}")
                best = _train(
                    candidates,
                    seed=seed,
                    title=f"{domain.name} / {name} / seed {seed}",
                    evaluator=evaluator,
                    held_out=held_out,
                    folder=workdir / "state" / place / inputs,
                )
                row = _finish(
                    best,
                    name=name,
                    domain=domain,
                    seed=seed,
                    backbone=backbone,
                    evaluator=evaluator,
                    preprocessing=preprocessing,
                    folder=workdir / "tasks" / place,
                    inputs=inputs,
                    details={
                        "candidates": len(candidates),
                        "train_examples": len(train),
                        "test_examples": len(domain.test),
                    },
                )
                results.add(row)
                shutil.rmtree(workdir / "state" / place, ignore_errors=True)
                print(
                    f"{domain.name:>20}  {name:<24} seed {seed}  "
                    f"{100 * row.value:5.1f} %  {row.seconds:6.1f} s",
                    flush=True,
                )
                # Later seeds train with what validation chose for the first.
                candidates = [c for c in candidates if c.recipe.rates == best.rates]


def _train(
    candidates: Sequence[Adaptation],
    *,
    seed: int,
    title: str,
    evaluator: Evaluator,
    held_out: Source | None,
    folder: Path,
) -> _Trained:
    """Train every candidate; keep the one that does best on the held-out data."""
    best: _Trained | None = None
    failure: NonFiniteLoss | None = None
    for adaptation in candidates:
        rates = dict(sorted(adaptation.recipe.rates.items()))
        # Named by what it is: the list of candidates may differ in the next run.
        states = StateFolder(folder / _short(replace(adaptation.recipe, rates=rates)))
        start = time.perf_counter()
        try:
            with progress_bar(
                title, steps=adaptation.steps, batch_size=adaptation.recipe.batch_size
            ) as on_log:
                state = adaptation.run(seed, folder=states, on_log=on_log)
        except NonFiniteLoss as error:
            failure = error
            continue
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        validation = evaluator.score(state.task, held_out) if held_out else None
        if len(candidates) > 1:
            states.save(state)  # if a later candidate is interrupted, this one is done
        if best is None or _better(validation, best.validation):
            best = _Trained(state, rates, validation, seconds, adaptation.steps)
    if best is None:
        assert failure is not None
        raise failure
    return best


def _finish(
    best: _Trained,
    *,
    name: str,
    domain: Domain,
    seed: int,
    backbone: Backbone,
    evaluator: Evaluator,
    preprocessing: list[dict[str, Any]],
    folder: Path,
    inputs: str,
    details: dict[str, Any],
) -> Row:
    """Look at the test data, save the task, and make its row."""
    task = best.state.task
    logits = evaluator.outputs(task, domain.test)
    test = score(logits, domain.test)
    save_task(
        folder,
        task,
        shared=backbone.shared,
        name=domain.name,
        class_names=domain.class_names,
        preprocessing=preprocessing,
        metadata={
            "method": name,
            "seed": seed,
            "accuracy": test["accuracy"],
            "test_logits_sha256": sha256(logits.tobytes()).hexdigest(),
        },
    )
    parts = count(task.delta).by_group
    return Row(
        method=name,
        task=domain.name,
        seed=seed,
        metric="accuracy",
        value=test["accuracy"],
        task_params=sum(parts.values()) - parts.get("head", 0),
        shared_params=backbone_size(backbone.shared, backbone.layers),
        steps=best.steps,
        seconds=round(best.seconds, 2),
        by_group=parts,
        details=details
        | {
            "rates": best.rates,
            "validation": best.validation,
            "test_loss": test["loss"],
        },
        inputs=inputs,
    )


def _better(new: dict[str, float] | None, old: dict[str, float] | None) -> bool:
    """Compare accuracies, then losses: small sets tie often."""
    if new is None or old is None:
        return False
    return (new["accuracy"], -new["loss"]) > (old["accuracy"], -old["loss"])


def _chosen(results: Results, name: str, domain: str) -> list[dict[str, float]]:
    """Look up the rates that validation chose in an earlier run."""
    rows = [r for r in results.rows if (r.method, r.task) == (name, domain)]
    return [rows[0].details["rates"]] if rows else []


def backbone_size(shared: Any, layers: Layers) -> int:
    """Count the backbone's parameters, its own head left out."""
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    return sum(
        leaf.size
        for path, leaf in leaves
        if not re.fullmatch(layers.head, path_name(path))
    )


def _check_folders(names: Sequence[str]) -> None:
    """Refuse names that would share a folder."""
    taken: dict[str, str] = {}
    for name in names:
        if taken.setdefault(slug(name), name) != name:
            raise ValueError(
                f"{taken[slug(name)]!r} and {name!r} would share the folder "
                f"{slug(name)!r}; rename one"
            )


def slug(name: str) -> str:
    """Make a file name of a label: `"FTN R=10"` becomes `"ftn_r_10"`.

    Where more than spaces and signs is lost (`a-b`), a hash of the label follows.
    """
    plain = re.sub(r"\W+", "_", name.lower()).strip("_")
    spoken = re.sub(r"[ =,+]+", "_", name.lower())
    return plain if plain == spoken != "" else f"{plain}-{_short(name)}"


def _short(*parts: Any) -> str:
    return sha256(repr(parts).encode()).hexdigest()[:12]
