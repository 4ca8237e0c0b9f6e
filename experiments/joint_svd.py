"""Compress several domains' parallel adapters together: one basis, a factor each.

    python -m experiments.joint_svd --train.data DIR --train.backbone cifar_resnet20 \\
        --train.weights resnet20.npz --train.epochs 8

Trains parallel residual adapters for every domain (as `experiments.multi_domain` does,
whose settings are those of `--train`), then gives all of them one basis a layer by a
joint SVD and trains each domain's factor, norms and head again. The bases lie beside
the backbone, saved once under `bases`; each task file holds its own factors alone.

Rows: the adapters as trained; compressed; compressed and trained again. Expected, from
Rebuffi et al. (arXiv 1803.10082): at K = C/2 the adapters of
ten domains cost 0.61 instead of 1.11 times the 3x3 kernels of the network at about the
same accuracy.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from experiments import multi_domain
from ftn_jax import Extended, Task, restore_task, save_extras
from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.checkpoint import fingerprint
from ftn_jax.command import launch, progress_bar
from ftn_jax.compress import compress_jointly
from ftn_jax.data import Domain, describe, digest
from ftn_jax.method import Backbone
from ftn_jax.nodes.adapter_svd import BASIS
from ftn_jax.presets import parallel_adapters
from ftn_jax.results import Results
from ftn_jax.sizes import backbone_size
from ftn_jax.sweep import slug
from ftn_jax.tables import report
from ftn_jax.trial import Trained, finish, short_hash


@dataclass(frozen=True)
class Config:
    """Settings of the joint compression."""

    workdir: Path = Path("runs/joint_svd")
    """Folder for the table, the bases and the compressed tasks."""
    train: multi_domain.Config = field(default_factory=multi_domain.Config)
    """Data, backbone and training of the adapters; its workdir is kept apart."""
    rank: float = 0.5
    """Size of the basis: its share of the smaller number of channels of a layer."""
    epochs: int = 4
    """Passes over the training images after compressing."""
    rate: float = 1e-2
    """SGD's peak rate of factors, norms and head after compressing."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/joint_svd_tiny"),
            train=multi_domain.Config.tiny(),
            epochs=1,
        )


def main(cfg: Config) -> Results:
    """Train, compress, train again, print the table."""
    train = replace(
        cfg.train, methods=("parallel_adapters",), workdir=cfg.workdir / "adapters"
    )
    (seed,) = train.seeds
    before = multi_domain.main(train)
    backbone = multi_domain.load_backbone(train)
    domains = multi_domain.load_domains(train)
    results = Results(
        cfg.workdir, experiment="joint_svd", config=asdict(cfg), free=("workdir",)
    )
    tasks = [
        restore_task(
            train.workdir
            / "tasks"
            / slug(d.name)
            / "parallel_adapters"
            / f"seed{seed}",
            backbone.shared,
        ).task
        for d in domains
    ]
    joint = compress_jointly(
        backbone.shared, [task.delta for task in tasks], rank=cfg.rank
    )
    save_extras(cfg.workdir / "bases", joint.shared)
    small = [
        Task(delta, task.model_state)
        for delta, task in zip(joint.deltas, tasks, strict=True)
    ]
    fill(cfg, results, backbone, joint.shared, domains, tasks, small)
    print(summary(backbone, joint.shared, joint.errors, before, results))
    report(results)
    return results


def fill(
    cfg: Config,
    results: Results,
    backbone: Backbone,
    extended: Extended,
    domains: Sequence[Domain],
    tasks: Sequence[Task],
    small: Sequence[Task],
) -> None:
    """Add the rows of every domain that `results` does not hold yet."""
    train_transform, eval_transform = multi_domain.transforms(cfg.train)
    # The hash of earlier releases: their rows stay valid.
    network = "".join(fingerprint(backbone.shared, format_version=2).values())
    (seed,) = cfg.train.seeds
    for n, domain in enumerate(domains):
        # Every domain's adapters have a part in the bases.
        inputs = short_hash(network, domain.name, *(digest(d.train) for d in domains))
        evaluator = Evaluator(
            backbone, classes=domain.num_classes, transform=eval_transform
        )

        def again(n: int = n, domain: Domain = domain) -> Trained:
            return retrain(cfg, backbone, extended, small[n], domain, train_transform)

        forms = {
            "parallel adapters": (backbone.shared, lambda n=n: _as_it_is(tasks[n])),
            "joint SVD": (extended, lambda n=n: _as_it_is(small[n])),
            "joint SVD, trained again": (extended, again),
        }
        for name, (shared, make) in forms.items():
            if results.find(name, domain.name, seed, inputs=inputs):
                continue
            row, _ = finish(
                make(),
                name=name,
                domain=domain,
                seed=seed,
                backbone=backbone._replace(shared=shared),
                evaluator=evaluator.on(shared),
                preprocessing=describe(eval_transform),
                folder=place(cfg.workdir, domain, name, seed),
                inputs=inputs,
                details={},
            )
            results.add(row)


def retrain(
    cfg: Config,
    backbone: Backbone,
    extended: Extended,
    task: Task,
    domain: Domain,
    transform: Any,
) -> Trained:
    """Train a compressed task's factors, norms and head; the bases stay."""
    rates: dict[str, float] = {g: cfg.rate for g in ("adapters", "norm", "head")}
    adaptation = Adaptation(
        backbone._replace(shared=extended),
        parallel_adapters(backbone.layers, classes=domain.num_classes),
        Recipe(epochs=cfg.epochs, batch_size=cfg.train.batch_size, rates=rates),
        domain.train,
        transform=transform,
    )
    start = time.perf_counter()
    with progress_bar(
        f"{domain.name} / trained again",
        steps=adaptation.steps,
        batch_size=cfg.train.batch_size,
    ) as on_log:
        (seed,) = cfg.train.seeds
        state = adaptation.run(seed, task=task, on_log=on_log)
    seconds = time.perf_counter() - start
    return Trained(state.task, rates, None, seconds, adaptation.steps)


def summary(
    backbone: Backbone,
    extended: Extended,
    errors: Sequence[dict[str, float]],
    before: Results,
    after: Results,
) -> str:
    """Say what the domains' adapters cost together, before and after, and the error."""
    size = backbone_size(backbone)
    basis = sum(x.size for x in jax.tree.leaves(extended.extras[BASIS]))
    own = [r.by_group["adapters"] for r in after.rows if r.method == "joint SVD"]
    full = [r.by_group["adapters"] for r in before.rows]
    worst = max(e for task in errors for e in task.values())
    return (
        f"\nbackbone {size:,}; {len(full)} domains' adapters {sum(full):,} "
        f"({1 + sum(full) / size:.2f}x in all); joint: basis {basis:,} and "
        f"{sum(own):,} ({1 + (basis + sum(own)) / size:.2f}x in all); largest relative "
        f"error of an adapter {worst:.2f}"
    )


def place(workdir: Path, domain: Domain, name: str, seed: int) -> Path:
    """Name a task's folder, as `sweep` does."""
    return workdir / "tasks" / slug(domain.name) / slug(name) / f"seed{seed}"


def _as_it_is(task: Task) -> Trained:
    return Trained(task, {}, None, 0.0, 0)


if __name__ == "__main__":
    launch(Config, main)
