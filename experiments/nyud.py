"""Four dense tasks on one frozen ResNet-18: NYUD-MT, the papers' table.

    python -m experiments.nyud --data NYUD_MT --weights resnet18.pth

Semantic segmentation, depth, surface normals and edges, each with a DeepLabv3+ decoder
of its own. Rows: single task, decoder only, decoder + BN, series and parallel adapters,
RCM, FTN at several ranks. --data takes either published archive, unpacked (see
`ftn_jax.data.nyud`); without it the pictures are synthetic rooms in the same format.

--schedule sixty_epochs reads "60 epochs" as 60 passes over the 795 training images;
published_iterations takes the 19,875 iterations that RCM's configuration calls sixty
epochs (they are 200). The default is the first, since FTN's text says 60.

Expected, from FTN (arXiv 2310.06124) Table 3 (mIoU %, RMSE m, mean angle in degrees,
odsF %; millions of parameters without decoders): segmentation about 35, depth .55 to
.56, normals about 21.8, edges about 73.8 for FTN; 44.68 M single task, 11.19 decoder +
BN, 17.51 series, 16.77 parallel, 17.49 RCM, 11.23 / 11.54 / 11.89 / 12.24 FTN at R = 1,
10, 20, 30. The odsF of the papers is that of a MATLAB benchmark with maxDist 0.011.

Not trained here on NYUD: the archives cannot be had offline.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from experiments._dense import DenseConfig, fill_table, resnet, under_decoder
from ftn_jax.adapt import Recipe
from ftn_jax.checkpoint import restore_task
from ftn_jax.command import launch
from ftn_jax.data import IMAGENET_MEAN, IMAGENET_STD, Domain, Normalize, Source
from ftn_jax.data.nyud import NYUD_CLASSES, NYUDFolder
from ftn_jax.data.scenes import KINDS, scenes
from ftn_jax.dense import depth, edges, normals, semseg
from ftn_jax.dense.joint_tasks import compare_costs
from ftn_jax.dense.measures import RMSE
from ftn_jax.dense.network import DenseBackbone
from ftn_jax.dense.pictures import shared_by_method
from ftn_jax.measure import Measure
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.presets.dense import decoder_only
from ftn_jax.results import Results
from ftn_jax.sweep import Contender, slug

TASKS = ("semseg", "depth", "normals", "edges")
LABELS = {
    "single": ("single task", "fine_tuning"),
    "bn": ("decoder + BN", "bn_head"),
    "series": ("series adapters", "series_adapters"),
    "parallel": ("parallel adapters", "parallel_adapters"),
    "rcm": ("RCM", "rcm"),
}


@dataclass(frozen=True)
class Config(DenseConfig):
    """Settings of the NYUD experiment."""

    data: Path | None = None
    """Folder NYUD_MT of either archive; without it, synthetic scenes."""
    workdir: Path = Path("runs/nyud")
    """Folder for the table, the pictures and the saved tasks."""
    tasks: tuple[str, ...] = TASKS
    """Which of semseg, depth, normals, edges; all by default, one to train it alone."""
    methods: tuple[str, ...] = ("single", "decoder", *(*LABELS,)[1:], "ftn")
    """Rows of the table."""
    ranks: tuple[int, ...] = (1, 10, 20, 30)
    """Ranks of the FTN rows."""
    schedule: Literal["sixty_epochs", "published_iterations"] = "sixty_epochs"
    """60 passes over the training images, or 19,875 iterations (200 passes)."""
    epochs: int | None = None
    """Passes over the training images, instead of the schedule's."""
    classes: int = NYUD_CLASSES
    """41 with the background as a class (RCM, ASTMT), or 40 without it."""
    rmse: RMSE = "image_rmse_with_gaps"
    """Depth error: rmse pools all pixels, image_rmse averages over images, and
    image_rmse_with_gaps also counts missing pixels, as RCM's evaluation does."""
    semseg_weight: float = 1.0
    """Weight of the segmentation loss."""
    depth_weight: float = 1.0
    """Weight of the depth loss."""
    normals_weight: float = 10.0
    """Weight of the normals loss."""
    edge_weight: float = 50.0
    """Weight of the edge loss."""
    edge_positive: float = 0.95
    """Weight of edge pixels in it; RCM's 0.95, ASTMT's 0.8."""
    rate: float = 5e-3
    """SGD's rate of decoders, norms and everything but factors."""
    factor_rate: float = 1e-2
    """Adam's rate of FTN's factors."""
    weight_decay: float = 1e-4
    """Of everything but factors."""
    adam_decoder: bool = False
    """Train decoders by Adam at --factor-rate: for short runs, not the papers'."""
    joint: bool = False
    """Also measure all tasks in one program against one pass for each."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            backbone="cifar_resnet8",
            workdir=Path("runs/nyud_tiny"),
            tasks=("semseg", "depth"),
            methods=("ftn",),
            ranks=(2,),
            epochs=1,
            batch_size=4,
            height=24,
            width=32,
            scales=(1.0, 1.5),
            high="layer3",
            decoder_width=8,
            low_width=4,
            rates=(2,),
            thresholds=9,
            processes=1,
            max_train=8,
            max_test=4,
        )


def load_backbone(cfg: Config) -> DenseBackbone:
    """Build DeepLab on the backbone and read its weights."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    return under_decoder(cfg, *resnet(cfg), RESNET)


def load_data(cfg: Config) -> list[Domain]:
    """Read one data set as one domain for each task, its outputs as classes."""
    if unknown := [task for task in cfg.tasks if task not in TASKS]:
        raise ValueError(f"--tasks {unknown}: unknown, known are {TASKS}")
    if cfg.classes not in (NYUD_CLASSES - 1, NYUD_CLASSES):
        raise ValueError(
            f"--classes {cfg.classes}: NYUD has 41 classes, or 40 without the "
            "background"
        )
    classes = tuple(str(n) for n in range(cfg.classes))
    outputs = {
        "semseg": classes if cfg.data else KINDS,
        "depth": ("metres",),
        "normals": ("x", "y", "z"),
        "edges": ("edge",),
    }
    domains = []
    for task in cfg.tasks:
        targets = ("edge" if task == "edges" else task,)
        if cfg.data is None:
            size = (cfg.height, cfg.width)
            train: Source = scenes(cfg.max_train or 200, size=size, targets=targets)
            test: Source = scenes(
                cfg.max_test or 50, size=size, seed=1, targets=targets
            )
        else:
            train = NYUDFolder(cfg.data, "train", targets=targets)
            test = NYUDFolder(cfg.data, "val", targets=targets)
        domain = Domain(task, outputs[task], train, test)
        domains.append(domain.limited(train=cfg.max_train, test=cfg.max_test))
    return domains


def measures(cfg: Config, domains: list[Domain]) -> dict[str, Measure]:
    """Name each task's loss and metrics."""
    classes = {d.name: d.num_classes for d in domains}.get("semseg", cfg.classes)
    return {
        "semseg": semseg(classes=classes, weight=cfg.semseg_weight),
        "depth": depth(metric=cfg.rmse, weight=cfg.depth_weight),
        "normals": normals(weight=cfg.normals_weight),
        "edges": edges(
            weight=cfg.edge_weight,
            positive=cfg.edge_positive,
            thresholds=cfg.thresholds,
            max_dist=cfg.max_dist,
            interpolate=False,
            processes=cfg.processes,
            title="boundary benchmark",
        ),
    }


def contenders(cfg: Config, network: DenseBackbone) -> dict[str, Contender]:
    """List the rows of the table."""
    layers = network.backbone.layers
    names = ("head", "norm", "weights", "adapters")
    rates = dict.fromkeys(names, cfg.rate) | {"factors": cfg.factor_rate}
    if cfg.adam_decoder:
        rates["head"] = cfg.factor_rate

    def row(preset: Callable[..., Any], *groups: str, **options: Any) -> Contender:
        method = partial(preset, layers, **options)
        chosen = {group: rates[group] for group in ("head", *groups)}
        decay = {group: cfg.weight_decay for group in chosen if group != "factors"}
        return Contender(lambda classes: method(classes=classes), [chosen], decay)

    rows: dict[str, Contender] = {}
    for name in cfg.methods:
        if name == "decoder":
            rows["decoder only"] = row(decoder_only, frozen=network.frozen)
        elif name == "ftn":
            for rank in cfg.ranks:
                rows[f"FTN R={rank}"] = row(
                    METHODS["ftn"], "norm", "factors", rank=rank
                )
        elif name in LABELS:
            label, preset = LABELS[name]
            groups = {
                "single": ("norm", "weights"),
                "series": ("norm", "adapters"),
                "parallel": ("norm", "adapters"),
                "rcm": ("norm", "weights", "adapters"),
            }.get(name, ("norm",))
            rows[label] = row(METHODS[preset], *groups)
        else:
            known = ("decoder", "ftn", *LABELS)
            raise ValueError(f"--methods {name}: unknown, known are {known}")
    return rows


def epochs(cfg: Config, images: int) -> int:
    """Turn the schedule into passes over the training images."""
    if cfg.epochs is not None:
        return cfg.epochs
    if cfg.schedule == "sixty_epochs":
        return 60
    return round(19_875 / max(1, images // cfg.batch_size))


def joint_costs(
    cfg: Config,
    network: DenseBackbone,
    domains: list[Domain],
    rows: dict[str, Contender],
) -> str:
    """Compare all tasks in one program with one pass for each, by saved tasks."""
    backbone, methods = network.backbone, {}
    for method, values in shared_by_method(backbone, rows).items():
        tasks = {}
        for domain in domains:
            place = cfg.workdir / "tasks" / slug(domain.name) / slug(method)
            place = place / f"seed{cfg.seeds[0]}"
            if place.exists():
                tasks[domain.name] = restore_task(place, values).task
        if len(tasks) == len(domains):
            methods[method] = (values, tasks)
    applies = {d.name: backbone.network(d.num_classes) for d in domains}
    image = jax.random.normal(jax.random.key(0), (1, cfg.height, cfg.width, 3))
    return compare_costs(applies, methods, {"image": image})


def main(cfg: Config) -> Results:
    """Train every row on every task; print the papers' table."""
    domains, network = load_data(cfg), load_backbone(cfg)
    rows = contenders(cfg, network)
    results = fill_table(
        cfg,
        "nyud",
        network,
        domains,
        rows,
        measures(cfg, domains),
        recipe=Recipe(
            epochs=epochs(cfg, len(domains[0].train)),
            batch_size=cfg.batch_size,
            rates={},
            schedule="polynomial",
            adam=("factors", "head") if cfg.adam_decoder else ("factors",),
        ),
        normalize=Normalize(IMAGENET_MEAN, IMAGENET_STD),
        free=("tasks", "joint"),
    )
    if cfg.joint:
        table = joint_costs(cfg, network, domains, rows)
        (cfg.workdir / "joint.md").write_text(table)
        print(table)
    return results


if __name__ == "__main__":
    launch(Config, main)
