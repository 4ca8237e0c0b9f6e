"""ImageNet-to-Sketch: birds, cars, flowers, paintings and sketches on one ResNet-50.

    python -m experiments.imagenet_to_sketch --data DIR --weights resnet50.safetensors

DIR is Piggyback's archive: a folder for each of cubs_cropped, stanford_cars_cropped,
flowers, wikiart and sketches, with train/CLASS/*.jpg and test/CLASS/*.jpg. Without the
archive, --boxes original cuts birds and cars out of their authors' files (CUB_200_2011/
and stanford_cars/ in DIR). The defaults are the papers' settings: FTN (arXiv
2310.06124), Table 1 and supplement A.1, with the weights IMAGENET1K_V1 of torchvision.

Cost: 30 epochs of 74,000 images at 224 px for every row. It was not run here, where
neither images nor weights are; docs/domains.md has the same rows on small domains.
Expected: parameters as printed, in `ftn_jax.published`, two of which do not follow from
the papers' own text; the papers' accuracies could not be read again while this was
written and are left out. They compare best epochs on test images: --select best_on_test
does so too, and no number made with it estimates what new images would give.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import multi_domain
from ftn_jax.command import launch
from ftn_jax.data import (
    IMAGENET_TO_SKETCH,
    Compose,
    Domain,
    ToRGB,
    check_sizes,
    cropped_transforms,
    imagenet_transforms,
    load_cars,
    load_cub,
    load_digits,
    load_folder,
)
from ftn_jax.nodes.cp import CPInit
from ftn_jax.paper_table import paper_table
from ftn_jax.published import printed_parameters
from ftn_jax.results import Results
from ftn_jax.shelf import contenders
from ftn_jax.tables import add_table, report

CROPPED = ("cubs_cropped", "stanford_cars_cropped")


@dataclass(frozen=True)
class Config(multi_domain.Config):
    """Settings of ImageNet-to-Sketch; these differ from multi_domain's, or add."""

    backbone: str = "resnet50"
    """Name in ftn_jax.models.RESNETS."""
    workdir: Path = Path("runs/imagenet_to_sketch")
    """Folder for the table, the picture and the saved tasks."""
    domains: tuple[str, ...] = tuple(IMAGENET_TO_SKETCH)
    """Folders of the archive."""
    ranks: tuple[int, ...] = (1, 5, 10, 15, 20, 25, 50)
    """Ranks of the FTN rows; the papers'."""
    inits: tuple[CPInit, ...] = ("xavier",)
    """Inits of the FTN rows; the papers': Xavier on every factor."""
    image_px: int = 224
    """Height and width that the network sees."""
    test_resize: Literal[224, 256] = 224
    """Shorter side of test images before the centre crop: 224 as TAPS, whose
    augmentation the papers adopt, or 256 as Piggyback."""
    train_resize: int | None = None
    """Shorter side of training images before the random crop: none as TAPS, 256 as
    Piggyback."""
    boxes: Literal["archive", "original"] = "archive"
    """Birds and cars: the archive's own crops, or cut from the original images."""
    box_margin: float = 0.0
    """With --boxes original: widen each side of a box by this share of its size; the
    archive's margin is not documented."""
    check: bool = True
    """Compare counts of classes and images with the published ones."""
    validation: float = 0.0
    """Share of the training images held out to choose rates; the papers name none."""
    rates: tuple[float, ...] = (5e-3,)
    """SGD's peak rate on norms and head, without factors; several are candidates."""
    factor_rates: tuple[float, ...] = (5e-3,)
    """Adam's peak rate on factors; several are candidates."""
    ftn_rate: float = 8e-3
    """SGD's peak rate on norms and head, beside factors."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            backbone="cifar_resnet8",
            workdir=Path("runs/imagenet_to_sketch_tiny"),
            domains=(),
            methods=("bn_head", "ftn"),
            ranks=(2,),
            image_px=16,
            max_train=96,
            max_test=64,
            batch_size=16,
            epochs=1,
        )


def main(cfg: Config) -> Results:
    """Adapt the network to every set; print the tables."""
    backbone, domains = multi_domain.load_backbone(cfg), load(cfg)
    results = multi_domain.fill(
        cfg,
        "imagenet_to_sketch",
        backbone,
        domains,
        contenders(cfg, backbone),
        train_transform={d.name: transforms(cfg, d.name)[0] for d in domains},
        eval_transform={d.name: transforms(cfg, d.name)[1] for d in domains},
    )
    report(results)
    table = paper_table(
        results.rows,
        published=printed_parameters(
            "ImageNet-to-Sketch", results.rows, backbone=cfg.backbone
        ),
    )
    add_table(
        cfg.workdir / "paper_table.md",
        table,
        heading="as the papers' Table 1, their printed figures in brackets:",
    )
    return results


def load(cfg: Config) -> list[Domain]:
    """Read the sets, and compare their sizes with the published ones."""
    if cfg.data is None:
        return [load_digits().limited(train=cfg.max_train, test=cfg.max_test)]
    domains = []
    for name in cfg.domains or IMAGENET_TO_SKETCH:
        domain = _read(cfg, cfg.data, name)
        if cfg.check and name in IMAGENET_TO_SKETCH:
            check_sizes(domain, IMAGENET_TO_SKETCH[name])
        domains.append(domain.limited(train=cfg.max_train, test=cfg.max_test))
    return domains


def _read(cfg: Config, data: Path, name: str) -> Domain:
    if cfg.boxes == "original" and name == "cubs_cropped":
        return load_cub(data / "CUB_200_2011", margin=cfg.box_margin)
    if cfg.boxes == "original" and name == "stanford_cars_cropped":
        return load_cars(data / "stanford_cars", margin=cfg.box_margin)
    return load_folder(data / name, skip_bad=cfg.skip_bad)


def transforms(cfg: Config, name: str) -> tuple[Compose, Compose]:
    """Make a set's training and evaluation transform."""
    if name in CROPPED or name in ("cub", "cars"):
        found = cropped_transforms(size=cfg.image_px)
    else:
        found = imagenet_transforms(
            test_resize=cfg.test_resize,
            train_resize=cfg.train_resize,
            size=cfg.image_px,
        )
    return Compose([ToRGB(), found.train]), Compose([ToRGB(), found.test])


if __name__ == "__main__":
    launch(Config, main)
