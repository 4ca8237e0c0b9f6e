"""What each dense task is trained on and judged by."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Shaped

from ftn_jax.dense import losses, metrics
from ftn_jax.dense.boundary import benchmark
from ftn_jax.measure import Measure
from ftn_jax.metrics import Sums
from ftn_jax.train import Loss

RMSE = Literal["rmse", "image_rmse", "image_rmse_with_gaps"]


def semseg(
    *, classes: int = 41, absent: Literal["zero", "skip"] = "zero", weight: float = 1.0
) -> Measure:
    """Segment: cross-entropy, mean intersection over union.

    Args:
        classes: 41 with the background, or 40 without; see `losses.shifted_labels`.
        absent: see `metrics.semseg_scores`.
        weight: of the loss.
    """

    def collect(outputs: Any, batch: Mapping[str, Any]) -> metrics.Totals:
        truth = losses.shifted_labels(np.asarray(batch["semseg"]), classes=classes)
        truth = np.asarray(truth)
        valid = (truth != losses.IGNORED) & inside(batch)
        predicted = np.asarray(outputs).argmax(axis=-1)
        return metrics.semseg_sums(predicted, truth, valid, classes=classes)

    loss = partial(losses.cross_entropy, weight=weight)
    return _summed(
        loss, collect, partial(metrics.semseg_scores, absent=absent), metric="mIoU"
    )


def depth(*, metric: RMSE = "image_rmse_with_gaps", weight: float = 1.0) -> Measure:
    """Estimate depth: absolute error, root mean square error in metres.

    Args:
        metric: one of those of `metrics.depth_scores`; default RCM's and ASTMT's.
        weight: of the loss.
    """

    def collect(outputs: Any, batch: Mapping[str, Any]) -> metrics.Totals:
        truth = np.asarray(batch["depth"])
        return metrics.depth_sums(np.asarray(outputs)[..., 0], truth, inside(batch))

    return _summed(
        partial(losses.depth_l1, weight=weight),
        collect,
        metrics.depth_scores,
        metric=metric,
        higher_is_better=False,
        percent=False,
    )


def normals(*, png: bool = True, weight: float = 10.0) -> Measure:
    """Estimate surface normals: absolute error, mean angle in degrees.

    Args:
        png: see `metrics.normals_sums`.
        weight: of the loss.
    """

    def collect(outputs: Any, batch: Mapping[str, Any]) -> metrics.Totals:
        truth = np.asarray(batch["normals"])
        return metrics.normals_sums(np.asarray(outputs), truth, inside(batch), png=png)

    return _summed(
        partial(losses.normals_l1, weight=weight),
        collect,
        metrics.normals_scores,
        metric="mean_angle",
        higher_is_better=False,
        percent=False,
    )


def edges(
    *,
    weight: float = 50.0,
    positive: float = 0.95,
    threshold: float = 0.5,
    thresholds: int = 99,
    max_dist: float = 0.0075,
    interpolate: bool = True,
    processes: int | None = None,
    title: str | None = None,
) -> Measure:
    """Find edges: weighted cross-entropy, odsF of the boundary benchmark.

    Predictions are rounded to 8 bits, as published evaluations store them. The truth
    is `batch["annotators"]`, (b, h, w, n) with 255 where there are fewer than n, and
    otherwise `batch["edge"]` from `threshold` on.

    Args:
        weight: of the loss.
        positive: see `losses.edge_cross_entropy`.
        threshold: from here on a pixel of `batch["edge"]` is one.
        thresholds: see `boundary.benchmark`, as all that follow.
        max_dist: 0.011 for NYUD.
        interpolate: not for NYUD.
        processes: default one for each CPU.
        title: of a progress bar.
    """
    loss = partial(
        losses.edge_cross_entropy,
        weight=weight,
        positive=positive,
        threshold=threshold,
    )

    def collect(outputs: Any, batch: Mapping[str, Any]) -> Any:
        probability = np.asarray(jax.nn.sigmoid(outputs[..., 0]), np.float32)
        stored = (probability * 255).astype(np.uint8)
        known = inside(batch)
        images = []
        for i in np.flatnonzero(np.asarray(batch["mask"]) > 0):
            if not known[i].any():
                continue
            truths = [np.asarray(batch["edge"])[i]]
            truths = [(truths[0] >= threshold) & (truths[0] <= losses.LARGEST_EDGE)]
            if "annotators" in batch:
                maps = np.moveaxis(np.asarray(batch["annotators"])[i], -1, 0)
                truths = [m == 1 for m in maps if m[known[i]].max() <= 1]
            images.append(
                (_cut(stored[i], known[i]), [_cut(t, known[i]) for t in truths])
            )
        return images, loss(outputs, batch)

    def score(collected: Sequence[Any]) -> dict[str, Any]:
        found = benchmark(
            [image for images, _ in collected for image in images],
            thresholds=thresholds,
            max_dist=max_dist,
            interpolate=interpolate,
            processes=processes,
            title=title,
        )
        return {
            "odsF": found.ods_f,
            "oisF": found.ois_f,
            "AP": found.ap,
            "threshold": found.threshold,
            "curve": np.stack([found.recall, found.precision], axis=-1).tolist(),
            "loss": _mean([sums for _, sums in collected]),
        }

    return Measure(loss=loss, collect=collect, score=score, metric="odsF")


def inside(batch: Mapping[str, Any]) -> Bool[np.ndarray, "b h w"]:
    """Tell which pixels are of a picture that counts, not of its padding."""
    height, width = batch["image"].shape[1:3]
    real = np.asarray(batch["mask"])[:, None, None] > 0
    within = np.asarray(batch.get("inside", np.ones((1, height, width)))) > 0
    return real & within


def _cut(
    array: Shaped[np.ndarray, "h w"], known: Bool[np.ndarray, "h w"]
) -> Shaped[np.ndarray, "h2 w2"]:
    rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
    return array[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _summed(
    loss: Loss,
    collect: Callable[[Any, Mapping[str, Any]], metrics.Totals],
    score: Callable[[metrics.Totals], dict[str, float]],
    **options: Any,
) -> Measure:
    """Make a measure whose numbers follow from sums over batches."""

    def both(outputs: Any, batch: Mapping[str, Any]) -> Any:
        return collect(outputs, batch), loss(outputs, batch)

    def scores(collected: Sequence[Any]) -> dict[str, float]:
        numbers = score(metrics.total([totals for totals, _ in collected]))
        return numbers | {"loss": _mean([sums for _, sums in collected])}

    return Measure(loss=loss, collect=both, score=scores, **options)


def _mean(parts: Sequence[Sums]) -> float:
    loss, count = (sum(float(p[name]) for p in parts) for name in ("loss", "count"))
    return loss / count if count else float("nan")
