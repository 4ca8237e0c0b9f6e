"""Metrics of dense tasks: sums of one batch, and numbers of a whole set.

What a function named `..._sums` gives for every batch is added up by `total`; the
function named `..._scores` makes numbers of the total. All on the host, in float64.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Totals = Mapping[str, Any]

DEPTH_FLOOR = 1e-9
SHARES = (11.25, 22.5, 30.0)
_ANGLE_BINS = 18_000  # of a hundredth of a degree


def total(parts: Sequence[Totals]) -> Totals:
    """Add up the sums of all batches.

    Raises:
        ValueError: if there is none.
    """
    if not parts:
        raise ValueError("nothing was evaluated: the source is empty")
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def semseg_sums(
    predicted: Int[np.ndarray, "b h w"],
    truth: Int[np.ndarray, "b h w"],
    valid: Bool[np.ndarray, "b h w"],
    *,
    classes: int,
) -> Totals:
    """Count hits, false alarms and misses of every class."""
    pairs = classes * truth[valid].astype(np.int64) + predicted[valid]
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    hits = np.diag(confusion)
    return {
        "hits": hits,
        "false_alarms": confusion.sum(axis=0) - hits,
        "misses": confusion.sum(axis=1) - hits,
    }


def semseg_scores(totals: Totals, *, absent: str = "zero") -> dict[str, float]:
    """Give the mean intersection over union and the share of correct pixels.

    Args:
        totals: of the whole set.
        absent: a class that neither truth nor prediction has counts as `"zero"`, as
            RCM and ASTMT have it, or is left out by `"skip"`.
    """
    union = totals["hits"] + totals["false_alarms"] + totals["misses"]
    iou = totals["hits"] / np.maximum(union, 1)
    if absent == "skip":
        iou = iou[union > 0]
    pixels = (totals["hits"] + totals["misses"]).sum()
    return {
        "mIoU": float(iou.mean()) if len(iou) else 0.0,
        "pixel_accuracy": float(totals["hits"].sum() / max(pixels, 1)),
    }


def depth_sums(
    predicted: Float[np.ndarray, "b h w"],
    truth: Float[np.ndarray, "b h w"],
    inside: Bool[np.ndarray, "b h w"],
) -> Totals:
    """Sum squared errors over pixels, and root mean squares over images.

    Predictions of 0 and below become 1e-9, as published. The published mean over images
    also sets missing depth (0) to 1e-9 before it looks for valid pixels, so that
    missing pixels count as errors: `image_rmse_with_gaps`.
    """
    predicted = np.maximum(predicted.astype(np.float64), DEPTH_FLOOR)
    truth = np.where(np.isfinite(truth), truth, 0.0).astype(np.float64)
    valid = (truth != 0) & inside
    square = (predicted - truth) ** 2
    with_gaps = (predicted - np.where(truth == 0, DEPTH_FLOOR, truth)) ** 2
    roots, seen = _image_roots(square, valid)
    roots_with_gaps, seen_with_gaps = _image_roots(with_gaps, inside)
    return {
        "square": square[valid].sum(),
        "pixels": valid.sum(),
        "image_roots": roots,
        "images": seen,
        "image_roots_with_gaps": roots_with_gaps,
        "images_with_gaps": seen_with_gaps,
    }


def _image_roots(
    square: Float[np.ndarray, "b h w"], valid: Bool[np.ndarray, "b h w"]
) -> tuple[np.floating, np.integer]:
    pixels = valid.sum(axis=(1, 2))
    mean = np.where(valid, square, 0).sum(axis=(1, 2)) / np.maximum(pixels, 1)
    return np.sqrt(mean).sum(), (pixels > 0).sum()


def depth_scores(totals: Totals) -> dict[str, float]:
    """Give the root mean square error (metres), by three definitions.

    Returns:
        `"rmse"` over all pixels with depth; `"image_rmse"`, the mean over images of
        each image's; `"image_rmse_with_gaps"`, the same with missing pixels, as RCM
        and ASTMT compute it. NaN where nothing has depth.
    """

    def ratio(sums: str, count: str) -> float:
        return float(totals[sums] / totals[count]) if totals[count] else float("nan")

    return {
        "rmse": float(np.sqrt(ratio("square", "pixels"))),
        "image_rmse": ratio("image_roots", "images"),
        "image_rmse_with_gaps": ratio("image_roots_with_gaps", "images_with_gaps"),
    }


def through_png(vectors: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """Store unit vectors in 8 bits and read them back, as published evaluations do."""
    stored = np.clip((vectors.astype(np.float64) + 1) * 127.5, 0, 255).astype(np.uint8)
    return 2 * stored.astype(np.float64) / 255 - 1


def normals_sums(
    predicted: Float[np.ndarray, "b h w 3"],
    truth: Float[np.ndarray, "b h w 3"],
    inside: Bool[np.ndarray, "b h w"],
    *,
    png: bool = True,
) -> Totals:
    """Count angles (degrees) between predicted and true normals, to a hundredth.

    Args:
        predicted: vectors of any length.
        truth: the same; 0 and what is not finite is a gap.
        inside: pixels that are of the picture.
        png: round predictions to 8 bits first.
    """
    valid = np.isfinite(truth).all(-1) & (truth != 0).any(-1) & inside
    unit = _unit(predicted[valid].astype(np.float64))
    if png:
        unit = _unit(through_png(unit))
    cosine = (unit * _unit(truth[valid].astype(np.float64))).sum(-1)
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    place = np.minimum(angles * 100, _ANGLE_BINS - 1).astype(np.int64)
    sums = {f"within_{x:g}": (angles < x).sum() for x in SHARES}
    return sums | {
        "angles": angles.sum(),
        "pixels": np.asarray(len(angles)),
        "histogram": np.bincount(place, minlength=_ANGLE_BINS),
    }


def _unit(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def normals_scores(totals: Totals) -> dict[str, float]:
    """Give the mean and median angle (degrees) and the shares within three angles."""
    pixels = totals["pixels"]
    if not pixels:
        names = ("mean_angle", "median_angle", *(f"within_{x:g}" for x in SHARES))
        return dict.fromkeys(names, float("nan"))
    median = np.searchsorted(np.cumsum(totals["histogram"]), pixels / 2)
    return {
        "mean_angle": float(totals["angles"] / pixels),
        "median_angle": float(median + 0.5) / 100,
        **{f"within_{x:g}": float(totals[f"within_{x:g}"] / pixels) for x in SHARES},
    }


def delta_m(
    values: Mapping[str, float],
    single: Mapping[str, float],
    *,
    lower_is_better: Sequence[str] = (),
) -> float:
    """Give the mean relative change against single-task networks, in percent.

    Negative is worse than the single-task networks.

    Source: Maninis et al., "Attentive single-tasking of multiple tasks" (arXiv
    1904.08918), eq. 3.

    Raises:
        ValueError: if the two do not have the same tasks.
    """
    if {*values} != {*single} or not values:
        raise ValueError(f"found tasks {sorted(values)}, expected {sorted(single)}")
    changes = [
        (values[task] - single[task])
        / single[task]
        * (-1 if task in lower_is_better else 1)
        for task in values
    ]
    return 100 * float(np.mean(changes))
