"""The boundary benchmark against exact matching and hand-made maps."""

import itertools
from functools import cache

import numpy as np
import pytest

from ftn_jax.dense import benchmark, boundary, count_matches


def slow_matches(predicted, truth, radius):
    """Largest one-to-one matching by trying every choice."""
    left = [tuple(p) for p in np.argwhere(predicted)]
    right = [tuple(p) for p in np.argwhere(truth)]
    near = {
        p: [
            j
            for j, q in enumerate(right)
            if (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= radius**2
        ]
        for p in left
    }

    @cache
    def best(i, used):
        if i == len(left):
            return 0
        found = best(i + 1, used)
        for j in near[left[i]]:
            if not used >> j & 1:
                found = max(found, 1 + best(i + 1, used | 1 << j))
        return found

    return best(0, 0)


@pytest.mark.parametrize("radius", [0.5, 1.0, 1.5, 2.3])
def test_matching_is_the_largest_there_is(radius):
    rng = np.random.default_rng(0)
    differs_from_greedy = 0
    for _ in range(20):
        predicted, truth = rng.random((2, 5, 6)) < 0.25
        found = boundary.match_pixels(predicted, truth, radius=radius)
        assert len(found) == predicted.sum()
        exact = slow_matches(predicted, truth, radius)
        assert found.sum() == exact
        differs_from_greedy += exact < predicted.sum()
    assert differs_from_greedy  # there was something to get wrong


def test_one_true_pixel_serves_one_prediction():
    truth = np.zeros((5, 5), bool)
    truth[2, 2] = True
    predicted = truth.copy()
    predicted[2, 1] = predicted[2, 3] = True
    assert boundary.match_pixels(predicted, truth, radius=2).sum() == 1
    assert boundary.match_pixels(truth, truth, radius=2).tolist() == [True]
    assert boundary.match_pixels(~truth & False, truth, radius=2).shape == (0,)


def line(column, size=(20, 30)):
    edge = np.zeros(size, bool)
    edge[2:18, column] = True
    return edge


def test_a_shift_matches_within_the_distance_and_not_beyond():
    diagonal = np.hypot(20, 30)
    for shift, expected in ((0, 1.0), (2, 1.0), (3, 0.0)):
        scores = benchmark(
            [(line(10 + shift).astype(float), [line(10)])],
            thresholds=3,
            max_dist=2.5 / diagonal,
            processes=1,
        )
        assert scores.ods_f == pytest.approx(expected)


def test_counts_by_hand_with_two_annotators():
    probability = np.where(line(10), 0.9, np.where(line(20), 0.4, 0.0))
    truths = [line(10), line(10) | line(25)]
    counts = count_matches(
        probability, truths, thresholds=np.asarray([0.3, 0.5]), max_dist=0.03
    )
    assert counts.tolist() == [[32, 48, 16, 32], [32, 48, 16, 16]]
    scores = boundary.scores(counts[None], np.asarray([0.3, 0.5]), interpolate=False)
    assert scores.recall == pytest.approx([2 / 3, 2 / 3])
    assert scores.precision == pytest.approx([0.5, 1.0])
    assert scores.ods_f == pytest.approx(0.8) and scores.threshold == 0.5


def test_ois_takes_each_images_threshold_and_ods_one_for_all():
    faint = np.where(line(10), 0.3, np.where(line(20), 0.1, 0))
    strong = np.where(line(10), 0.9, np.where(line(20), 0.6, 0))
    images = [(faint, [line(10)]), (strong, [line(10)])]
    scores = benchmark(images, thresholds=9, processes=1)
    assert scores.ois_f == pytest.approx(1.0)
    assert scores.ods_f == pytest.approx(2 * (2 / 3) / (1 + 2 / 3), abs=1e-2)
    alone = benchmark(images[:1], thresholds=9, processes=1)
    assert alone.ods_f == pytest.approx(1.0) == pytest.approx(alone.ois_f)


def test_area_of_a_perfect_detector_and_of_none():
    full = benchmark([(line(10).astype(float), [line(10)])], thresholds=5, processes=1)
    assert full.ap == pytest.approx(0.01)  # one recall: the curve is a single point
    ramp = np.zeros((20, 30))
    ramp[2:18, 10] = np.linspace(0.05, 1, 16)
    curve = benchmark([(ramp, [line(10)])], thresholds=19, processes=1)
    assert 0.9 < curve.ap <= 1.0
    none = benchmark([(np.zeros((20, 30)), [line(10)])], thresholds=5, processes=1)
    assert (none.ods_f, none.ois_f, none.ap) == (0, 0, 0)


def test_eight_bits_and_floats_agree():
    rng = np.random.default_rng(0)
    stored = (rng.random((20, 30)) * 255).astype(np.uint8)
    values = np.arange(1, 10) / 10
    options = {"thresholds": values, "max_dist": 0.03}
    counts = count_matches(stored, [line(10)], **options)
    np.testing.assert_array_equal(
        counts, count_matches(stored / 255, [line(10)], **options)
    )
    assert counts[0].tolist() != counts[-1].tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_no_image_and_an_image_without_truth(count):
    with pytest.raises(ValueError, match="no image"):
        benchmark([], processes=1)
    empty = [(line(5).astype(float), [line(5) & False])] * count
    scores = benchmark(empty, thresholds=3, processes=1)
    assert scores.ods_f == 0 and np.isfinite(scores.ap)


@pytest.mark.slow
def test_worker_processes_count_the_same():
    rng = np.random.default_rng(0)
    images = [(rng.random((20, 30)), [line(c)]) for c in (5, 10, 15)]
    one = benchmark(images, thresholds=9, processes=1)
    two = benchmark(images, thresholds=9, processes=2, title="test")
    for a, b in itertools.zip_longest(one, two):
        np.testing.assert_array_equal(a, b)


@pytest.mark.data
def test_agrees_with_itself_on_real_edges(data_dir):
    """The truth against itself is perfect, against another image it is poor."""
    maps = np.load(data_dir / "domains/bsds500_edges_80x120.npz")["edge_test"][
        :4, ..., 0
    ]
    truths = [[boundary.thin(m >= 77)] for m in maps]
    own = benchmark(
        [(t[0].astype(float), t) for t in truths], thresholds=3, processes=1
    )
    other = benchmark(
        [(t[0].astype(float), truths[i - 1]) for i, t in enumerate(truths)],
        thresholds=3,
        processes=1,
    )
    assert own.ods_f == pytest.approx(1.0) and other.ods_f < 0.5
