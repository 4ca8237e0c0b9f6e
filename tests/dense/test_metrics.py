"""Metrics of dense tasks against hand-computed arrays, with the published quirks."""

import math

import numpy as np
import pytest

from ftn_jax.dense import delta_m, depth, edges, metrics, normals, semseg


def batch(**targets):
    shape = next(iter(targets.values())).shape[:3]
    return {
        "image": np.zeros((*shape, 3), np.float32),
        "mask": np.ones(shape[0], np.float32),
        **targets,
    }


def one_hot(labels, classes):
    return np.eye(classes, dtype=np.float32)[labels]


def score(measure, *pairs):
    return measure.score([measure.collect(out, b) for out, b in pairs])


def test_miou_by_hand_over_two_batches():
    truth = np.asarray([[[0, 0, 1, 1]], [[1, 2, 255, 0]]])
    guess = np.asarray([[[0, 1, 1, 1]], [[1, 1, 2, 0]]])
    measure = semseg(classes=4)
    pairs = [
        (one_hot(guess[i : i + 1], 4), batch(semseg=truth[i : i + 1])) for i in (0, 1)
    ]
    found = score(measure, *pairs)
    # class 0: 2 of 3; class 1: 3 of 5; class 2: 0 of 1; class 3: absent
    assert found["mIoU"] == pytest.approx((2 / 3 + 3 / 5 + 0 + 0) / 4)
    assert found["pixel_accuracy"] == pytest.approx(5 / 7)
    skip = score(semseg(classes=4, absent="skip"), *pairs)
    assert skip["mIoU"] == pytest.approx((2 / 3 + 3 / 5) / 3)
    # Not the mean of the batches' own.
    alone = [score(measure, pair)["mIoU"] for pair in pairs]
    assert found["mIoU"] != pytest.approx(np.mean(alone))


def test_forty_classes_leave_the_background_out():
    truth = np.asarray([[[0, 1, 40]]])
    found = score(
        semseg(classes=40),
        (one_hot(np.asarray([[[5, 0, 39]]]), 40), batch(semseg=truth)),
    )
    assert found["mIoU"] == pytest.approx(2 / 40) and found["pixel_accuracy"] == 1


def test_depth_error_by_its_three_definitions():
    truth = np.asarray([[[1.0, 2.0], [0.0, np.nan]], [[4.0, 4.0], [4.0, 4.0]]])
    guess = np.asarray([[[2.0, 2.0], [3.0, 3.0]], [[2.0, 4.0], [4.0, -1.0]]])[..., None]
    found = score(depth(), (guess, batch(depth=truth)))
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 0 + 4 + 0 + 0 + 16) / 6))
    roots = (math.sqrt(1 / 2), math.sqrt(20 / 4))
    assert found["image_rmse"] == pytest.approx(sum(roots) / 2)
    gaps = (math.sqrt((1 + 0 + 9 + 9) / 4), roots[1])
    assert found["image_rmse_with_gaps"] == pytest.approx(sum(gaps) / 2)
    assert depth().metric == "image_rmse_with_gaps" and not depth().higher_is_better


def test_depth_of_padding_counts_in_no_definition():
    rng = np.random.default_rng(0)
    truth, guess = rng.uniform(1, 5, (2, 4, 6)), rng.uniform(1, 5, (2, 4, 6, 1))
    plain = score(depth(), (guess, batch(depth=truth)))
    wide = np.pad(truth, ((0, 0), (1, 2), (3, 0)))
    inside = np.pad(np.ones_like(truth), ((0, 0), (1, 2), (3, 0)))
    padded = np.pad(guess, ((0, 0), (1, 2), (3, 0), (0, 0)), constant_values=7)
    assert score(depth(), (padded, batch(depth=wide, inside=inside))) == pytest.approx(
        plain
    )
    ignored = score(depth(), (padded, batch(depth=wide)))
    assert abs(ignored["image_rmse_with_gaps"] - plain["image_rmse_with_gaps"]) > 0.5


@pytest.mark.parametrize("png", [False, True])
def test_angles_by_hand(png):
    angles = np.radians([0, 10, 20, 25, 40, 90, 180])
    truth = np.tile([0.0, 0.0, 1.0], (1, 1, 8, 1))
    truth[0, 0, 7] = 0  # no truth
    guess = np.zeros((1, 1, 8, 3))
    guess[0, 0, :7, 0], guess[0, 0, :7, 2] = np.sin(angles), np.cos(angles)
    found = score(normals(png=png), (5 * guess, batch(normals=truth)))
    error = 0.6 if png else 0.01  # 8 bits are half a degree
    assert found["mean_angle"] == pytest.approx(365 / 7, abs=error)
    assert found["median_angle"] == pytest.approx(25, abs=error)
    shares = [found[f"within_{x}"] for x in ("11.25", "22.5", "30")]
    assert shares == pytest.approx([2 / 7, 3 / 7, 4 / 7])


def test_nothing_to_judge_is_nan_and_not_a_crash():
    nothing = np.zeros((1, 2, 2))
    assert math.isnan(
        score(depth(), (nothing[..., None], batch(depth=nothing)))["rmse"]
    )
    vectors = np.zeros((1, 2, 2, 3))
    found = score(normals(), (vectors + 1, batch(normals=vectors)))
    assert math.isnan(found["mean_angle"]) and math.isnan(found["loss"])
    ignored = np.full((1, 2, 2), 255)
    assert score(semseg(classes=3), (vectors, batch(semseg=ignored)))["mIoU"] == 0
    with pytest.raises(ValueError, match="nothing was evaluated"):
        depth().score([])


def test_edges_are_judged_inside_the_picture_and_without_fillers():
    edge = np.zeros((2, 12, 16), np.float32)
    edge[:, 3:9, 8] = 1
    logits = np.where(edge, 6.0, -6.0)[..., None]
    logits[1] = 6.0  # a filler full of false alarms
    logits[0, :, :2] = 6.0  # and so is the padding
    inside = np.ones_like(edge)
    inside[:, :, :3] = 0
    measure = edges(thresholds=9, processes=1)
    whole = batch(edge=edge) | {"mask": np.asarray([1.0, 0.0])}
    found = score(measure, (logits, whole | {"inside": inside}))
    assert found["odsF"] == found["oisF"] == 1 and measure.metric == "odsF"
    assert score(measure, (logits, whole))["odsF"] < 0.9


def test_every_annotator_counts_where_there_are_maps():
    edge = np.zeros((1, 12, 16), np.float32)
    edge[0, 3:9, 8] = 0.2  # one of five marked it
    annotators = np.full((1, 12, 16, 3), 255, np.uint8)
    annotators[..., 0] = edge > 0
    annotators[..., 1] = 0
    logits = np.where(edge > 0, 6.0, -6.0)[..., None]
    measure = edges(thresholds=9, processes=1)
    assert score(measure, (logits, batch(edge=edge)))["odsF"] == 0
    found = score(measure, (logits, batch(edge=edge, annotators=annotators)))
    assert found["odsF"] == 1


def test_delta_m_by_hand():
    single = {"semseg": 0.4, "depth": 0.5}
    found = delta_m({"semseg": 0.36, "depth": 0.6}, single, lower_is_better=("depth",))
    assert found == pytest.approx(-15)
    assert delta_m(single, single, lower_is_better=("depth",)) == 0
    with pytest.raises(ValueError, match="found tasks"):
        delta_m({"depth": 0.5}, single)


def test_png_rounds_to_half_a_degree():
    vectors = np.random.default_rng(0).normal(size=(500, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    back = metrics.through_png(vectors)
    assert 0 < np.abs(back - vectors).max() <= 2 / 255 + 1e-9
