"""Augmentation on the device: what the same steps do on the host, keyed by step."""

import itertools

import jax
import numpy as np
import pytest

from ftn_jax.data import (
    ArraySource,
    CenterCrop,
    Compose,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Shift,
    ToRGB,
    augmented,
    on_device,
    train_batches,
)


def ramp(height, width, channels=1):
    values = np.arange(height * width * channels, dtype=np.uint8)
    return values.reshape(height, width, channels)


def draws(step, image, count=256):
    """Run a step on `count` copies of an image, each with a key of its own."""
    stack = np.repeat(image[None], count, 0)
    return np.asarray(on_device(step)(jax.random.key(0), stack))


def on_host(step, image, count=600):
    rng = np.random.default_rng(0)
    return {step(rng, image).tobytes() for _ in range(count)}


@pytest.mark.parametrize(
    "transform",
    [
        Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        Normalize((0.5,), (0.25,)),
        Compose([CenterCrop(3), Normalize()]),
    ],
)
def test_fixed_steps_equal_the_host(transform):
    image = ramp(5, 6, 3)
    expected = transform(np.random.default_rng(0), image)
    np.testing.assert_allclose(draws(transform, image, 2)[1], expected, atol=1e-6)


def test_gray_becomes_rgb():
    assert (draws(ToRGB(), ramp(3, 3), 1)[0] == ramp(3, 3)).all()


@pytest.mark.parametrize(
    "step", [RandomCrop(2), RandomCrop(3, padding=1), Shift(1), Flip(), Flip(1.0)]
)
def test_random_steps_reach_what_the_host_reaches(step):
    image = ramp(3, 4) + 1
    found = draws(step, image)
    assert {x.tobytes() for x in found} == on_host(step, image)


def test_flip_keeps_its_probability():
    found = draws(Flip(0.25), ramp(1, 2), 4000)
    assert abs((found[:, 0, 0, 0] == 1).mean() - 0.25) < 0.03


@pytest.mark.parametrize(
    ("size", "ratio", "shape"), [(4, 1.0, (10, 10)), (30, 4.0, (5, 20))]
)
def test_random_resized_crop_is_pillows_of_some_place(size, ratio, shape):
    """Scale and ratio are kept, and what Pillow does at borders, too."""
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    step = RandomResizedCrop(size, scale=(0.25, 0.25), ratio=(ratio, ratio))
    found = draws(step, image, 6)
    assert found.dtype == np.uint8
    h, w = shape
    corners = itertools.product(range(21 - h), range(21 - w))
    resize, rng = Resize(size, size), np.random.default_rng(0)
    cuts = np.stack([resize(rng, image[y : y + h, x : x + w]) for y, x in corners])
    places = set()
    for cut in found:
        off = abs(cuts.astype(int) - cut).max(axis=(1, 2, 3))
        assert off.min() <= 1 and np.median(off) > 30
        places.add(int(off.argmin()))
    assert len(places) > 3


def test_batches_are_finished_on_the_device_and_resume():
    source = ArraySource(np.tile(ramp(4, 4, 3), (8, 1, 1, 1)), np.arange(8))
    options = {
        "batch_size": 4,
        "transform": Compose([]),
        "seed": 2,
        "device": Compose([RandomCrop(3), Flip(), Normalize()]),
    }
    whole = list(itertools.islice(train_batches(source, **options), 5))
    assert whole[0]["image"].shape == (4, 3, 3, 3)
    assert whole[0]["image"].dtype == np.float32
    assert isinstance(whole[0]["image"], jax.Array)
    rest = itertools.islice(train_batches(source, start_step=2, **options), 3)
    for one, other in zip(rest, whole[2:], strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    assert (whole[0]["image"] != whole[1]["image"]).any()
    other = next(train_batches(source, **options | {"seed": 3}))
    assert (np.asarray(other["image"]) != whole[0]["image"]).any()


def test_shards_draw_for_themselves():
    augment = on_device(RandomCrop(3))
    batch = {"image": np.tile(ramp(6, 6), (16, 1, 1, 1))}
    one, other = (
        next(augmented(iter([batch]), augment, seed=0, shard=(i, 2)))["image"]
        for i in range(2)
    )
    assert (np.asarray(one) != other).any()


def test_what_cannot_run_there_is_refused():
    with pytest.raises(TypeError, match="Resize.*no form on the device.*RandomCrop"):
        on_device(Compose([Resize(4, 4), Normalize()]))
    with pytest.raises(
        ValueError, match="found an image of 3x4, expected at least 5x5"
    ):
        draws(RandomCrop(5), ramp(3, 4))
    source = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), [0, 1])
    batches = train_batches(
        source, batch_size=2, transform=Normalize(), seed=0, device=Flip()
    )
    with pytest.raises(ValueError, match="float32 images, expected uint8; leave Norm"):
        next(batches)
