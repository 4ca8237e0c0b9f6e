"""The main job on domains that need no file: one network, three new tasks.

Pretrains a CIFAR-style ResNet-8 on drawn capital letters, freezes it, and adapts it
to scikit-learn's handwritten digits and two drawn domains by every method: feature
extractor, BatchNorm + head, FTN at two ranks, full fine-tuning. Prints the papers'
table, draws accuracy against parameters, saves each task and loads one back.

    python -m experiments.quickstart

Two to three minutes on two CPU cores. Expected means over the three domains, in %:
feature extractor 41, BN + head 60, FTN R=1 80, FTN R=8 95, fine-tuning 97.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from safetensors.numpy import save

from ftn_jax import materialize, restore_task
from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.apply import Apply, from_linen
from ftn_jax.atomic import write_atomic
from ftn_jax.command import launch, progress_bar
from ftn_jax.data import Compose, Domain, Normalize, RandomCrop, from_description
from ftn_jax.data.embedded import IMAGE_PX, embedded_source, embedded_targets
from ftn_jax.method import Backbone
from ftn_jax.models import ResNet, cifar_resnet
from ftn_jax.presets import (
    RESNET,
    Method,
    bn_head,
    feature_extractor,
    fine_tuning,
    ftn,
)
from ftn_jax.pretrained import export_resnet, load_resnet
from ftn_jax.results import Results
from ftn_jax.resume import StateFolder
from ftn_jax.sweep import Contender, slug, sweep
from ftn_jax.tables import report


@dataclass(frozen=True)
class Config:
    """Settings of the quickstart."""

    workdir: Path = Path("runs/quickstart")
    """Folder for the table, the picture, the backbone and the saved tasks."""
    domains: tuple[Literal["digits", "greek", "stripes", "counting"], ...] = (
        "digits",
        "greek",
        "counting",
    )
    """Target domains; see ftn_jax.data.embedded."""
    ranks: tuple[int, ...] = (1, 8)
    """Ranks of the FTN rows."""
    pretrain_epochs: int = 6
    """Passes over the source domain."""
    epochs: int = 10
    """Passes over each target domain."""
    batch_size: int = 64
    """Images per step."""
    pretrain_rate: float = 0.1
    """SGD's peak learning rate on the source domain."""
    factor_rate: float = 1e-2
    """Adam's peak learning rate for FTN's factors."""
    rate: float = 5e-2
    """SGD's peak learning rate for norms, heads and fine-tuned weights."""
    limit: int | None = None
    """Use at most so many training and test images of each domain."""
    seed: int = 2
    """Seed of the drawings, the pretraining and the adaptation. The recipe was chosen
    looking at seeds 0 and 1."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/quickstart_tiny"),
            domains=("digits",),
            ranks=(1,),
            pretrain_epochs=1,
            epochs=1,
            limit=128,
        )


NORMALIZE = Normalize(mean=(0.45,) * 3, std=(0.25,) * 3)
AUGMENT = Compose((RandomCrop(IMAGE_PX, padding=2), NORMALIZE))


def contenders(cfg: Config) -> dict[str, Contender]:
    """List the rows of the table: each method's rules and learning rates."""
    rates = {"norm": cfg.rate, "head": cfg.rate}
    rows = {
        "feature extractor": Contender(partial(_make, feature_extractor), [rates]),
        "BN + head": Contender(partial(_make, bn_head), [rates]),
    }
    for rank in cfg.ranks:
        rows[f"FTN R={rank}"] = Contender(
            partial(_make, ftn, rank=rank), [rates | {"factors": cfg.factor_rate}]
        )
    rows["fine-tuning"] = Contender(
        partial(_make, fine_tuning), [rates | {"weights": cfg.rate}]
    )
    return rows


def _make(preset: Callable[..., Method], classes: int, **options: Any) -> Method:
    return preset(RESNET, classes=classes, **options)


def pretrained(cfg: Config, model: ResNet, source: Domain) -> Backbone:
    """Train the backbone on the source domain, or read it from the workdir."""
    settings = (cfg.pretrain_epochs, cfg.pretrain_rate, cfg.batch_size, cfg.limit)
    name = "_".join(map(str, (*settings, cfg.seed)))
    path = cfg.workdir / f"backbone_{name}.safetensors"

    def network(classes: int) -> Apply:
        return from_linen(model.clone(num_classes=classes))

    if not path.exists():
        image = jnp.zeros((1, IMAGE_PX, IMAGE_PX, 3))
        fresh = model.init(jax.random.key(cfg.seed), image)
        start = Backbone(
            network, fresh["params"], {"batch_stats": fresh["batch_stats"]}, RESNET
        )
        # Pretraining is fine-tuning from a random start.
        adaptation = Adaptation(
            start,
            fine_tuning(RESNET, classes=source.num_classes),
            Recipe(
                epochs=cfg.pretrain_epochs,
                batch_size=cfg.batch_size,
                rates=dict.fromkeys(("weights", "norm", "head"), cfg.pretrain_rate),
            ),
            source.train,
            transform=AUGMENT,
        )
        with progress_bar(
            "pretraining", steps=adaptation.steps, batch_size=cfg.batch_size
        ) as on_log:
            folder = StateFolder(path.with_suffix(".state"))
            task = adaptation.run(cfg.seed, folder=folder, on_log=on_log).task
        evaluator = Evaluator(start, classes=source.num_classes, transform=NORMALIZE)
        accuracy = evaluator.score(task, source.test)["accuracy"]
        print(f"backbone: {accuracy:.1%} on {source.name}")
        weights = export_resnet(
            materialize(start.shared, task.delta),
            task.model_state["batch_stats"],
            model,
        )
        write_atomic(path, save(weights))
        folder.clear()
    params, batch_stats = load_resnet(path, model)
    return Backbone(network, params, {"batch_stats": batch_stats}, RESNET)


def show_reload(cfg: Config, backbone: Backbone, domain: Domain) -> None:
    """Load a saved task as a user would and compare with what was measured."""
    name = list(contenders(cfg))[-2]  # the largest FTN
    folder = cfg.workdir / "tasks" / slug(domain.name) / slug(name) / f"seed{cfg.seed}"
    saved = restore_task(folder, backbone.shared)
    evaluator = Evaluator(
        backbone,
        classes=len(saved.class_names),
        transform=from_description(saved.preprocessing),
    )
    logits = evaluator.outputs(saved.task, domain.test)
    found = sha256(logits.tobytes()).hexdigest()
    same = found == saved.metadata["test_logits_sha256"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    verdict = (
        "are bit for bit those from before saving"
        if same
        else "are NOT those from before saving (another machine, or another jax?)"
    )
    print(f"{folder} ({size / 1024:.0f} KiB) loaded back: its logits {verdict}")


def main(cfg: Config) -> Results:
    """Pretrain, adapt, print the table, show that a saved task is the same."""
    results = Results(
        cfg.workdir,
        experiment="quickstart",
        config=asdict(cfg),
        free=("workdir", "ranks", "domains"),
    )
    source, *targets = (
        domain.limited(train=cfg.limit, test=cfg.limit)
        for domain in (embedded_source(cfg.seed), *embedded_targets(cfg.seed))
    )
    targets = [domain for domain in targets if domain.name in cfg.domains]
    backbone = pretrained(cfg, cifar_resnet(8, source.num_classes), source)
    sweep(
        backbone,
        targets,
        contenders(cfg),
        results=results,
        recipe=Recipe(epochs=cfg.epochs, batch_size=cfg.batch_size, rates={}),
        train_transform=AUGMENT,
        eval_transform=NORMALIZE,
        seeds=(cfg.seed,),
        validation=0.0,
        workdir=cfg.workdir,
    )
    report(results)
    show_reload(cfg, backbone, targets[0])
    return results


if __name__ == "__main__":
    launch(Config, main)
