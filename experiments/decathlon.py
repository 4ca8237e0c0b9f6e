"""The Visual Decathlon: ten data sets on one ResNet-26, and where adapters stand.

    python -m experiments.decathlon --data DIR --weights resnet26.safetensors

DIR holds the archives extracted: annotations/ (of the devkit) and data/aircraft/, ...
The defaults are those of Rebuffi, Bilen, Vedaldi (arXiv 1803.10082) and their code:
ResNet-26 pretrained on ImageNet at 72 px, adapters by SGD at 0.1 for 120 epochs, a
tenth of the rate from epochs 80 and 100 on, weight decay by data set. Test labels are
withheld: numbers here are of the validation images, and a part of the training images
chooses rates where there are several. The FTN papers run no Decathlon; the factors'
rate is that of their ImageNet-to-Sketch.

Rows beside the shelf's: parallel adapters early, mid, late and on half of the
convolutions, with dropout, and cut by SVD. The score of 0 to 10,000 points is printed
where all ten sets are there; `ftn_jax.decathlon.PUBLISHED` holds the papers' rows to
compare with. Not run here, where neither archives nor weights are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import multi_domain
from ftn_jax import shelf
from ftn_jax.command import launch
from ftn_jax.data import (
    DECATHLON,
    Compose,
    Domain,
    Normalize,
    ToRGB,
    check_sizes,
    decathlon_transforms,
    load_decathlon,
    load_digits,
    measure_normalize,
)
from ftn_jax.decathlon import BASELINE, DECAY, PUBLISHED, decathlon_score
from ftn_jax.method import Backbone
from ftn_jax.nodes.cp import CPInit
from ftn_jax.optimizer import Schedule
from ftn_jax.results import Results, Row
from ftn_jax.sweep import Contender
from ftn_jax.tables import add_table, report

Placement = Literal["early", "mid", "late", "half"]


@dataclass(frozen=True)
class Config(multi_domain.Config):
    """Settings of the Decathlon; these differ from multi_domain's, or add."""

    backbone: str = "resnet26"
    """Name in ftn_jax.models.RESNETS."""
    workdir: Path = Path("runs/decathlon")
    """Folder for the table, the picture and the saved tasks."""
    domains: tuple[str, ...] = tuple(name for name in DECAY if name != "imagenet12")
    """Names of the data sets; ImageNet is what the backbone was trained on."""
    methods: tuple[shelf.MethodName, ...] = (
        "feature_extractor",
        "bn_head",
        "ftn",
        "series_adapters",
        "parallel_adapters",
        "fine_tuning",
    )
    """Rows of the table: names of ftn_jax.presets, or all of them."""
    placements: tuple[Placement, ...] = ("early", "mid", "late", "half")
    """Further rows: parallel adapters in the first, second or third stage alone, or on
    the second convolution of each block."""
    dropouts: tuple[float, ...] = (0.5,)
    """Further rows: parallel adapters with so much dropout on their inputs. The
    original draws a mask for each image, and gains on its widest networks only."""
    svd_ranks: tuple[float, ...] = (0.5,)
    """Further rows: parallel adapters cut by SVD to this share of their rank, each
    set's by themselves, and trained on; experiments.joint_svd cuts all together."""
    ranks: tuple[int, ...] = (1, 10, 50)
    """Ranks of the FTN rows."""
    inits: tuple[CPInit, ...] = ("xavier",)
    """Inits of the FTN rows; the papers': Xavier on every factor."""
    transforms: Literal["decathlon", "small"] = "decathlon"
    """decathlon: 72 px for signs, characters and digits, else random crops of 64.
    small: as experiments.multi_domain, at image_px."""
    decay_by_set: bool = True
    """Weight decay by data set (`ftn_jax.decathlon.DECAY`: 2e-3 for few images, 5e-4,
    1e-4 for many) on all that SGD trains; else adapter_decay and baseline_decay."""
    schedule: Schedule = "steps"
    """steps: a tenth of the rate after 2/3 and again after 5/6 of all steps (epochs 80
    and 100 of 120); or cosine, constant."""
    check: bool = True
    """Compare counts of classes and images with the published ones."""
    epochs: int = 120
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    rates: tuple[float, ...] = (1e-1,)
    """SGD's peak rate on norms and head, without factors; several are candidates."""
    adapter_rates: tuple[float, ...] = (1e-1,)
    """SGD's peak rate on residual adapters; several are candidates."""
    ftn_rate: float = 1e-1
    """SGD's peak rate on norms and head, beside adapters and factors."""
    fine_tuning_rates: tuple[float, ...] = (1e-1,)
    """SGD's peak rate on whole weights; several are candidates."""
    validation: float = 0.0
    """Share of the training images held out to choose rates."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            backbone="cifar_resnet8",
            workdir=Path("runs/decathlon_tiny"),
            domains=(),
            methods=("parallel_adapters",),
            placements=("late",),
            dropouts=(),
            svd_ranks=(),
            transforms="small",
            image_px=16,
            crop_padding=2,
            max_train=96,
            max_test=64,
            batch_size=16,
            epochs=1,
        )


def main(cfg: Config) -> Results:
    """Adapt the network to every set; print the table and the scores."""
    backbone, domains = multi_domain.load_backbone(cfg), load(cfg)
    pairs = {d.name: transforms(cfg, d) for d in domains}
    results = multi_domain.fill(
        cfg,
        "decathlon",
        backbone,
        domains,
        contenders(cfg, backbone),
        train_transform={name: pair[0] for name, pair in pairs.items()},
        eval_transform={name: pair[1] for name, pair in pairs.items()},
        schedule=cfg.schedule,
    )
    report(results)
    add_table(cfg.workdir / "scores.md", score_table(results.rows))
    return results


def load(cfg: Config) -> list[Domain]:
    """Read the sets, and compare their sizes with the published ones."""
    if cfg.data is None:
        return [load_digits().limited(train=cfg.max_train, test=cfg.max_test)]
    if not (cfg.data / "annotations").is_dir():
        return multi_domain.load_domains(cfg)
    domains = []
    for name in cfg.domains or DECATHLON:
        domain = load_decathlon(cfg.data, name)
        if cfg.check and name in DECATHLON:
            check_sizes(domain, DECATHLON[name])
        domains.append(domain.limited(train=cfg.max_train, test=cfg.max_test))
    return domains


def transforms(cfg: Config, domain: Domain) -> tuple[Compose, Compose]:
    """Make a set's training and evaluation transform, normalized by its own images."""
    if cfg.transforms == "small":
        return multi_domain.transforms(cfg)
    plain = decathlon_transforms(domain.name, normalize=Normalize())
    seen = Compose([ToRGB(), plain.test])
    found = decathlon_transforms(
        domain.name, normalize=measure_normalize(domain.train, seen)
    )
    return Compose([ToRGB(), found.train]), Compose([ToRGB(), found.test])


def contenders(cfg: Config, backbone: Backbone) -> dict[str, Contender]:
    """List the rows: the shelf's, then the study of adapters."""
    rows = shelf.contenders(cfg, backbone)

    def add(label: str, name: str, **options: str | float) -> None:
        rows[label] = shelf.contender(cfg, backbone, name, **options)

    for place in cfg.placements:
        add(f"parallel adapters, {place}", "parallel_adapters", placement=place)
    for share in cfg.dropouts:
        add(f"parallel adapters, dropout {share}", "parallel_adapters", dropout=share)
    for rank in cfg.svd_ranks:
        add(f"parallel adapters, SVD {rank}", "svd_adapters", rank=rank)
    if not cfg.decay_by_set:
        return rows
    return {
        label: row._replace(weight_decay=_by_set(row)) for label, row in rows.items()
    }


def _by_set(row: Contender) -> Callable[[str], Mapping[str, float]]:
    """Decay what SGD trains: factors and masks keep Adam's none."""
    groups = {*row.rates[0]} - {"factors", "masks"}
    return lambda name: dict.fromkeys(groups, DECAY.get(name, 5e-4))


def score_table(rows: Sequence[Row]) -> str:
    """Score every method that has all of the sets; else say what is missing.

    The backbone's own accuracy on ImageNet is no row of this experiment: all methods
    that leave the backbone as it is share it. Without it, the score is that of the
    other nine.
    """
    baseline = {name: v for name, v in BASELINE.items() if name != "imagenet12"}
    lines = [
        "| method | sets | score of nine | published, of nine |",
        "|---|--:|--:|--:|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and row.task in baseline]
        means = {
            name: sum(100 * r.value for r in own if r.task == name)
            / sum(r.task == name for r in own)
            for name in {row.task for row in own}
        }
        whole = {*means} == {*baseline}
        score = f"{decathlon_score(means, baseline=baseline):.0f}" if whole else "–"
        printed = [
            decathlon_score(
                {k: v for k, v in row.accuracies.items() if k in baseline},
                baseline=baseline,
            )
            for row in PUBLISHED
            if row.method == f"{method} (2018)"
        ]
        beside = f"{printed[0]:.0f}" if printed else "–"
        lines.append(f"| {method} | {len(means)} | {score} | {beside} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch(Config, main)
