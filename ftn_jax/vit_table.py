"""The transformer table: every method on every domain, with what a step costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ftn_jax.adapt import Recipe
from ftn_jax.core import split_extras
from ftn_jax.data import Domain, Transform, steps_per_epoch, train_batches
from ftn_jax.method import Backbone, Method
from ftn_jax.presets.budget import planned_groups
from ftn_jax.presets.vit import VIT, VIT_LABELS, VIT_METHODS
from ftn_jax.presets.vit_rules import Initializer
from ftn_jax.results import Results
from ftn_jax.step_cost import CompiledStep, measured_costs
from ftn_jax.sweep import Contender, sweep
from ftn_jax.tables import Columns, report

VitMethod = Literal[
    "all",
    "linear_probe",
    "layer_norm",
    "bias_only",
    "ftn_o",
    "ftn_qv",
    "ftn_attention",
    "ftn_attention_mlp",
    "lora_qv",
    "kadaptation_qv",
    "svft_all",
    "ssf_all",
    "fine_tuning",
]
"""A preset of `ftn_jax.presets.vit`, or all of them."""

PAPER_ROWS: tuple[VitMethod, ...] = (
    "linear_probe",
    "ftn_o",
    "ftn_qv",
    "lora_qv",
    "kadaptation_qv",
    "svft_all",
    "fine_tuning",
)
"""The rows of FTN (arXiv 2310.06124), Table 3."""

ALL_GROUPS = ("head", "norm", "factors", "weights")
"""The optimizer groups that these methods have."""


def vit_contenders(
    backbone: Backbone,
    methods: Sequence[VitMethod],
    *,
    classes: int,
    rates: Sequence[float],
    rank: int = 4,
    weight_decay: float = 0.0,
    head: Initializer | None = None,
) -> dict[str, Contender]:
    """List the rows of a domain's table; one grid of rates serves every method.

    Args:
        backbone: one of our ViTs.
        methods: the rows.
        classes: of the domain.
        rates: candidates, each for all that a method trains.
        rank: of FTN and LoRA.
        weight_decay: of all that a method trains.
        head: where heads start, see `ftn_qv`.
    """
    width = split_extras(backbone.shared)[0]["position_embedding"].shape[-1]
    rows = {}
    for name, preset in VIT_METHODS.items():
        if not {name, "all"} & {*methods}:
            continue
        options: dict[str, Any] = {"head": head}
        if name.startswith(("ftn", "lora")):
            options["rank"] = rank
        if name == "kadaptation_qv":
            options["n"] = math.gcd(32, width)  # 32 where that divides the width
        make = partial(_make, preset, **options)
        groups = planned_groups(backbone, make(classes)._replace(prepare=None))
        rows[VIT_LABELS[name]] = Contender(
            make,
            [dict.fromkeys(groups, rate) for rate in rates],
            dict.fromkeys(groups, weight_decay) if weight_decay else {},
        )
    return rows


def _make(preset: Callable[..., Method], classes: int, **options: Any) -> Method:
    return preset(VIT, classes=classes, **options)


def vit_table(
    backbone: Backbone,
    domains: Sequence[Domain],
    rows_of: Callable[[Domain], dict[str, Contender]],
    *,
    results: Results,
    recipe: Recipe,
    train_transform: Transform,
    eval_transform: Transform,
    seeds: Sequence[int],
    validation: float,
    workdir: Path,
) -> None:
    """Fill, print and write the table.

    Beside accuracies it has the FLOPs of a training step as compiled and the seconds of
    an epoch: its steps, timed with those of all methods in turn, after compiling.

    Args:
        backbone: the frozen network.
        domains: the tasks.
        rows_of: the rows of a domain; heads may start differently on each.
        results: see `sweep`, as are the other arguments.
        recipe: how to train, but for the rates.
        train_transform: augmentation and normalisation.
        eval_transform: the same without randomness.
        seeds: of init, data order and augmentation.
        validation: share of the training data that chooses the rates.
        workdir: the experiment's folder.
    """
    rows: dict[str, Contender] = {}
    for domain in domains:
        rows = rows_of(domain)
        sweep(
            backbone,
            [domain],
            rows,
            results=results,
            recipe=recipe,
            train_transform=train_transform,
            eval_transform=eval_transform,
            seeds=seeds,
            validation=validation,
            workdir=workdir,
        )
    last = domains[-1]
    stream = train_batches(
        last.train, batch_size=recipe.batch_size, transform=train_transform, seed=0
    )
    batch = jax.tree.map(jnp.asarray, next(stream))
    stream.close()
    steps = {
        name: partial(
            CompiledStep,
            backbone,
            row.method(last.num_classes),
            replace(recipe, rates=row.rates[0]),
            batch,
        )
        for name, row in rows.items()
    }
    costs = measured_costs(workdir / "costs.json", steps)
    per_epoch = mean(
        steps_per_epoch(d.train, batch_size=recipe.batch_size) for d in domains
    )
    columns: Columns = {
        "GFLOPs per step": {m: f"{c.flops / 1e9:.2f}" for m, c in costs.items()},
        "s per epoch": {m: f"{c.seconds * per_epoch:.2f}" for m, c in costs.items()},
    }
    report(results, columns=columns)
