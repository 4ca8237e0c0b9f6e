"""The papers' rank study, every run of it by one compiled program.

    python -m experiments.rank_sweep --train.data DIR --train.backbone cifar_resnet20 \\
        --train.weights resnet20.npz --train.ranks 1 2 4 8 16 --train.seeds 0 1

Accuracy of FTN against its rank, on each domain, mean and standard deviation over
seeds. Data, backbone, ranks, seeds and rates are the settings of
`experiments.multi_domain`, under `--train`; of several rates the first counts, and
nothing is held out, for nothing is chosen. Factors of smaller ranks and heads of fewer
classes are filled up with zeros, which stay zero, so that all runs have one shape: the
training step is compiled once for all ranks, seeds and domains. A domain's runs go on
side by side; on an accelerator they are one program's mapped axis.

Expected, from FTN (arXiv 2310.06124), its rank studies: accuracy rises with the rank,
steeply at first, and levels off.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import multi_domain
from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.adapt import Evaluator
from ftn_jax.checkpoint import fingerprint
from ftn_jax.command import launch, progress_bar
from ftn_jax.data import Domain, describe, digest, prefetch, train_batches
from ftn_jax.factored import factored
from ftn_jax.fit import NonFiniteLoss, fit
from ftn_jax.forward import merged
from ftn_jax.method import Backbone
from ftn_jax.presets import ftn
from ftn_jax.results import Results
from ftn_jax.resume import StateFolder
from ftn_jax.runs import Together, cut, fill, own_classes
from ftn_jax.sweep import slug
from ftn_jax.tables import report
from ftn_jax.trial import Trained, finish, short_hash


@dataclass(frozen=True)
class Config:
    """Settings of the rank study."""

    workdir: Path = Path("runs/rank_sweep")
    """Folder for the table, the pictures and the saved tasks."""
    train: multi_domain.Config = field(
        default_factory=lambda: multi_domain.Config(
            ranks=(1, 2, 4, 8, 16), seeds=(0, 1)
        )
    )
    """Data, backbone, ranks, seeds and rates."""
    steps: int = 1000
    """Training steps of every run."""
    forward: Literal["merged", "factored"] = "factored"
    """How training runs the network; the numbers are the same."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        train = replace(multi_domain.Config.tiny(), ranks=(1, 2), seeds=(0, 1))
        return cls(workdir=Path("runs/rank_sweep_tiny"), train=train, steps=3)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Seed and rank of each of a domain's runs."""
        return [(s, r) for s in self.train.seeds for r in self.train.ranks]


def main(cfg: Config) -> Results:
    """Train every rank with every seed on every domain; print and draw."""
    backbone = multi_domain.load_backbone(cfg.train)
    domains = multi_domain.load_domains(cfg.train)
    results = Results(
        cfg.workdir, experiment="rank_sweep", config=asdict(cfg), free=("workdir",)
    )
    rates = {
        "factors": cfg.train.factor_rates[0],
        "norm": cfg.train.ftn_rate,
        "head": cfg.train.ftn_rate,
    }
    classes = max(d.num_classes for d in domains)
    tx = make_optimizer(rates, steps=cfg.steps)
    step = make_train_step(
        backbone.network(classes),
        tx,
        loss=own_classes,
        forward=factored if cfg.forward == "factored" else merged,
    )
    feeds = [cfg.train.seeds.index(seed) for seed, _ in cfg.runs]
    together = Together(step, feeds=feeds)
    network = "".join(fingerprint(backbone.shared, format_version=2).values())
    _, eval_transform = multi_domain.transforms(cfg.train)
    for domain in domains:
        inputs = short_hash(network, digest(domain.train), digest(domain.test))
        find = partial(results.find, task=domain.name, inputs=inputs)
        if all(find(label(rank), seed=seed) for seed, rank in cfg.runs):
            continue
        # Named by the data too: a state of other data would be gone on from.
        folder = StateFolder(cfg.workdir / "state" / f"{slug(domain.name)}-{inputs}")
        trained = train(cfg, backbone, domain, together, tx, classes, folder)
        evaluator = Evaluator(
            backbone, classes=domain.num_classes, transform=eval_transform
        )
        for (seed, rank), best in zip(cfg.runs, trained, strict=True):
            if find(label(rank), seed=seed):
                continue
            row, _ = finish(
                best._replace(rates=rates),
                name=label(rank),
                domain=domain,
                seed=seed,
                backbone=backbone,
                evaluator=evaluator,
                preprocessing=describe(eval_transform),
                folder=cfg.workdir
                / "tasks"
                / slug(domain.name)
                / slug(label(rank))
                / f"seed{seed}",
                inputs=inputs,
                details={"rank": rank, "train_examples": len(domain.train)},
            )
            results.add(row)
        folder.clear()
    report(results)
    return results


def train(
    cfg: Config,
    backbone: Backbone,
    domain: Domain,
    together: Any,
    tx: Any,
    classes: int,
    folder: StateFolder,
) -> list[Trained]:
    """Train a domain's runs side by side; go on from their last states."""
    shared, deltas, keys = backbone.shared, [], []
    for seed, rank in cfg.runs:
        delta_key, key = jax.random.split(jax.random.key(seed))
        method = ftn(backbone.layers, classes=domain.num_classes, rank=rank)
        deltas.append(make_delta(delta_key, shared, method.rules_for(shared)))
        keys.append(key)
    room = ftn(backbone.layers, classes=classes, rank=max(cfg.train.ranks))
    largest = make_delta(keys[0], shared, room.rules_for(shared))
    *filled, _ = fill([*deltas, largest])
    runs: Any = together.begin(
        TaskState.create(delta, backbone.model_state, tx=tx, key=key)
        for delta, key in zip(filled, keys, strict=True)
    )
    start = time.perf_counter()
    with progress_bar(
        f"{domain.name}, {len(deltas)} runs",
        steps=cfg.steps,
        batch_size=len(deltas) * cfg.train.batch_size,
    ) as on_log:
        runs = fit(
            together,
            shared,
            folder.restore(runs) or runs,
            partial(batches, cfg, domain),
            steps=cfg.steps,
            on_log=on_log,
            save=folder.save,
        )
    folder.save(runs, wait=True)  # until all its rows are written
    ends = runs.unstack()
    pairs = zip(cfg.runs, ends, strict=True)
    if failed := [run for run, state in pairs if not state.finite]:
        raise NonFiniteLoss(
            f"{domain.name}: the loss became infinite in the runs (seed, rank) "
            f"{failed}; lower the rates",
            ends[cfg.runs.index(failed[0])],
        )
    seconds = (time.perf_counter() - start) / len(deltas)
    return [
        Trained(
            replace(state.task, delta=cut(state.task.delta, delta)),
            rates={},
            validation=None,
            seconds=seconds,
            steps=cfg.steps,
        )
        for state, delta in zip(ends, deltas, strict=True)
    ]


def batches(cfg: Config, domain: Domain, start: int) -> Iterator[Any]:
    """Draw the batches of each step, one for each seed."""
    transform, _ = multi_domain.transforms(cfg.train)
    streams = [
        prefetch(
            train_batches(
                domain.train,
                batch_size=cfg.train.batch_size,
                transform=transform,
                seed=seed,
                start_step=start,
            )
        )
        for seed in cfg.train.seeds
    ]
    own = {"classes": np.int32(domain.num_classes)}
    try:
        for batches in zip(*streams, strict=True):
            yield [dict(batch) | own for batch in batches]
    finally:
        for stream in streams:
            stream.close()


def label(rank: int) -> str:
    """Name a row of the table."""
    return f"FTN R={rank}"


if __name__ == "__main__":
    launch(Config, main)
