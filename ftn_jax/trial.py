"""One row of a table: train the candidates, keep the best, test it, save it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ftn_jax.adapt import Adaptation, Evaluator
from ftn_jax.checkpoint import save_task
from ftn_jax.command import progress_bar
from ftn_jax.core import compact, count
from ftn_jax.data import Domain, Source
from ftn_jax.fit import NonFiniteLoss
from ftn_jax.method import Backbone
from ftn_jax.results import Row
from ftn_jax.resume import StateFolder
from ftn_jax.selection import Best
from ftn_jax.sizes import backbone_size, stored_size
from ftn_jax.train import Task


class Trained(NamedTuple):
    """The best of a row's candidates."""

    task: Task
    rates: dict[str, float]
    validation: dict[str, Any] | None
    seconds: float
    steps: int
    selected_step: int | None = None


def train_best(
    candidates: Sequence[Adaptation],
    *,
    seed: int,
    title: str,
    evaluator: Evaluator,
    held_out: Source | None,
    select_on: Source | None = None,
    folder: Path,
) -> Trained:
    """Train every candidate; keep the one that does best on the held-out data.

    Of each candidate the last state counts or, with `select_on`, the epoch that does
    best there.

    Raises:
        ValueError: if another process trains in the same folder.
        NonFiniteLoss: if no candidate trains to the end.
    """
    best: Trained | None = None
    failure: NonFiniteLoss | None = None
    with _alone(folder):
        for adaptation in candidates:
            rates = dict(sorted(adaptation.recipe.rates.items()))
            # Named by what it is: the list of candidates may differ in the next run.
            states = StateFolder(
                folder / short_hash(replace(adaptation.recipe, rates=rates))
            )
            start = time.perf_counter()
            try:
                with progress_bar(
                    title,
                    steps=adaptation.steps,
                    batch_size=adaptation.recipe.batch_size,
                ) as on_log:
                    # If a later candidate is interrupted, this one is done.
                    state = adaptation.run(
                        seed,
                        folder=states,
                        keep=len(candidates) > 1,
                        best=_judge(evaluator, select_on, states.of("best")),
                        on_log=on_log,
                    )
            except NonFiniteLoss as error:
                failure = error
                continue
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
            validation = evaluator.score(state.task, held_out) if held_out else None
            if best is None or (
                validation
                and best.validation
                and evaluator.measure.better(validation, best.validation)
            ):
                best = Trained(
                    state.task,
                    rates,
                    validation,
                    seconds,
                    adaptation.steps,
                    int(state.step) if select_on else None,
                )
    if best is None:
        assert failure is not None
        raise failure
    return best


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out: each would delete what the other is writing."""
    if jax.process_index() > 0:  # the first process of a job keeps it for all
        yield
        return
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process is training in {folder}; wait for it, or give this one "
            "other rows (seeds, domains, methods) or another --workdir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _judge(
    evaluator: Evaluator, source: Source | None, folder: StateFolder
) -> Best | None:
    if source is None:
        return None
    score = partial(evaluator.score, source=source)
    return Best(score, evaluator.measure.better, folder)


def finish(
    best: Trained,
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
) -> tuple[Row, Any]:
    """Look at the test data, save the task, and make its row."""
    task = replace(best.task, delta=compact(best.task.delta))
    test, outputs_hash = evaluator.test(task, domain.test)
    metric = evaluator.measure.metric
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
            metric: test[metric],
            "test_logits_sha256": outputs_hash,
        },
    )
    parts = count(best.task.delta).by_group
    row = Row(
        method=name,
        task=domain.name,
        seed=seed,
        metric=metric,
        value=test[metric],
        task_params=stored_size(task.delta),
        shared_params=backbone_size(backbone),
        steps=best.steps,
        seconds=round(best.seconds, 2),
        by_group=parts,
        details=details
        | {
            "rates": best.rates,
            "validation": best.validation,
            "selected_step": best.selected_step,
            **{f"test_{name}": value for name, value in test.items() if name != metric},
            "stored_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        },
        inputs=inputs,
    )
    return row, task.delta


def short_hash(*parts: Any) -> str:
    """Hash what `repr` tells of the parts."""
    return sha256(repr(parts).encode()).hexdigest()[:12]
