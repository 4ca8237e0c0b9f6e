"""The papers' transforms, a training and a test one each.

All end with a normalisation and expect three channels; put `ToRGB()` before a
transform for gray images. The network's own normalisation may replace the default.
"""

from typing import Literal, NamedTuple

import numpy as np

from ftn_jax.data.domain import Source
from ftn_jax.data.pipeline import Compose, Step, Transform, flatten
from ftn_jax.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeShort,
)

IMAGENET = Normalize(IMAGENET_MEAN, IMAGENET_STD)
"""Means and deviations of ImageNet's training images, as torchvision's networks."""
CLIP = Normalize(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
"""Means and deviations of CLIP's training images."""
_UPRIGHT = ("gtsrb", "omniglot", "svhn")


class Transforms(NamedTuple):
    """A training transform and the one to test with."""

    train: Compose
    test: Compose


def imagenet_transforms(
    *,
    test_resize: int,
    train_resize: int | None = None,
    size: int = 224,
    normalize: Normalize = IMAGENET,
) -> Transforms:
    """Random resized crop and flip; resize and centre crop.

    Args:
        test_resize: shorter side before the centre crop: 224 with TAPS, 256 with
            Piggyback. The FTN papers refer to TAPS.
        train_resize: shorter side before the random crop: 256 with Piggyback, none
            with TAPS.
        size: height and width that the network sees.
        normalize: of the backbone.

    Source: Wallingford et al. 2022 (TAPS) and Mallya et al. 2018 (Piggyback), their
    published code.
    """
    first = [ResizeShort(train_resize)] if train_resize else []
    return Transforms(
        train=Compose([*first, RandomResizedCrop(size), Flip(), normalize]),
        test=Compose([ResizeShort(test_resize), CenterCrop(size), normalize]),
    )


def cropped_transforms(
    *, size: int = 224, normalize: Normalize = IMAGENET
) -> Transforms:
    """Resize to a square whatever the aspect; flip: for CUB and Cars, cut to boxes.

    Source: as `imagenet_transforms`.
    """
    return Transforms(
        train=Compose([Resize(size, size), Flip(), normalize]),
        test=Compose([Resize(size, size), normalize]),
    )


def decathlon_transforms(name: str, *, normalize: Normalize) -> Transforms:
    """The Visual Decathlon's: 72 px for signs, characters and digits, else 64.

    Args:
        name: of the data set; `gtsrb`, `omniglot` and `svhn` are neither cropped at
            random nor flipped.
        normalize: of this data set, from `measure_normalize`: the devkit's own is
            pickled, and nothing is unpickled here.

    Source: Rebuffi et al. 2018, "Efficient parametrization of multi-domain deep neural
    networks", published code.
    """
    if name in _UPRIGHT:
        same = Compose([ResizeShort(72), CenterCrop(72), normalize])
        return Transforms(same, same)
    return Transforms(
        train=Compose([ResizeShort(72), RandomCrop(64), Flip(), normalize]),
        test=Compose([ResizeShort(72), CenterCrop(64), normalize]),
    )


def clip_transforms(
    *,
    size: int = 224,
    center_crop: bool = True,
    normalize: Normalize = CLIP,
) -> Transforms:
    """Bicubic resize of the shorter side and centre crop, in training too.

    Args:
        size: height and width that the network sees.
        center_crop: `False` resizes to a square whatever the aspect instead.
        normalize: of the backbone.

    Source: He et al. 2022, "Parameter-efficient Model Adaptation for Vision
    Transformers" (PEViT), published code.
    """
    filter: Literal["bicubic"] = "bicubic"
    steps: list[Step] = (
        [ResizeShort(size, filter), CenterCrop(size)]
        if center_crop
        else [Resize(size, size, filter)]
    )
    same = Compose([*steps, normalize])
    return Transforms(same, same)


def measure_normalize(
    source: Source, transform: Transform | None = None, *, most: int = 5_000
) -> Normalize:
    """Measure each channel's mean and deviation over training images.

    Args:
        source: the training examples.
        transform: applied before, without randomness and without its normalisation:
            that of `decathlon_transforms(name, normalize=Normalize()).test` is fit.
        most: so many examples at most are read, evenly spread.

    Returns:
        The step that takes the images to mean 0 and deviation 1.
    """
    steps = [s for s in flatten(transform or Compose([])) if type(s) is not Normalize]
    rng = np.random.default_rng(0)
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for index in np.unique(np.linspace(0, len(source) - 1, most).astype(int)):
        image = source[int(index)].image
        for step in steps:
            image = step(rng, image)
        pixels = image.reshape(-1, image.shape[-1]) / 255
        count = count + len(pixels)
        total = total + pixels.sum(axis=0)
        squares = squares + (pixels**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return Normalize(tuple(mean.tolist()), tuple(std.tolist()))
