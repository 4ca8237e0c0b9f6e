"""Fill an experiment's table: every domain by every method with every seed."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.checkpoint import fingerprint, restore_task
from ftn_jax.data import Domain, Source, Transform, describe, digest, split
from ftn_jax.forward import Forward, merged
from ftn_jax.measure import CLASSIFICATION, Measure
from ftn_jax.method import Backbone, Method
from ftn_jax.parallel import Layout
from ftn_jax.results import Results
from ftn_jax.selection import Select
from ftn_jax.trial import finish, short_hash, train_best

ChooseOn = Literal["each", "first"]


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
        method: `classes -> Method`.
        rates: learning rates by optimizer group, one mapping for each candidate; the
            first seed tries all, and validation data chooses for every seed.
        weight_decay: by optimizer group, or a function of the domain's name that
            gives it.
        choose_on: where validation data chooses; default the sweep's.
        details: goes into its rows, for example the rank.
    """

    method: Callable[[int], Method]
    rates: Sequence[Mapping[str, float]]
    weight_decay: Mapping[str, float] | Callable[[str], Mapping[str, float]] = {}
    choose_on: ChooseOn | None = None
    details: Mapping[str, Any] = {}


def sweep(
    backbone: Backbone,
    domains: Sequence[Domain],
    contenders: Mapping[str, Contender],
    *,
    results: Results,
    recipe: Recipe,
    train_transform: Transform | Mapping[str, Transform],
    eval_transform: Transform | Mapping[str, Transform],
    seeds: Sequence[int] = (0,),
    validation: float = 0.1,
    choose_on: ChooseOn = "each",
    select: Select = "last",
    measures: Mapping[str, Measure] = {},
    eval_batch_size: int = 256,
    forward: Forward = merged,
    workers: int = 0,
    layout: Layout | None = None,
    workdir: Path,
) -> None:
    """Train and test what `results` does not hold yet.

    Validation data is held out of the training data, by class, for every method
    alike; the test data is looked at once, with the rates that validation chose.
    Every finished task is saved, in its compact form, under
    `workdir/tasks/DOMAIN/METHOD/seedN`; a row that was interrupted goes on from its
    last state. Where a method's tasks depend on their order, that is `domains`'.

    Args:
        backbone: the frozen network.
        domains: the tasks.
        contenders: rows of the table by name.
        results: where rows go, and which rows are done.
        recipe: how to train; a contender's rates replace its own.
        train_transform: augmentation and normalisation; one for all domains, or one
            for each by its name.
        eval_transform: the same without randomness; saved with each task.
        seeds: of init, data order and augmentation.
        validation: share of the training data that is held out where a domain has no
            validation data of its own; 0 for none.
        choose_on: where validation data chooses among a contender's rates: on
            `"each"` domain, or on the `"first"` for all of them.
        select: which epoch of a run counts; see `Select`.
        measures: what a domain is trained on and judged by, by its name, where that
            is not classification; the domain's class names then are those of the
            network's outputs.
        eval_batch_size: images per step of validation and test.
        forward: how training runs the network on `(shared, delta)`.
        workers: processes that read and augment images; the results do not change.
        layout: the devices to train and test on; default: the first one.
        workdir: the experiment's folder.

    Raises:
        ValueError: if a contender has several candidate rates and no validation data,
            two domains have one name or would share a folder, the evaluation transform
            cannot be written down, or `results` holds a row of another backbone or of
            other data.
        NonFiniteLoss: if no candidate of a row trains to the end.
    """
    parts = {domain.name: hold_out(domain, validation) for domain in domains}
    if len(parts) < len(domains):
        raise ValueError(
            f"two domains have one name: found {[d.name for d in domains]}; rename one"
        )
    blind = [name for name, (_, held_out) in parts.items() if not held_out]
    for name, contender in contenders.items():
        if len(contender.rates) > 1 and blind:
            raise ValueError(
                f"{name} has {len(contender.rates)} candidate rates; choosing needs "
                f"validation data, which {blind[0]} lacks: set the validation share "
                "above 0"
            )
    if select == "best_on_validation" and blind:
        raise ValueError(
            f"{blind[0]} has no validation data to select an epoch by: set the "
            "validation share above 0"
        )
    _check_folders([d.name for d in domains] + [r.task for r in results.rows])
    _check_folders([*contenders, *(r.method for r in results.rows)])
    # Complains before, not after training.
    preprocessing = {d.name: describe(_of(eval_transform, d)) for d in domains}
    # The hash of earlier releases: their rows stay valid.
    network = "".join(fingerprint(backbone.shared, format_version=2).values())
    first = domains[0].name if domains else ""
    prepared: dict[str, Backbone] = {}
    chains: dict[tuple[str, int], Backbone] = {}
    for n, domain in enumerate(domains):
        measure = measures.get(domain.name, CLASSIFICATION)
        evaluator = Evaluator(
            backbone,
            classes=domain.num_classes,
            transform=_of(eval_transform, domain),
            batch_size=eval_batch_size,
            measure=measure,
            workers=workers,
            layout=layout,
        )
        train, held_out = parts[domain.name]
        selected = {"best_on_validation": held_out, "best_on_test": domain.test}
        for name, contender in contenders.items():
            method, decay = contender.method(domain.num_classes), contender.weight_decay
            decay = decay(domain.name) if callable(decay) else decay
            known = domains[: n + 1] if method.after else [domain]
            inputs = short_hash(
                network,
                *(
                    digest(x)
                    for d in known
                    for x in (d.train, d.test, d.validation)
                    if x is not None
                ),
            )
            find = partial(results.find, name, domain.name, inputs=inputs)
            if all(find(seed) for seed in seeds) and not method.after:
                continue
            if name not in prepared:
                prepared[name] = (
                    method.prepare(backbone) if method.prepare else backbone
                )
            candidates: list[Adaptation] = []
            for seed in seeds:
                place = Path(slug(domain.name), slug(name), f"seed{seed}")
                own = chains.get((name, seed), prepared[name])
                if find(seed):
                    if method.after:
                        saved = restore_task(workdir / "tasks" / place, own.shared)
                        chains[name, seed] = method.after(own, saved.task.delta)
                    continue
                if not candidates or method.after:
                    rates = (
                        _chosen(results, name, domain.name)
                        or (
                            (contender.choose_on or choose_on) == "first"
                            and _chosen(results, name, first)
                        )
                        or contender.rates
                    )
                    adaptation = Adaptation(
                        own,
                        method,
                        replace(
                            recipe,
                            rates=rates[0],
                            weight_decay=decay or recipe.weight_decay,
                        ),
                        train,
                        transform=_of(train_transform, domain),
                        measure=measure,
                        forward=forward,
                        workers=workers,
                        layout=layout,
                    )
                    candidates = [adaptation.at(each) for each in rates]
                best = train_best(
                    candidates,
                    seed=seed,
                    title=f"{domain.name} / {name} / seed {seed}",
                    evaluator=evaluator.on(own.shared),
                    held_out=held_out,
                    select_on=selected.get(select),
                    folder=workdir / "state" / place / inputs,
                )
                row, delta = finish(
                    best,
                    name=name,
                    domain=domain,
                    seed=seed,
                    backbone=own,
                    evaluator=evaluator.on(own.shared),
                    preprocessing=preprocessing[domain.name],
                    folder=workdir / "tasks" / place,
                    inputs=inputs,
                    details={
                        **contender.details,
                        "candidates": len(candidates),
                        "select": select,
                        "train_examples": len(train),
                        "test_examples": len(domain.test),
                    },
                )
                results.add(row)
                if method.after:
                    chains[name, seed] = method.after(own, delta)
                if jax.process_index() == 0:
                    shutil.rmtree(workdir / "state" / place, ignore_errors=True)
                    print(
                        f"{domain.name:>20}  {name:<24} seed {seed}  "
                        f"{measure.show(row.value)}  {row.seconds:6.1f} s",
                        flush=True,
                    )
                # Later seeds train with what validation chose for the first.
                candidates = [c for c in candidates if c.recipe.rates == best.rates]


class HeldOut(NamedTuple):
    """What to train on, and what chooses: neither of them test data."""

    train: Source
    held_out: Source | None


def hold_out(domain: Domain, share: float) -> HeldOut:
    """Take a domain's validation data or, where it has none, a share of the training's.

    With validation data of its own, a domain trains on all of its training data.
    """
    if domain.validation is not None:
        return HeldOut(domain.train, domain.validation)
    if not share:
        return HeldOut(domain.train, None)
    return HeldOut(*split(domain.train, share, seed=0))


def _of(transform: Transform | Mapping[str, Transform], domain: Domain) -> Transform:
    return transform[domain.name] if isinstance(transform, Mapping) else transform


def _chosen(results: Results, name: str, domain: str) -> list[dict[str, float]]:
    """Look up the rates that validation chose in an earlier run."""
    rows = [r for r in results.rows if (r.method, r.task) == (name, domain)]
    return [rows[0].details["rates"]] if rows else []


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
    return plain if plain == spoken != "" else f"{plain}-{short_hash(name)}"
