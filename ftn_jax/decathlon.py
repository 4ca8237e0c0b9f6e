"""The Visual Decathlon's score: ten errors, each against twice a baseline's.

Source: Rebuffi, Bilen, Vedaldi, "Learning multiple visual domains with residual
adapters" (arXiv 1705.08045), section 4.
"""

from collections.abc import Mapping
from typing import NamedTuple

NAMES = (
    "imagenet12",
    "aircraft",
    "cifar100",
    "daimlerpedcls",
    "dtd",
    "gtsrb",
    "vgg-flowers",
    "omniglot",
    "svhn",
    "ucf101",
)
"""The ten data sets, in the order of the papers' tables."""


def _named(*accuracies: float) -> dict[str, float]:
    return dict(zip(NAMES, accuracies, strict=True))


BASELINE: Mapping[str, float] = _named(
    59.87, 60.34, 82.12, 92.82, 55.53, 97.53, 81.41, 87.69, 96.55, 51.20
)
"""Test accuracy in % of the fully fine-tuned networks that score 2,500 in all."""

DECAY: Mapping[str, float] = {
    "aircraft": 2e-3,
    "dtd": 2e-3,
    "vgg-flowers": 2e-3,
    "omniglot": 5e-4,
    "daimlerpedcls": 5e-4,
    "ucf101": 5e-4,
    "cifar100": 1e-4,
    "gtsrb": 1e-4,
    "svhn": 1e-4,
    "imagenet12": 1e-4,
}
"""Weight decay of each data set's adapters: the fewer images, the more (Rebuffi et al.
2018, section 4; ImageNet's, which they do not adapt to, counts as large)."""


def decathlon_score(
    accuracies: Mapping[str, float],
    *,
    baseline: Mapping[str, float] = BASELINE,
    exponent: float = 2.0,
) -> float:
    """Add up what each data set earns: 1,000 for no error, 250 for the baseline's.

    `sum_d 1000 * (max(0, E_d - e_d) / E_d)^exponent`, where e_d is the error and
    E_d twice the baseline's. Ten perfect data sets are 10,000 points.

    Args:
        accuracies: test accuracy in % by data set.
        baseline: likewise, of the network to compare with; it must be below 100.
        exponent: more than 1 rewards what is nearly perfect.

    Raises:
        ValueError: if a data set of the baseline is absent or an unknown one is there,
            or an accuracy is not between 0 and 100, as shares would be.
    """
    if {*accuracies} != {*baseline}:
        missing, unknown = {*baseline} - {*accuracies}, {*accuracies} - {*baseline}
        raise ValueError(
            "the score needs the data sets of its baseline; missing "
            f"{sorted(missing)}, unknown {sorted(unknown)}"
        )
    if odd := {k: v for k, v in accuracies.items() if not 0 <= v <= 100}:
        raise ValueError(f"accuracies must be between 0 and 100 %, found {odd}")
    if 0 < max(accuracies.values()) <= 1:
        raise ValueError(
            f"accuracies are in %, found none above {max(accuracies.values())}: "
            "multiply shares by 100"
        )
    total = 0.0
    for name, reference in baseline.items():
        if not 0 <= reference < 100:
            raise ValueError(f"baseline: found {reference} for {name}, expected < 100")
        worst = 2 * (100 - reference)
        gain = max(0.0, worst - (100 - accuracies[name])) / worst
        total += 1000 * gain**exponent
    return total


class PublishedRow(NamedTuple):
    """A row of the papers' tables.

    Attributes:
        method: as named there.
        size: parameters of all ten networks, times one network's, as printed.
        accuracies: in %, by data set.
        mean: as printed.
        score: as printed.
    """

    method: str
    size: float
    accuracies: Mapping[str, float]
    mean: float
    score: int


# The accuracies were written down from memory of the tables; each row is held by two
# printed figures, its mean and its score (tests/test_decathlon.py). Rows of which not
# all ten accuracies were at hand (adapters early, mid, late, half) are left out.
PUBLISHED = tuple(
    PublishedRow(method, size, _named(*accuracies), mean, score)
    for method, size, accuracies, mean, score in (
        (
            "scratch (2017)",
            10,
            (59.87, 57.10, 75.73, 91.20, 37.77, 96.55, 56.30, 88.74, 96.63, 43.27),
            70.32,
            1625,
        ),
        (
            "feature extractor (2017)",
            1,
            (59.67, 23.31, 63.11, 80.33, 45.37, 68.16, 73.69, 58.79, 43.54, 26.80),
            54.28,
            544,
        ),
        ("fine-tuning (2017)", 10, tuple(BASELINE.values()), 76.51, 2500),
        (
            "learning without forgetting (2017)",
            10,
            (59.87, 61.15, 82.23, 92.34, 58.83, 97.57, 83.05, 88.08, 96.10, 50.04),
            76.93,
            2515,
        ),
        (
            "BN + head (2017)",
            1,
            (59.87, 43.05, 78.62, 92.07, 51.60, 95.82, 74.14, 84.83, 94.10, 43.51),
            71.76,
            1363,
        ),
        (
            "series adapters (2017)",
            2,
            (59.67, 56.68, 81.20, 93.88, 50.85, 97.05, 66.24, 89.62, 96.13, 47.45),
            73.88,
            2118,
        ),
        (
            "series adapters, decay by data set (2017)",
            2,
            (59.67, 61.87, 81.20, 93.88, 57.13, 97.57, 81.67, 89.62, 96.13, 50.12),
            76.89,
            2621,
        ),
        (
            "series adapters, fine-tuned backbone (2017)",
            2,
            (59.23, 63.73, 81.31, 93.30, 57.02, 97.47, 83.43, 89.82, 96.17, 50.28),
            77.17,
            2643,
        ),
        (
            "fine-tuning (2018)",
            10,
            (60.32, 60.34, 82.12, 92.82, 55.53, 99.42, 81.41, 89.12, 96.55, 51.20),
            76.88,
            3096,
        ),
        (
            "series adapters (2018)",
            2,
            (60.32, 61.87, 81.22, 93.88, 57.13, 99.27, 81.67, 89.62, 96.57, 50.12),
            77.17,
            3159,
        ),
        (
            "parallel adapters (2018)",
            2,
            (60.32, 64.21, 81.91, 94.73, 58.83, 99.38, 84.68, 89.21, 96.54, 50.94),
            78.07,
            3412,
        ),
        (
            "parallel adapters, joint SVD (2018)",
            1.5,
            (60.32, 66.04, 81.86, 94.23, 57.82, 99.24, 85.74, 89.25, 96.62, 52.50),
            78.36,
            3398,
        ),
    )
)
