"""The embedded domains: deterministic, balanced, disjoint, drawn in seconds."""

import sys
import time
from typing import cast

import numpy as np
import pytest

from ftn_jax.data.domain import ArraySource, Domain
from ftn_jax.data.embedded import IMAGE_PX, embedded_source, embedded_targets

CLASSES = {"capitals": 26, "digits": 10, "greek": 17, "stripes": 12, "counting": 6}
DRAWN = [name for name in CLASSES if name != "digits"]


def draw_all(seed: int) -> dict[str, Domain]:
    domains = (embedded_source(seed), *embedded_targets(seed))
    return {domain.name: domain for domain in domains}


def parts(domain: Domain) -> tuple[ArraySource, ArraySource]:
    return cast(ArraySource, domain.train), cast(ArraySource, domain.test)


@pytest.fixture(scope="module")
def domains() -> dict[str, Domain]:
    return draw_all(0)


@pytest.fixture(scope="module")
def again() -> dict[str, Domain]:
    return draw_all(0)


@pytest.fixture(scope="module")
def other_seed() -> dict[str, Domain]:
    return draw_all(1)


def test_the_source_and_four_targets_with_real_digits_among_them(domains):
    assert {name: domain.num_classes for name, domain in domains.items()} == CLASSES
    assert next(iter(domains)) == "capitals"


@pytest.mark.parametrize("name", CLASSES)
def test_images_have_one_shape_and_type(domains, name):
    for source in parts(domains[name]):
        assert source.images.dtype == np.uint8
        assert source.images.shape[1:] == (IMAGE_PX, IMAGE_PX, 3)
        assert source.labels.dtype == np.int32
        assert 500 <= len(source) <= 5000


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_balanced(domains, name):
    for source in parts(domains[name]):
        counts = np.bincount(source.labels, minlength=CLASSES[name])
        # The real digits are not quite: 174 to 183 of each.
        assert counts.max() - counts.min() <= (1 if name in DRAWN else 8)


@pytest.mark.parametrize("name", CLASSES)
def test_train_and_test_share_no_image(domains, name):
    pooled = [image.tobytes() for part in parts(domains[name]) for image in part.images]
    assert len(set(pooled)) == len(pooled)


@pytest.mark.parametrize("name", CLASSES)
def test_a_seed_gives_the_same_domain_and_another_seed_another(
    domains, again, other_seed, name
):
    for first, same, other in zip(
        *(parts(found[name]) for found in (domains, again, other_seed)), strict=True
    ):
        np.testing.assert_array_equal(first.images, same.images)
        np.testing.assert_array_equal(first.labels, same.labels)
        assert (first.images != other.images).any(axis=(1, 2, 3)).mean() > 0.9
        assert (first.labels != other.labels).mean() > 0.5


def test_every_seed_splits_the_same_real_digits(domains, other_seed):
    pool, other_pool = (
        np.concatenate([part.images for part in parts(found["digits"])])
        for found in (domains, other_seed)
    )
    assert len(pool) == 1797
    np.testing.assert_array_equal(
        np.unique(pool, axis=0), np.unique(other_pool, axis=0)
    )


@pytest.mark.parametrize("name", DRAWN)
def test_images_of_one_class_differ_and_none_is_flat(domains, name):
    train, _ = parts(domains[name])
    of_one_class = train.images[train.labels == 0].astype(float)
    assert of_one_class.std(axis=0).min() > 4
    assert train.images.std(axis=(1, 2, 3)).min() > 3


def test_contrast_is_inverted_between_the_source_and_the_letters_to_adapt_to(domains):
    mean = {name: parts(domains[name])[0].images.mean() for name in CLASSES}
    assert mean["capitals"] < 80
    assert min(mean["digits"], mean["greek"]) > 130


def test_drawing_all_domains_takes_seconds():
    start = time.process_time()
    draw_all(2)
    assert time.process_time() - start < 8


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "sklearn"])
@pytest.mark.parametrize("draw", [embedded_source, embedded_targets])
def test_an_absent_package_is_named_with_the_extra(monkeypatch, module, draw):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"ftn_jax\[experiments\]"):
        draw()
