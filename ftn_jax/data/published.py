"""Published sizes of data sets, to tell a whole copy from an incomplete one."""

from collections.abc import Mapping
from typing import NamedTuple

from ftn_jax.data.domain import Domain, Source


class Sizes(NamedTuple):
    """Counts of a data set; `None` is not checked."""

    classes: int
    train: int
    test: int | None
    validation: int | None = None


IMAGENET_TO_SKETCH: Mapping[str, Sizes] = {
    "cubs_cropped": Sizes(200, 5_994, 5_794),
    "stanford_cars_cropped": Sizes(196, 8_144, 8_041),
    "flowers": Sizes(102, 2_040, 6_149),
    "wikiart": Sizes(195, 42_129, 10_628),
    "sketches": Sizes(250, 16_000, 4_000),
}
"""Folders of Piggyback's archive (Mallya et al. 2018); `flowers` trains on the official
training and validation parts; the 4,000 test sketches follow from 20,000 in all."""

DOMAINNET: Mapping[str, Sizes] = {
    "clipart": Sizes(345, 33_525, 14_604),
    "infograph": Sizes(345, 36_023, 15_582),
    "painting": Sizes(345, 50_416, 21_850),
    "quickdraw": Sizes(345, 120_750, 51_750),
    "real": Sizes(345, 120_906, 52_041),
    "sketch": Sizes(345, 48_212, 20_916),
}
"""The cleaned version (Peng et al. 2019)."""

DECATHLON: Mapping[str, Sizes] = {
    "aircraft": Sizes(100, 3_334, 3_333),
    "cifar100": Sizes(100, 40_000, 10_000),
    "daimlerpedcls": Sizes(2, 23_520, 5_880),
    "dtd": Sizes(47, 1_880, 1_880),
    "gtsrb": Sizes(43, 31_367, 7_842),
    "imagenet12": Sizes(1_000, 1_232_167, 49_000),
    "omniglot": Sizes(1_623, 17_853, 6_492),
    "svhn": Sizes(10, 47_217, 26_040),
    "ucf101": Sizes(101, 7_585, 1_952),
    "vgg-flowers": Sizes(102, 1_020, 1_020),
}
"""Visual Decathlon (Rebuffi et al. 2017); the test labels are withheld, so that its
validation images are counted as test images."""

FER2013 = Sizes(7, 28_709, 3_589, 3_589)
"""Facial expressions (Goodfellow et al. 2013): Training, PrivateTest, PublicTest."""


def check_sizes(domain: Domain, expected: Sizes) -> Domain:
    """Return the domain if it has the published size.

    Raises:
        ValueError: lists every count that differs.
    """
    found = {"classes": domain.num_classes} | {
        part: _length(getattr(domain, part)) for part in expected._fields[1:]
    }
    wrong = [
        f"{part}: found {found[part]:,}, published {wanted:,}"
        for part, wanted in expected._asdict().items()
        if wanted is not None and found[part] != wanted
    ]
    if wrong:
        raise ValueError(
            f"{domain.name}: {'; '.join(wrong)}; the copy is incomplete or another "
            "version: get the archives again and extract them whole, or leave this "
            "check out if the other size is meant"
        )
    return domain


def _length(source: Source | None) -> int:
    return 0 if source is None else len(source)
