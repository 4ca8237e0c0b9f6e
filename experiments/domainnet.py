"""DomainNet: six kinds of image of the same 345 things, on one ResNet-34.

    python -m experiments.domainnet --data DIR --weights resnet34.safetensors
    python -m experiments.domainnet --data DIR --weights resnet34.safetensors \\
        --joint --ranks 1

DIR holds the list files (clipart_train.txt, ...; also in txt/) beside the extracted
archives, or one image folder or `.npz` file for each domain. The defaults are the
papers' settings: FTN (arXiv 2310.06124), Table 2 and supplement A.2, and with --joint
its Table S1, where one network is first trained on all domains together and the rows
start from it. The papers' own weights are torchvision's IMAGENET1K_V1.

Cost: 30 epochs of 410,000 images at 224 px for every row, days on one accelerator. It
was not run here, where neither images nor weights are: docs/domains.md has the joint
setting on PACS. Expected: parameters as printed, in `ftn_jax.published`; the papers'
accuracies could not be read again while this was written and are left out.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from experiments import multi_domain
from ftn_jax.adapt import Evaluator
from ftn_jax.checkpoint import fingerprint
from ftn_jax.command import launch, progress_bar
from ftn_jax.data import (
    DOMAINNET,
    ArraySource,
    Compose,
    Domain,
    Source,
    ToRGB,
    check_sizes,
    describe,
    digest,
    imagenet_transforms,
    load_digits,
    load_domainnet,
)
from ftn_jax.joint import Joint, JointRecipe, joint_epoch, train_joint
from ftn_jax.method import Backbone
from ftn_jax.nodes.cp import CPInit
from ftn_jax.paper_table import paper_table
from ftn_jax.published import printed_parameters
from ftn_jax.results import Results
from ftn_jax.resume import StateFolder
from ftn_jax.shelf import contenders
from ftn_jax.sweep import hold_out, slug
from ftn_jax.tables import add_table, report
from ftn_jax.trial import Trained, finish, short_hash


@dataclass(frozen=True)
class Config(multi_domain.Config):
    """Settings of DomainNet; the fields below differ from multi_domain's, or add."""

    backbone: str = "resnet34"
    """Name in ftn_jax.models.RESNETS."""
    workdir: Path = Path("runs/domainnet")
    """Folder for the table, the picture and the saved tasks."""
    domains: tuple[str, ...] = tuple(DOMAINNET)
    """Names of the domains."""
    ranks: tuple[int, ...] = (1, 5, 10, 20, 30, 40)
    """Ranks of the FTN rows; those of the papers' Table 2 and Figure 3."""
    inits: tuple[CPInit, ...] = ("xavier",)
    """Inits of the FTN rows; the papers': Xavier on every factor."""
    transforms: Literal["imagenet", "small"] = "imagenet"
    """imagenet: random resized crop and flip, as TAPS, which the papers refer to.
    small: padding and random crop, as experiments.multi_domain, for images of 32 px."""
    image_px: int = 224
    """Height and width that the network sees."""
    test_resize: Literal[224, 256] = 224
    """Shorter side of test images before the centre crop. The papers refer to TAPS,
    whose code has 224; Piggyback's has 256."""
    validation: float = 0.0
    """Share of the training images held out to choose rates; the papers name none."""
    factor_rates: tuple[float, ...] = (5e-3,)
    """Adam's peak rate on factors; several are candidates."""
    ftn_rate: float = 5e-3
    """SGD's peak rate on norms and head, beside factors."""
    rates: tuple[float, ...] = (5e-3,)
    """SGD's peak rate on norms and head without factors; several are candidates."""
    baseline_decay: float = 1e-4
    """Weight decay of the rows without factors, masks or adapters."""
    check: bool = True
    """Compare DomainNet's counts of images with the published ones."""
    joint: bool = False
    """Start from one network trained on all domains together."""
    joint_epochs: int = 60
    """Passes of the joint training; this and the next four are those of TAPS's code,
    since the FTN papers give none for this setting."""
    joint_batch_size: int = 12
    """Images of each domain in a step of the joint training."""
    joint_rate: float = 1e-2
    """Peak rate of the joint training (TAPS tries 1e-2 and 5e-3)."""
    joint_decay: float = 0.0
    """Weight decay of the joint training."""
    joint_seed: int = 0
    """Seed of the joint training; all rows and seeds start from the one network."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            backbone="cifar_resnet8",
            workdir=Path("runs/domainnet_tiny"),
            domains=(),
            methods=("bn_head",),
            transforms="small",
            image_px=16,
            crop_padding=2,
            max_train=96,
            max_test=64,
            batch_size=16,
            epochs=1,
            joint=True,
            joint_epochs=1,
        )


def main(cfg: Config) -> Results:
    """Adapt the network, joint or not, to every domain; print the tables."""
    backbone, domains = multi_domain.load_backbone(cfg), load(cfg)
    train_transform, eval_transform = transforms(cfg)
    joint = None
    if cfg.joint:
        joint = train(cfg, backbone, domains, train_transform)
        backbone = joint.backbone
    results = multi_domain.fill(
        cfg,
        "domainnet",
        backbone,
        domains,
        contenders(cfg, backbone),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    if joint:
        test_joint(cfg, joint, domains, eval_transform, results)
    report(results)
    table = paper_table(
        results.rows,
        published=printed_parameters("DomainNet", results.rows, backbone=cfg.backbone),
        base_beside_copies=False,
    )
    add_table(
        cfg.workdir / "paper_table.md",
        table,
        heading="as the papers' Table 2, their printed figures in brackets:",
    )
    return results


def load(cfg: Config) -> list[Domain]:
    """Read DomainNet's lists, or whatever domains lie there."""
    if cfg.data is None:
        return [d.limited(train=cfg.max_train, test=cfg.max_test) for d in stand_ins()]
    if not [*cfg.data.glob("*_train.txt"), *cfg.data.glob("txt/*_train.txt")]:
        return multi_domain.load_domains(cfg)
    domains = [load_domainnet(cfg.data, name) for name in cfg.domains or DOMAINNET]
    if cfg.check:
        for domain in domains:
            check_sizes(domain, DOMAINNET[domain.name])
    return [d.limited(train=cfg.max_train, test=cfg.max_test) for d in domains]


def stand_ins() -> list[Domain]:
    """Two domains of the same classes: scikit-learn's digits, and their negatives."""
    digits = load_digits()

    def negative(source: Source) -> ArraySource:
        images = np.stack([source[n].image for n in range(len(source))])
        return ArraySource(255 - images, source.labels)

    inverse = replace(
        digits,
        name="negatives",
        train=negative(digits.train),
        test=negative(digits.test),
    )
    return [digits, inverse]


def transforms(cfg: Config) -> tuple[Compose, Compose]:
    """Make the training and the evaluation transform."""
    if cfg.transforms == "small":
        return multi_domain.transforms(cfg)
    found = imagenet_transforms(test_resize=cfg.test_resize, size=cfg.image_px)
    return Compose([ToRGB(), found.train]), Compose([ToRGB(), found.test])


def train(
    cfg: Config, backbone: Backbone, domains: list[Domain], transform: Compose
) -> Joint:
    """Train the joint network, or read it where it was.

    It sees nothing of what is held out to choose the rows' rates.
    """
    domains = [
        replace(d, train=hold_out(d, cfg.validation).train, validation=None)
        for d in domains
    ]
    recipe = JointRecipe(
        cfg.joint_epochs, cfg.joint_batch_size, cfg.joint_rate, cfg.joint_decay
    )
    start = "".join(fingerprint(backbone.shared).values())
    name = short_hash(
        recipe, cfg.joint_seed, transform, start, *(digest(d.train) for d in domains)
    )
    per_epoch = joint_epoch([d.train for d in domains], batch_size=recipe.batch_size)
    with progress_bar(
        "joint network",
        steps=recipe.epochs * per_epoch,
        batch_size=recipe.batch_size * len(domains),
    ) as on_log:
        return train_joint(
            backbone,
            domains,
            recipe,
            transform=transform,
            seed=cfg.joint_seed,
            folder=StateFolder(cfg.workdir / "joint" / name),
            on_log=on_log,
        )


def test_joint(
    cfg: Config,
    joint: Joint,
    domains: list[Domain],
    eval_transform: Compose,
    results: Results,
) -> None:
    """Add the row of the joint network with the heads it was trained with.

    The papers' "feature extractor" of Table S1 may be this or new heads on the frozen
    network (the row of that name here): they do not say.
    """
    name, network = (
        "joint network",
        "".join(fingerprint(joint.backbone.shared).values()),
    )
    for domain in domains:
        inputs = short_hash(network, digest(domain.train), digest(domain.test))
        if results.find(name, domain.name, cfg.joint_seed, inputs=inputs):
            continue
        row, _ = finish(
            Trained(joint.tasks[domain.name], {}, None, 0.0, 0),
            name=name,
            domain=domain,
            seed=cfg.joint_seed,
            backbone=joint.backbone,
            evaluator=Evaluator(
                joint.backbone, classes=domain.num_classes, transform=eval_transform
            ),
            preprocessing=describe(eval_transform),
            folder=cfg.workdir
            / "tasks"
            / slug(domain.name)
            / slug(name)
            / f"seed{cfg.joint_seed}",
            inputs=inputs,
            details={},
        )
        results.add(row)


if __name__ == "__main__":
    launch(Config, main)
