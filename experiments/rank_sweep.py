"""The papers' rank study, every run of it by one compiled program.

    python -m experiments.rank_sweep --train.data DIR --train.backbone cifar_resnet20 \\
        --train.weights resnet20.npz --train.ranks 1 2 4 8 16 --train.seeds 0 1

Accuracy of FTN against its rank, on each domain, mean and standard deviation over
seeds. Data, backbone, ranks, seeds and rates are the settings of
`experiments.multi_domain`, under `--train`. Of several `--train.factor-rates` each rank
takes, on each domain, the one that does best on held-out training images with the first
seed; one rate serves all ranks, and nothing is held out. Factors of smaller ranks and
heads of fewer classes are filled up with zeros, which stay zero, so that all runs have
one shape: the training step is compiled once for all ranks, seeds and domains. A
domain's runs go on side by side; on an accelerator they are one program's mapped axis.

Expected, from FTN (arXiv 2310.06124), its rank studies: accuracy rises with the rank,
steeply at first, and levels off.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

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
from ftn_jax.results import Results, Row
from ftn_jax.resume import StateFolder
from ftn_jax.runs import Together, cut, fill, own_classes
from ftn_jax.sweep import HeldOut, hold_out, slug
from ftn_jax.tables import report
from ftn_jax.train import TrainStep
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


class Run(NamedTuple):
    """One of the runs that are trained side by side."""

    seed: int
    rank: int
    rate: float


Ends = dict[Run, Trained | NonFiniteLoss]


@dataclass(frozen=True)
class Study:
    """The study on one domain."""

    cfg: Config
    backbone: Backbone
    domain: Domain
    classes: int
    step: TrainStep
    results: Results

    @cached_property
    def inputs(self) -> str:
        """Digest of the backbone and of the domain's examples."""
        network = fingerprint(self.backbone.shared, format_version=2).values()
        parts = digest(self.domain.train), digest(self.domain.test)
        return short_hash("".join(network), *parts)

    @cached_property
    def data(self) -> HeldOut:
        """What to train on, and what chooses a rank's rate, if there are several."""
        if len(self.cfg.train.factor_rates) == 1:
            return HeldOut(self.domain.train, None)
        data = hold_out(self.domain, self.cfg.train.validation)
        if data.held_out is None:
            raise ValueError(
                f"{self.domain.name}: found --train.factor-rates "
                f"{self.cfg.train.factor_rates} and nothing that chooses one; expected "
                "--train.validation above 0, or one rate"
            )
        return data

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores the domain's tasks."""
        _, transform = multi_domain.transforms(self.cfg.train)
        classes = self.domain.num_classes
        return Evaluator(self.backbone, classes=classes, transform=transform)

    def fill_table(self) -> None:
        """Train what has no row yet, choose every rank's rate, and write the rows.

        Raises:
            NonFiniteLoss: after all other rows are written, if the loss of a run, or of
                all candidates of a rank, became infinite.
        """
        first, *others = self.cfg.train.seeds
        ranks, rates = self.cfg.train.ranks, self.cfg.train.factor_rates
        tries = [Run(first, rank, rate) for rank in ranks for rate in rates]
        failed = self._write(self._best(self._train(tries)))
        found = {rank: self._row(first, rank) for rank in ranks}
        runs = [
            Run(seed, rank, row.details["rates"]["factors"])
            for seed in others
            for rank, row in found.items()
            if row
        ]
        failed += self._write(self._train(runs))
        if failed:
            raise failed[0]
        for each in (tries, runs):
            self._folder(each).clear()

    def _row(self, seed: int, rank: int) -> Row | None:
        name = self.domain.name
        return self.results.find(label(rank), name, seed, inputs=self.inputs)

    def _folder(self, runs: Sequence[Run]) -> StateFolder:
        # Named by the data too: a state of other data would be gone on from.
        name = f"{slug(self.domain.name)}-{self.inputs}-{short_hash(*runs)}"
        return StateFolder(self.cfg.workdir / "state" / name)

    def _best(self, ends: Ends) -> Ends:
        """Keep the run of each rank that does best on what is held out."""
        best: dict[int, Run] = {}
        for run, end in ends.items():
            rival = ends[best.setdefault(run.rank, run)]
            if isinstance(end, NonFiniteLoss) or rival is end:
                continue
            if isinstance(rival, NonFiniteLoss) or (
                end.validation
                and rival.validation
                and self.evaluator.measure.better(end.validation, rival.validation)
            ):
                best[run.rank] = run
        return {run: ends[run] for run in best.values()}

    def _write(self, ends: Ends) -> list[NonFiniteLoss]:
        """Write the rows that are new; return the failures."""
        for run, end in ends.items():
            if isinstance(end, NonFiniteLoss) or self._row(run.seed, run.rank):
                continue
            place = Path(slug(self.domain.name), slug(label(run.rank)))
            row, _ = finish(
                end,
                name=label(run.rank),
                domain=self.domain,
                seed=run.seed,
                backbone=self.backbone,
                evaluator=self.evaluator,
                preprocessing=describe(self.evaluator.transform),
                folder=self.cfg.workdir / "tasks" / place / f"seed{run.seed}",
                inputs=self.inputs,
                details={"rank": run.rank, "train_examples": len(self.data.train)},
            )
            self.results.add(row)
        return [end for end in ends.values() if isinstance(end, NonFiniteLoss)]

    def _train(self, runs: Sequence[Run]) -> Ends:
        """Train runs side by side, from their last states; nothing if all have rows."""
        if all(self._row(run.seed, run.rank) for run in runs):
            return {}
        shared, deltas, states = self.backbone.shared, [], []
        layers = self.backbone.layers
        for run in runs:
            method = ftn(layers, classes=self.domain.num_classes, rank=run.rank)
            key, _ = jax.random.split(jax.random.key(run.seed))
            deltas.append(make_delta(key, shared, method.rules_for(shared)))
        room = ftn(layers, classes=self.classes, rank=max(self.cfg.train.ranks))
        largest = make_delta(jax.random.key(0), shared, room.rules_for(shared))
        for run, delta in zip(runs, fill([*deltas, largest]), strict=False):
            _, key = jax.random.split(jax.random.key(run.seed))
            tx = optimizer(self.cfg, run.rate)
            states.append(
                TaskState.create(delta, self.backbone.model_state, tx=tx, key=key)
            )
        seeds = list(dict.fromkeys(run.seed for run in runs))
        together: Any = Together(
            self.step, feeds=[seeds.index(run.seed) for run in runs]
        )
        begun: Any = together.begin(states)
        folder, steps = self._folder(runs), self.cfg.steps
        start = time.perf_counter()
        with progress_bar(
            f"{self.domain.name}, {len(runs)} runs",
            steps=steps,
            batch_size=len(runs) * self.cfg.train.batch_size,
        ) as on_log:
            ended: Any = fit(
                together,
                shared,
                folder.restore(begun) or begun,
                partial(self._batches, seeds),
                steps=steps,
                on_log=on_log,
                save=folder.save,
            )
        folder.save(ended, wait=True)  # until all its rows are written
        seconds = (time.perf_counter() - start) / len(runs)
        return {
            run: self._end(run, state, delta, seconds)
            for run, state, delta in zip(runs, ended.unstack(), deltas, strict=True)
        }

    def _end(
        self, run: Run, state: TaskState, delta: Any, seconds: float
    ) -> Trained | NonFiniteLoss:
        if not state.finite:
            return NonFiniteLoss(
                f"{self.domain.name}: the loss became infinite in {run}; lower the "
                "rates",
                state,
            )
        task = replace(state.task, delta=cut(state.task.delta, delta))
        held_out, score = self.data.held_out, self.evaluator.score
        return Trained(
            task,
            rates=group_rates(self.cfg, run.rate),
            validation=score(task, held_out) if held_out else None,
            seconds=seconds,
            steps=self.cfg.steps,
        )

    def _batches(self, seeds: Sequence[int], start: int) -> Iterator[Any]:
        """Draw the batches of each step, one for each seed."""
        transform, _ = multi_domain.transforms(self.cfg.train)
        streams = [
            prefetch(
                train_batches(
                    self.data.train,
                    batch_size=self.cfg.train.batch_size,
                    transform=transform,
                    seed=seed,
                    start_step=start,
                )
            )
            for seed in seeds
        ]
        own = {"classes": np.int32(self.domain.num_classes)}
        try:
            for batches in zip(*streams, strict=True):
                yield [dict(batch) | own for batch in batches]
        finally:
            for stream in streams:
                stream.close()


def main(cfg: Config) -> Results:
    """Train every rank with every seed on every domain; print and draw."""
    backbone = multi_domain.load_backbone(cfg.train)
    domains = multi_domain.load_domains(cfg.train)
    results = Results(
        cfg.workdir, experiment="rank_sweep", config=asdict(cfg), free=("workdir",)
    )
    classes = max(d.num_classes for d in domains)
    step = make_train_step(
        backbone.network(classes),
        optimizer(cfg, cfg.train.factor_rates[0]),  # rates lie in its state
        loss=own_classes,
        forward=factored if cfg.forward == "factored" else merged,
    )
    for domain in domains:
        Study(cfg, backbone, domain, classes, step, results).fill_table()
    report(results)
    return results


def group_rates(cfg: Config, rate: float) -> dict[str, float]:
    """Return the peak rate of each optimizer group."""
    return {"factors": rate, "norm": cfg.train.ftn_rate, "head": cfg.train.ftn_rate}


def optimizer(cfg: Config, rate: float) -> optax.GradientTransformation:
    """Make the optimizer of a run with this rate of its factors."""
    return make_optimizer(group_rates(cfg, rate), steps=cfg.steps)


def label(rank: int) -> str:
    """Name a row of the table."""
    return f"FTN R={rank}"


if __name__ == "__main__":
    launch(Config, main)
