"""Augmentation of image and labels together."""

import numpy as np
import pytest

from ftn_jax.data import Compose, Normalize, describe, eval_batches, from_description
from ftn_jax.data.dense import DenseArrays
from ftn_jax.data.joint import (
    FILL,
    JointCrop,
    JointFlip,
    JointPad,
    JointScale,
    resize_bilinear,
    resize_nearest,
)

RNG = np.random.default_rng


def example(height=9, width=12):
    rows, columns = np.mgrid[0:height, 0:width]
    number = rows * width + columns
    return {
        "image": np.repeat(number[..., None], 3, -1).astype(np.uint8),
        "semseg": number.astype(np.int32) % 41,
        "depth": (number + 1).astype(np.float32),
        "normals": np.stack([rows, columns, rows], -1).astype(np.float32),
        "edge": (number % 2).astype(np.float32),
    }


def test_flip_mirrors_all_and_turns_normals():
    item = example()
    flipped = JointFlip(1.0)(RNG(0), item)
    for name in ("image", "semseg", "depth", "edge"):
        np.testing.assert_array_equal(flipped[name], item[name][:, ::-1])
    np.testing.assert_array_equal(
        flipped["normals"], item["normals"][:, ::-1] * [-1, 1, 1]
    )
    assert JointFlip(0.0)(RNG(0), item) is item


def test_scaling_halves_the_depth_of_what_is_twice_as_large():
    item = example()
    scaled = JointScale((2.0,))(RNG(0), item)
    assert {x.shape[:2] for x in scaled.values()} == {(18, 24)}
    np.testing.assert_allclose(
        scaled["depth"], resize_bilinear(item["depth"], 18, 24) / 2
    )
    assert {*np.unique(scaled["semseg"])} <= {*np.unique(item["semseg"])}
    assert {*np.unique(scaled["edge"])} == {0, 1}  # never in between
    np.testing.assert_array_equal(
        scaled["normals"][..., 2], scaled["normals"][..., 0]
    )  # neither renormalised nor z rescaled
    assert JointScale((1.0,))(RNG(0), item) is item
    small = JointScale((0.5,))(RNG(0), item)
    assert small["image"].shape == (4, 6, 3)  # int(9 / 2)


def test_factors_are_discrete():
    step, item = JointScale(), example()
    sizes = {step(RNG(n), item)["image"].shape[1] for n in range(60)}
    assert sizes == {int(12 * f) for f in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)}


def test_resizing_by_hand():
    row = np.asarray([[0.0, 4.0]], np.float32)
    np.testing.assert_allclose(resize_bilinear(row, 1, 4), [[0, 1, 3, 4]])
    np.testing.assert_array_equal(resize_nearest(row, 1, 4), [[0, 0, 4, 4]])
    np.testing.assert_array_equal(resize_nearest(np.arange(5)[None], 1, 3), [[0, 1, 3]])
    with_gap = np.asarray([[0.0, 2.0, 2.0]], np.float32)
    assert 0 < resize_bilinear(with_gap, 1, 6)[0, 1] < 2  # gaps mix, as published


@pytest.mark.parametrize("size", [(13, 20), (13, 7), (5, 20)])
def test_images_smaller_than_the_crop_are_padded_with_what_does_not_count(size):
    item = example()
    cut = JointCrop(*size)(RNG(0), item)
    assert {x.shape[:2] for x in cut.values()} == {size}
    outside = cut["inside"] == 0
    assert outside.any() and not outside.all()
    for name in item:
        np.testing.assert_array_equal(
            cut[name][outside], np.broadcast_to(FILL[name], cut[name][outside].shape)
        )
    assert set(cut["depth"][~outside]) <= set(item["depth"].ravel())
    middle = np.flatnonzero(~outside.all(1)), np.flatnonzero(~outside.all(0))
    for axis, (lines, n, old) in enumerate(zip(middle, size, (9, 12), strict=True)):
        assert lines[0] == max(0, n - old) // 2, axis


def test_a_crop_is_the_same_part_of_everything():
    item = example()
    cut = JointCrop(4, 5)(RNG(3), item)
    np.testing.assert_array_equal(cut["depth"], cut["image"][..., 0] + 1.0)
    np.testing.assert_array_equal(cut["semseg"], cut["image"][..., 0] % 41)
    places = {JointCrop(4, 5)(RNG(n), item)["image"][0, 0, 0] for n in range(30)}
    assert len(places) > 10


def test_padding_for_evaluation_cuts_nothing():
    item = example()
    padded = JointPad(10, 13)(RNG(0), item)
    inside = padded["inside"] > 0
    np.testing.assert_array_equal(padded["depth"][inside], item["depth"].ravel())
    with pytest.raises(ValueError, match=r"larger by \(4, 0\)"):
        JointPad(5, 12)(RNG(0), item)


def test_steps_are_written_down_and_checked():
    steps = Compose((JointScale((0.5, 1.0)), JointCrop(4, 5), JointFlip(), Normalize()))
    written = describe(steps)
    assert from_description(written) == steps
    assert [s["step"] for s in written][:2] == ["JointScale", "JointCrop"]
    for make in (
        lambda: JointScale(()),
        lambda: JointCrop(0, 3),
        lambda: JointPad(3, 0),
        lambda: JointFlip(2.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_evaluation_refuses_random_steps_and_takes_fixed_ones():
    item = example()
    source = DenseArrays(item.pop("image")[None], {k: v[None] for k, v in item.items()})
    stream = eval_batches(
        source, batch_size=1, transform=Compose((JointPad(10, 14), Normalize()))
    )
    batch = next(stream)
    assert batch["image"].dtype == np.float32 and batch["depth"].shape == (1, 10, 14)
    with pytest.raises(ValueError, match="random"):
        next(eval_batches(source, batch_size=1, transform=Compose((JointFlip(),))))
