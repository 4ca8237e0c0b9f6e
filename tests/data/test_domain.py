"""Sources, domains, and the parts that are cut from them."""

import numpy as np
import pytest

from ftn_jax.data import ArraySource, Domain, FileSource, Subset, digest, limit, split


def make_source(sizes, seed=0):
    """Shuffle `sizes[k]` examples of each class k; pixel 0 tells the index."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return ArraySource(images, labels)


def test_source_gives_examples_and_labels():
    source = ArraySource(np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), [2, 0, 1])
    image, label = source[1]
    assert image.tolist() == [[[4], [5]], [[6], [7]]]
    assert (label, type(label)) == (0, int)
    assert source.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "dtype float32, expected uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], "channels-last"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "expected .n, h, w, 1."),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 2], "2 images and 3 labels"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0], "labels: found float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0], [1]], "expected integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "found -1"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), "no example"),
    ],
)
def test_source_refuses_bad_arrays(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(images, labels)


def test_subset_of_subset():
    source = make_source([5, 5])
    part = Subset(Subset(source, [8, 1, 6, 3]), [2, 0])
    assert [part[i].image[0, 0, 0] for i in range(len(part))] == [6, 8]
    assert part.labels.tolist() == source.labels[[6, 8]].tolist()


@pytest.mark.parametrize("indices", [[0, 4], [-1], [], [0.0], [[0]]])
def test_subset_refuses_bad_indices(indices):
    with pytest.raises(ValueError, match="indices: found"):
        Subset(make_source([2, 2]), indices)


def test_domain_counts_and_checks_classes():
    source = make_source([2, 2, 2])
    assert Domain("d", ("a", "b", "c"), source, source).num_classes == 3
    with pytest.raises(
        ValueError, match=r"d: train has labels 0\.\.2, expected 0\.\.1"
    ):
        Domain("d", ("a", "b"), source, source)
    with pytest.raises(ValueError, match="d: test has no example"):
        Domain("d", ("a", "b", "c"), source, FileSource([], []))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [[40, 40, 40], [100, 20, 7, 1], [15] * 12])
def test_split_is_disjoint_complete_and_stratified(sizes, fraction):
    source = make_source(sizes)
    train, validation = split(source, fraction, seed=3)
    together = np.concatenate([train.indices, validation.indices])
    assert sorted(together) == list(range(len(source)))
    assert len(validation) == min(
        round(fraction * len(source)), sum(sizes) - len(sizes)
    )
    held_out = np.bincount(validation.labels, minlength=len(sizes))
    for size, count in zip(sizes, held_out, strict=True):
        assert count <= size - 1
        assert abs(count - min(fraction * size, size - 1)) <= 1


def test_split_depends_on_seed_alone():
    source = make_source([30, 30])
    first, again, other = (split(source, 0.3, seed=s).validation for s in (0, 0, 1))
    assert first.indices.tolist() == again.indices.tolist()
    assert first.indices.tolist() != other.indices.tolist()


def test_split_works_on_a_subset():
    part = Subset(make_source([10, 10]), np.arange(5, 15))
    train, validation = split(part, 0.2, seed=0)
    seen = {
        int(s[i].image[0, 0, 0]) for s in (train, validation) for i in range(len(s))
    }
    assert seen == set(range(5, 15))


@pytest.mark.parametrize(
    ("sizes", "fraction", "message"),
    [
        ([9, 9], 0.0, "0 < fraction < 1"),
        ([9, 9], 1.0, "0 < fraction < 1"),
        ([9, 9], 0.01, "holds out none"),
        ([1, 1], 0.5, "holds out none"),
    ],
)
def test_split_refuses_an_empty_part(sizes, fraction, message):
    with pytest.raises(ValueError, match=message):
        split(make_source(sizes), fraction, seed=0)


def test_limit_balances_classes():
    source = make_source([50, 10, 2])
    part = limit(source, 22, seed=0)
    assert np.bincount(part.labels).tolist() == [10, 10, 2]
    assert limit(source, 62, seed=0) is source


def test_smaller_limit_is_part_of_larger():
    source = make_source([20, 20, 5])
    small, large = (limit(source, n, seed=4).indices for n in (9, 30))
    assert set(small) < set(large)
    assert set(small) != set(limit(source, 9, seed=5).indices)
    with pytest.raises(ValueError, match="at least 1"):
        limit(source, 0, seed=0)


def test_limited_balances_training_and_samples_testing():
    labels = np.repeat([0, 1], [900, 100]).astype(np.int32)
    source = ArraySource(np.zeros((1000, 2, 2, 1), np.uint8), labels)
    small = Domain("d", ("a", "b"), source, source).limited(train=100, test=200)
    assert np.bincount(small.train.labels).tolist() == [50, 50]
    assert len(small.test) == 200 and 5 <= small.test.labels.sum() <= 40
    same = Domain("d", ("a", "b"), source, source).limited(test=1000)
    assert same.train is source and same.test is source
    with pytest.raises(ValueError, match="n: found 0"):
        small.limited(test=0)


def test_digest_sees_labels_and_images():
    images = np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2, 1)
    labels = np.zeros(40, np.int32)
    other_labels = np.eye(1, 40, 7, dtype=np.int32)[0]
    whole = digest(ArraySource(images, labels))
    assert whole == digest(ArraySource(images.copy(), labels.copy()))
    assert whole != digest(ArraySource(images, other_labels))
    assert whole != digest(ArraySource(255 - images, labels))
