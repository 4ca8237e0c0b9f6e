"""Each image step against arrays made by hand."""

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from ftn_jax.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeShort,
    Shift,
    Step,
    ToRGB,
    describe,
    from_description,
)


def ramp(height, width, channels=1):
    """Number the pixels in reading order."""
    values = np.arange(height * width * channels, dtype=np.uint8)
    return values.reshape(height, width, channels)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_averages_when_it_shrinks(rng, channels):
    image = np.zeros((8, 8, channels), np.uint8)
    image[:, 4:] = 200
    small = Resize(2, 4)(rng, image)
    assert small.shape == (2, 4, channels)
    assert small.dtype == np.uint8
    assert (np.diff(small[0, :, 0].astype(int)) >= 0).all()
    # A one-pixel checkerboard averages to gray only with antialiasing.
    checkers = np.indices((16, 16)).sum(0)[..., None].repeat(channels, -1) % 2 * 200
    gray = Resize(4, 4)(rng, checkers.astype(np.uint8))
    np.testing.assert_allclose(gray, 100, atol=2)


def test_resize_returns_right_size_unchanged(rng):
    image = ramp(5, 7, 3)
    assert Resize(5, 7)(rng, image) is image
    assert Resize(7, 5)(rng, image).shape == (7, 5, 3)


@pytest.mark.parametrize(
    ("shape", "expected"), [((20, 10), (10, 5)), ((10, 25), (5, 12)), ((4, 4), (5, 5))]
)
def test_resize_short_keeps_aspect(rng, shape, expected):
    image = np.full((*shape, 3), 77, np.uint8)
    resized = ResizeShort(5)(rng, image)
    assert resized.shape == (*expected, 3)
    assert (resized == 77).all()


def test_resize_refuses_floats(rng):
    with pytest.raises(ValueError, match="float32, expected uint8"):
        Resize(2, 2)(rng, np.zeros((4, 4, 3), np.float32))


def test_center_crop(rng):
    assert CenterCrop(2)(rng, ramp(4, 6))[..., 0].tolist() == [[8, 9], [14, 15]]
    stack = np.stack([ramp(4, 6), ramp(4, 6) + 1])
    assert CenterCrop(2)(rng, stack)[1, ..., 0].tolist() == [[9, 10], [15, 16]]


@pytest.mark.parametrize("step", [CenterCrop(5), RandomCrop(5)])
def test_crop_refuses_small_images(rng, step):
    with pytest.raises(
        ValueError, match="found an image of 4x6, expected at least 5x5"
    ):
        step(rng, ramp(4, 6))


def test_random_crop_reaches_every_place(rng):
    image = ramp(3, 4)
    crops = {RandomCrop(2)(rng, image).tobytes() for _ in range(200)}
    places = {image[y : y + 2, x : x + 2].tobytes() for y in range(2) for x in range(3)}
    assert crops == places


def test_random_crop_pads_with_zeros(rng):
    image = np.full((2, 2, 3), 9, np.uint8)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = {RandomCrop(2, padding=1)(rng, image).tobytes() for _ in range(300)}
    places = {
        padded[y : y + 2, x : x + 2].tobytes() for y in range(3) for x in range(3)
    }
    assert crops == places
    assert (RandomCrop(4, padding=1)(rng, image) == padded).all()


def test_random_resized_crop_stays_within_scale_and_ratio(rng):
    # Channel 0 tells a pixel's row and channel 1 its column: the range is the cut's.
    rows, columns = np.indices((100, 100), dtype=np.uint8)
    image = np.stack([rows, columns, rows], -1)
    for ratio, extent in ((1.0, [49, 49]), (4.0, [24, 99]), (0.25, [99, 24])):
        step = RandomResizedCrop(100, scale=(0.25, 0.25), ratio=(ratio, ratio))
        for _ in range(10):
            cut = step(rng, image)
            assert cut.shape == (100, 100, 3)
            assert np.ptp(cut, axis=(0, 1)).tolist()[:2] == extent
    whole = RandomResizedCrop(100, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (whole(rng, image) == image).all()


def test_random_resized_crop_falls_back_to_the_middle(rng):
    image = np.zeros((10, 100, 1), np.uint8)
    image[:, 45:55] = 255
    step = RandomResizedCrop(10, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (step(rng, image) == 255).all()


def test_flip(rng):
    image = ramp(1, 3)
    assert Flip(1.0)(rng, image)[0, :, 0].tolist() == [2, 1, 0]
    assert Flip(0.0)(rng, image) is image
    flips = [Flip(0.25)(rng, image) is not image for _ in range(2000)]
    assert abs(np.mean(flips) - 0.25) < 0.05


def test_shift_repeats_the_edge(rng):
    image = ramp(3, 3)
    rows = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    expected = {
        rows[y : y + 3, x : x + 3].tobytes() for y in range(3) for x in range(3)
    }
    assert {Shift(1)(rng, image).tobytes() for _ in range(300)} == expected
    assert (Shift(0)(rng, image) == image).all()


def test_to_rgb(rng):
    assert ToRGB()(rng, ramp(1, 2))[0].tolist() == [[0, 0, 0], [1, 1, 1]]
    rgb = ramp(2, 2, 3)
    assert ToRGB()(rng, rgb) is rgb
    with pytest.raises(ValueError, match="expected 1 or 3"):
        ToRGB()(rng, np.zeros((2, 2, 4), np.uint8))


@pytest.mark.parametrize("lead", [(), (4,)])
def test_normalize_agrees_with_its_formula(rng, lead):
    image = rng.integers(0, 256, (*lead, 5, 6, 3), dtype=np.uint8)
    before = image.copy()
    found = Normalize(IMAGENET_MEAN, IMAGENET_STD)(rng, image)
    expected = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (image == before).all()
    other = Normalize(IMAGENET_MEAN[::-1], IMAGENET_STD)(rng, image)
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("channels", [1, 3])
def test_one_mean_serves_all_channels(rng, channels):
    image = np.full((2, 2, channels), 51, np.uint8)
    np.testing.assert_allclose(Normalize()(rng, image), 0.2, rtol=1e-6)
    np.testing.assert_allclose(Normalize((0.1,), (0.5,))(rng, image), 0.2, rtol=1e-6)


def test_normalize_refuses_other_channels_and_floats(rng):
    step = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    with pytest.raises(ValueError, match="found 1 channels, expected 3; is ToRGB"):
        step(rng, ramp(2, 2))
    with pytest.raises(ValueError, match="float32, expected uint8"):
        step(rng, step(rng, ramp(2, 2, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resize(0, 3),
        lambda: ResizeShort(0),
        lambda: CenterCrop(0),
        lambda: RandomCrop(4, padding=-1),
        lambda: RandomResizedCrop(4, scale=(0.0, 1.0)),
        lambda: RandomResizedCrop(4, ratio=(2.0, 1.0)),
        lambda: Flip(1.5),
        lambda: Shift(-1),
        lambda: Normalize((0.0,), (0.0,)),
        lambda: Normalize((0.0, 0.0), (1.0,)),
    ],
)
def test_steps_refuse_bad_numbers(make):
    with pytest.raises(ValueError, match="expected"):
        make()


EVERY_STEP = Compose(
    [
        Resize(20, 20),
        ResizeShort(18),
        Compose([RandomResizedCrop(16, scale=(0.5, 1.0)), RandomCrop(16, padding=2)]),
        CenterCrop(14),
        Flip(0.5),
        Shift(2),
        ToRGB(),
        Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def test_description_survives_json():
    text = json.dumps(describe(EVERY_STEP))
    again = from_description(json.loads(text))
    assert json.dumps(describe(again)) == text
    image = ramp(9, 11)
    first, second = (t(np.random.default_rng(5), image) for t in (EVERY_STEP, again))
    assert first.shape == (14, 14, 3)
    assert (first == second).all()
    assert (first != again(np.random.default_rng(6), image)).any()


def test_description_of_one_step():
    assert describe(Flip(0.25)) == [{"step": "Flip", "probability": 0.25}]
    assert from_description([{"step": "Flip"}]).steps == (Flip(0.5),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"step": "Warp"}, "transform 1: unknown step 'Warp', expected one of"),
        ({"step": ["Flip"]}, "unknown step"),
        ({"step": "Flip", "chance": 1}, r"no field \['chance'\], expected \['prob"),
        ({"step": "CenterCrop"}, "CenterCrop: .*missing"),
        ({"step": "CenterCrop", "size": "4"}, "CenterCrop.size: found '4'"),
        ({"step": "CenterCrop", "size": 0}, "size >= 1"),
        ({"step": "Flip", "probability": "x"}, "transform 1: Flip"),
        ({"name": "Flip"}, "expected an object with 'step'"),
        ("Flip", "expected an object with 'step'"),
    ],
)
def test_bad_descriptions_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        from_description([{"step": "ToRGB"}, entry])


def test_a_plain_function_has_no_description():
    with pytest.raises(TypeError, match="subclasses Step"):
        describe(lambda rng, image: image)


def test_a_new_step_is_registered_by_its_class():
    @dataclass(frozen=True)
    class Invert(Step):
        top: int = 255

        def __call__(self, rng, image):
            return (self.top - image).astype(np.uint8)

    assert from_description(describe(Invert(9))).steps == (Invert(9),)


def test_import_is_light():
    heavy = ["PIL", "sklearn", "torch", "tensorflow", "matplotlib"]
    code = f"import sys, ftn_jax.data; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
