"""The papers' transforms: their steps, and what they do to an image."""

import numpy as np
import pytest

from ftn_jax.data import (
    IMAGENET,
    ArraySource,
    CenterCrop,
    Compose,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeShort,
    clip_transforms,
    cropped_transforms,
    decathlon_transforms,
    describe,
    from_description,
    imagenet_transforms,
    measure_normalize,
)
from ftn_jax.data.protocols import CLIP

PLAIN = Normalize()


@pytest.mark.parametrize(
    ("made", "train", "test"),
    [
        (
            imagenet_transforms(test_resize=224),
            [RandomResizedCrop(224), Flip(), IMAGENET],
            [ResizeShort(224), CenterCrop(224), IMAGENET],
        ),
        (
            imagenet_transforms(test_resize=256, train_resize=256),
            [ResizeShort(256), RandomResizedCrop(224), Flip(), IMAGENET],
            [ResizeShort(256), CenterCrop(224), IMAGENET],
        ),
        (
            cropped_transforms(),
            [Resize(224, 224), Flip(), IMAGENET],
            [Resize(224, 224), IMAGENET],
        ),
        (
            decathlon_transforms("dtd", normalize=PLAIN),
            [ResizeShort(72), RandomCrop(64), Flip(), PLAIN],
            [ResizeShort(72), CenterCrop(64), PLAIN],
        ),
        (
            decathlon_transforms("svhn", normalize=PLAIN),
            *2 * ([ResizeShort(72), CenterCrop(72), PLAIN],),
        ),
        (
            clip_transforms(),
            *2 * ([ResizeShort(224, "bicubic"), CenterCrop(224), CLIP],),
        ),
        (
            clip_transforms(center_crop=False),
            *2 * ([Resize(224, 224, "bicubic"), CLIP],),
        ),
    ],
)
def test_steps_and_sizes(made, train, test):
    assert made.train == Compose(train) and made.test == Compose(test)
    image = np.zeros((90, 130, 3), np.uint8)
    for transform in made:
        found = transform(np.random.default_rng(0), image)
        assert found.shape in {(n, n, 3) for n in (64, 72, 224)}
        assert from_description(describe(transform)) == transform


def test_bicubic_is_another_filter_than_bilinear():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200
    rng = np.random.default_rng(0)
    soft, sharp = (Resize(16, 16, f)(rng, image) for f in ("bilinear", "bicubic"))
    assert soft.max() == 200 and sharp.max() > 200  # bicubic overshoots at an edge
    with pytest.raises(ValueError, match=r"filter in \('bilinear', 'bicubic'\)"):
        Resize(2, 2, "nearest")


def test_measured_normalisation_gives_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    images = rng.integers(0, [[100, 200, 256]], (40, 6, 6, 3)).astype(np.uint8)
    source = ArraySource(images, np.zeros(40, int))
    step = measure_normalize(source)
    out = step(rng, images)
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-5)
    cut = measure_normalize(source, Compose([CenterCrop(2), Normalize((0.5,), (0.5,))]))
    middle = images[:, 2:4, 2:4] / 255
    np.testing.assert_allclose(cut.mean, middle.mean((0, 1, 2)), atol=1e-6)
    assert measure_normalize(source, most=3) != step
