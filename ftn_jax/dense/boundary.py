"""The boundary benchmark: thin both maps, match them one to one, count.

Thinning is scikit-image's (it equals MATLAB's `bwmorph(..., "thin", inf)`), matching
is SciPy's: the largest number of pairs within the radius. The original benchmark finds
a matching of least cost in a graph with random outliers, which can have a few pairs
less.

Source: Martin, Fowlkes and Malik (2004), "Learning to detect natural image
boundaries"; Arbelaez et al. (2011), "Contour detection and hierarchical image
segmentation", section 3.1.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Image = tuple[np.ndarray, Sequence[np.ndarray]]


class BoundaryScores(NamedTuple):
    """What the benchmark says of a set of predictions.

    Attributes:
        ods_f: F at the one threshold that is best for the whole set (odsF).
        ois_f: F with the best threshold of each image (oisF).
        ap: area under the curve of precision over recall.
        threshold: the one of `ods_f`.
        precision: at each threshold.
        recall: at each threshold.
        thresholds: between 0 and 1.
    """

    ods_f: float
    ois_f: float
    ap: float
    threshold: float
    precision: Float[np.ndarray, " t"]
    recall: Float[np.ndarray, " t"]
    thresholds: Float[np.ndarray, " t"]


def thin(edges: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Thin lines to a width of one pixel."""
    from skimage import morphology

    return morphology.thin(edges)


def match_pixels(
    predicted: Bool[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
    *,
    radius: float,
) -> Bool[np.ndarray, " n"]:
    """Match predicted to true pixels one to one, as many as can be.

    Args:
        predicted: thin map.
        truth: thin map of the same size.
        radius: largest distance of a pair, in pixels.

    Returns:
        For each predicted pixel, in reading order, whether it has a partner.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    rows, columns = np.nonzero(predicted)
    count = int(truth.sum())
    if not len(rows) or not count:
        return np.zeros(len(rows), bool)
    reach = int(radius)
    index = np.full(np.add(truth.shape, 2 * reach), -1)
    inner = index[reach : reach + truth.shape[0], reach : reach + truth.shape[1]]
    inner[truth] = np.arange(count)
    steps = np.arange(-reach, reach + 1)
    sources, targets = [], []
    for down in steps:
        for right in steps[steps**2 + down**2 <= radius**2]:
            found = index[rows + down + reach, columns + right + reach]
            hit = np.flatnonzero(found >= 0)
            sources.append(hit)
            targets.append(found[hit])
    source, target = np.concatenate(sources), np.concatenate(targets)
    graph = csr_array(
        (np.ones(len(source), bool), (source, target)), (len(rows), count)
    )
    return maximum_bipartite_matching(graph, perm_type="column") >= 0


def count_matches(
    probability: Shaped[np.ndarray, "h w"],
    truths: Sequence[Bool[np.ndarray, "h w"]],
    *,
    thresholds: Float[np.ndarray, " t"],
    max_dist: float = 0.0075,
    thin_truth: bool = True,
) -> Int[np.ndarray, "t 4"]:
    """Count one image's matches at every threshold.

    Args:
        probability: of a boundary, 0 to 1 (or uint8, 0 to 255).
        truths: one map for each annotator.
        thresholds: values from here on are boundaries.
        max_dist: largest distance of a pair, as a share of the image's diagonal.
        thin_truth: thin the annotators' maps too.

    Returns:
        Matched true pixels, all true pixels (each summed over the annotators), matched
        predicted pixels (with any annotator), all predicted pixels.
    """
    if probability.dtype == np.uint8:
        probability = probability / 255.0
    radius = max_dist * float(np.hypot(*probability.shape))
    truths = [thin(t.astype(bool)) if thin_truth else t.astype(bool) for t in truths]
    all_true = sum(int(t.sum()) for t in truths)
    counts = np.zeros((len(thresholds), 4), np.int64)
    counts[:, 1] = all_true
    for i, threshold in enumerate(thresholds):
        predicted = thin(probability >= threshold)
        matched = [match_pixels(predicted, t, radius=radius) for t in truths]
        counts[i, 0] = sum(int(m.sum()) for m in matched)
        counts[i, 2] = np.any(matched, axis=0).sum() if matched else 0
        counts[i, 3] = predicted.sum()
    return counts


def benchmark(
    images: Iterable[Image],
    *,
    thresholds: int = 99,
    max_dist: float = 0.0075,
    interpolate: bool = True,
    processes: int | None = None,
    title: str | None = None,
) -> BoundaryScores:
    """Judge a set of boundary maps.

    Args:
        images: pairs of a probability map and its annotators' maps.
        thresholds: number of them, evenly between 0 and 1.
        max_dist: see `count_matches`: 0.0075 on BSDS500 and in seism's default, 0.011
            in the published NYUD numbers.
        interpolate: look for the best F between neighbouring thresholds too, as the
            BSDS code does; without, at the thresholds alone, as seism does.
        processes: worker processes, default one for each CPU; 1 works in this one.
        title: of a progress bar; none without.

    Raises:
        ValueError: if there is no image.
    """
    values = np.arange(1, thresholds + 1) / (thresholds + 1)
    work = partial(_count, thresholds=values, max_dist=max_dist)
    images = list(images)
    if not images:
        raise ValueError("no image to judge")
    processes = min(processes or os.cpu_count() or 1, len(images))
    with _progress(title, len(images)) as seen:
        if processes == 1:
            counts = [seen(work(image)) for image in images]
        else:
            # Spawned, not forked: the parent may hold an accelerator and threads.
            context = get_context("spawn")
            with ProcessPoolExecutor(processes, mp_context=context) as pool:
                counts = [seen(c) for c in pool.map(work, images)]
    return scores(np.stack(counts), values, interpolate=interpolate)


def _count(image: Image, **options: Any) -> Int[np.ndarray, "t 4"]:
    return count_matches(image[0], image[1], **options)


def _progress(title: str | None, images: int) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        if title is None:
            yield lambda counts: counts
            return
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=images)

            def seen(counts: Any) -> Any:
                progress.advance(task)
                return counts

            yield seen

    return bar()


def scores(
    counts: Int[np.ndarray, "n t 4"],
    thresholds: Float[np.ndarray, " t"],
    *,
    interpolate: bool = True,
) -> BoundaryScores:
    """Make the benchmark's numbers of the counts of all images."""
    recall, precision = _rates(counts.sum(axis=0))
    best = partial(_best_f, interpolate=interpolate)
    ods_f, threshold = best(recall, precision, thresholds)
    chosen = []
    for own in counts:
        f, at = best(*_rates(own), thresholds)
        chosen.append(own[int(np.argmin(np.abs(thresholds - at)))])
    ois_recall, ois_precision = _rates(np.sum(chosen, axis=0))
    return BoundaryScores(
        ods_f=ods_f,
        ois_f=float(_f(ois_recall, ois_precision)),
        ap=_area(recall, precision),
        threshold=threshold,
        precision=precision,
        recall=recall,
        thresholds=thresholds,
    )


def _rates(counts: Int[np.ndarray, "*t 4"]) -> tuple[np.ndarray, np.ndarray]:
    hit, true, right, predicted = np.moveaxis(counts, -1, 0)
    return hit / np.maximum(true, 1), right / np.maximum(predicted, 1)


def _f(recall: Any, precision: Any) -> Any:
    return 2 * recall * precision / np.maximum(recall + precision, 1e-300)


def _best_f(
    recall: Float[np.ndarray, " t"],
    precision: Float[np.ndarray, " t"],
    thresholds: Float[np.ndarray, " t"],
    *,
    interpolate: bool,
) -> tuple[float, float]:
    if interpolate and len(thresholds) > 1:
        places = np.arange(len(thresholds))
        dense = np.linspace(0, len(thresholds) - 1, 99 * (len(thresholds) - 1) + 1)
        recall, precision, thresholds = (
            np.interp(dense, places, x) for x in (recall, precision, thresholds)
        )
    f = _f(recall, precision)
    best = int(np.argmax(f))
    return float(f[best]), float(thresholds[best])


def _area(recall: Float[np.ndarray, " t"], precision: Float[np.ndarray, " t"]) -> float:
    """Integrate precision over recall in steps of 0.01; outside the curve it is 0."""
    unique, places = np.unique(recall, return_index=True)
    grid = np.linspace(0, 1, 101)
    curve = np.interp(grid, unique, precision[places], left=0.0, right=0.0)
    return float(0.01 * curve.sum())
