"""Batches: determinism, resuming, padding, and the prefetch thread."""

import itertools
import threading
import time
import traceback

import numpy as np
import pytest

from ftn_jax.data import (
    ArraySource,
    Compose,
    Example,
    Flip,
    Normalize,
    RandomCrop,
    Resize,
    Subset,
    ToRGB,
    eval_batches,
    eval_steps,
    prefetch,
    steps_per_epoch,
    train_batches,
    train_steps,
)

AUGMENT = Compose([RandomCrop(4, padding=1), Flip(), Normalize()])


class OneByOne:
    """Hides that images lie in memory, as a folder source does."""

    def __init__(self, source):
        self.source, self.labels = source, source.labels

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index) -> Example:
        return self.source[index]


def make_source(n, seed=0):
    """Draw random images; the label of each is its index."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(n))


def train(source, *, stop=None, **changes):
    options = {"batch_size": 4, "transform": AUGMENT, "seed": 1, **changes}
    return list(itertools.islice(train_batches(source, **options), stop))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def labels_of(batches):
    return np.concatenate([b["label"][b["mask"] > 0] for b in batches])


def test_batches_have_one_static_shape():
    for batch in train(make_source(11), num_epochs=2):
        assert batch["image"].shape == (4, 4, 4, 3)
        assert batch["image"].dtype == batch["mask"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        assert batch["mask"].tolist() == [1, 1, 1, 1]


def test_an_epoch_shows_each_example_at_most_once():
    source = make_source(11)
    batches = train(source, num_epochs=3)
    assert len(batches) == 3 * steps_per_epoch(source, batch_size=4) == 6
    for epoch in range(3):
        assert len(set(labels_of(batches[2 * epoch : 2 * epoch + 2]))) == 8
    assert labels_of(batches[:2]).tolist() != labels_of(batches[2:4]).tolist()


def test_training_depends_on_the_seed_alone():
    source = make_source(12)
    assert_same(train(source, stop=7), train(source, stop=7))
    first, other = train(source, num_epochs=1), train(source, num_epochs=1, seed=2)
    assert labels_of(first).tolist() != labels_of(other).tolist()


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 6, 9])
def test_resuming_gives_the_same_remaining_batches(start):
    source = make_source(13)
    whole = train(source, num_epochs=3)
    assert_same(train(source, num_epochs=3, start_step=start), whole[start:])


def test_augmentation_is_the_examples_own():
    """Neither batch size, threads, nor the place in the batch changes an example."""
    source = make_source(12)

    def by_label(**changes):
        batches = train(source, num_epochs=1, **changes)
        pairs = [(b["label"], b["image"]) for b in batches]
        return {int(k): v for ks, vs in pairs for k, v in zip(ks, vs, strict=True)}

    expected = by_label()
    for changes in ({"batch_size": 3}, {"batch_size": 12}, {"threads": 3}):
        found = by_label(**changes)
        assert found.keys() == expected.keys()
        assert all((found[k] == expected[k]).all() for k in expected)
    other = by_label(seed=2)
    assert any((other[k] != expected[k]).any() for k in expected)


def test_epochs_augment_differently():
    source = ArraySource(make_source(1).images.repeat(4, 0), [0] * 4)
    first, second = train(source, num_epochs=2)
    assert (first["image"] != second["image"]).any()
    assert len({image.tobytes() for image in first["image"]}) > 1


def test_a_source_smaller_than_the_batch_is_padded():
    source = make_source(3)
    batches = train(source, batch_size=8, num_epochs=2)
    assert len(batches) == 2
    for batch in batches:
        assert batch["image"].shape == (8, 4, 4, 3)
        assert batch["mask"].tolist() == [1] * 3 + [0] * 5
        assert sorted(labels_of([batch])) == [0, 1, 2]
        assert set(batch["label"]) == {0, 1, 2}


def join(shards):
    """Put the parts of a batch together again."""
    return {k: np.concatenate([part[k] for part in shards]) for k in shards[0]}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("n", [13, 4])
def test_shards_are_the_parts_of_every_batch(n, count):
    """With 13 examples batches are full, with 4 they are padded."""
    source = make_source(n)
    whole = train(source, batch_size=6, num_epochs=2)
    parts = [
        train(source, batch_size=6, num_epochs=2, shard=(i, count))
        for i in range(count)
    ]
    assert parts[0][0]["image"].shape == (6 // count, 4, 4, 3)
    assert_same([join(step) for step in zip(*parts, strict=True)], whole)
    options = {"batch_size": 6, "transform": Normalize()}
    whole = list(eval_batches(source, **options))
    parts = [eval_batches(source, shard=(i, count), **options) for i in range(count)]
    assert_same([join(step) for step in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize(
    ("shard", "message"),
    [((2, 2), "index 2 of 2"), ((-1, 2), "index -1"), ((0, 3), "a multiple of 3")],
)
def test_bad_shards_are_refused(shard, message):
    with pytest.raises(ValueError, match=message):
        train(make_source(8), shard=shard)


def test_steps_are_a_sequence():
    source = make_source(13)
    options = {"batch_size": 4, "transform": AUGMENT, "seed": 1}
    steps = train_steps(source, num_epochs=3, **options)
    assert len(steps) == 9
    # In any order: what a step holds does not depend on what was read before.
    found = {step: steps[step] for step in (8, 0, 4, 3, 1)}
    whole = train(source, num_epochs=3)
    assert_same([*found.values()], [whole[step] for step in found])
    with pytest.raises(IndexError, match=r"found step 9, expected 0\.\.8"):
        steps[9]
    assert len(eval_steps(source, batch_size=4, transform=Normalize())) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 16])
@pytest.mark.parametrize("wrap", [lambda s: s, OneByOne], ids=["array", "one-by-one"])
def test_eval_counts_every_example_once_in_order(wrap, batch_size):
    source = wrap(make_source(10))
    batches = list(eval_batches(source, batch_size=batch_size, transform=Normalize()))
    assert sum(b["mask"].sum() for b in batches) == len(source)
    assert all(b["image"].shape == (batch_size, 4, 4, 3) for b in batches)
    assert labels_of(batches).tolist() == list(range(10))
    images = np.concatenate([b["image"][b["mask"] > 0] for b in batches])
    expected = np.stack([source[i].image for i in range(10)]).astype(np.float32) / 255
    np.testing.assert_allclose(images, expected, atol=1e-6)


@pytest.mark.parametrize("threads", [0, 2])
def test_stacked_steps_equal_steps_one_by_one(threads):
    source = Subset(Subset(make_source(20), np.arange(5, 19)), np.arange(13, 0, -1))
    gray = ArraySource(source.source.source.images[..., :1], np.arange(20))
    gray = Subset(Subset(gray, np.arange(5, 19)), np.arange(13, 0, -1))
    transform = Compose([ToRGB(), Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
    options = {"batch_size": 5, "threads": threads}
    fast = list(eval_batches(gray, transform=transform, **options))
    slow = eval_batches(
        OneByOne(gray), transform=lambda rng, x: transform(rng, x), **options
    )
    assert_same(fast, list(slow))
    assert labels_of(fast)[0] == 18


def test_batches_own_their_images():
    source = make_source(4)
    before = source.images.copy()
    (batch,) = eval_batches(source, batch_size=4, transform=Normalize())
    batch["image"] += 1
    assert (source.images == before).all()


class Ragged(OneByOne):
    """Gives every second image another height."""

    def __getitem__(self, index) -> Example:
        image, label = self.source[index]
        return Example(image[index % 2 :], label)


def test_images_of_different_shapes_are_refused_or_resized():
    ragged = Ragged(make_source(4))
    with pytest.raises(ValueError, match=r"\(3, 4, 3\), \(4, 4, 3\).*add Resize"):
        next(eval_batches(ragged, batch_size=4, transform=Normalize()))
    fixed = Compose([Resize(4, 4), Normalize()])
    batch = next(eval_batches(ragged, batch_size=4, transform=fixed))
    assert batch["image"].shape == (4, 4, 4, 3)


def test_a_transform_without_normalize_is_refused():
    with pytest.raises(ValueError, match="uint8 images, expected float32"):
        next(eval_batches(make_source(4), batch_size=2, transform=ToRGB()))


def test_eval_refuses_random_steps():
    with pytest.raises(ValueError, match="RandomCrop.* is random"):
        eval_batches(make_source(4), batch_size=2, transform=AUGMENT)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"seed": -1}, {"start_step": -1}, {"num_epochs": 0}],
)
def test_bad_numbers_are_refused_at_the_call(change):
    options = {"batch_size": 2, "transform": AUGMENT, "seed": 0, **change}
    with pytest.raises(ValueError, match=f"{next(iter(change))}: found"):
        train_batches(make_source(4), **options)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_prefetch_keeps_order_and_ends(size):
    assert list(prefetch(iter(range(50)), size=size)) == list(range(50))
    assert not prefetch_threads()


def test_prefetch_runs_ahead_and_no_further():
    made = []
    items = prefetch((made.append(i) or i for i in range(100)), size=3)
    assert not made
    assert next(items) == 0
    deadline = time.monotonic() + 5
    # One item taken, three waiting, one in the thread's hand.
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5
    items.close()


def test_prefetch_gives_the_same_batches():
    source = make_source(10)
    options = {"batch_size": 4, "transform": AUGMENT, "seed": 1, "num_epochs": 2}
    found = list(prefetch(train_batches(source, threads=2, **options)))
    assert_same(found, list(train_batches(source, **options)))


def test_prefetch_raises_the_threads_error_with_its_traceback():
    def failing():
        yield 1
        raise LookupError("broken image 7")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(LookupError, match="broken image 7") as caught:
        next(items)
    assert "in failing" in "".join(traceback.format_exception(caught.value))
    assert not prefetch_threads()


@pytest.mark.parametrize("size", [1, 4])
def test_closing_prefetch_stops_its_thread_and_closes_the_source(size):
    closed = threading.Event()

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    source = endless()  # held here, so that losing the last reference does not close it
    items = prefetch(source, size=size)
    assert [next(items), next(items)] == [0, 1]
    assert len(prefetch_threads()) == 1
    items.close()
    assert not prefetch_threads()
    assert closed.is_set()


def test_interrupting_the_consumer_stops_the_thread():
    def consume():
        for item in prefetch(itertools.count()):
            if item == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        consume()
    # The traceback keeps the loop's frame, and with it the generator, alive.
    caught.value.__traceback__ = None
    del caught
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


def test_prefetch_refuses_size_zero():
    with pytest.raises(ValueError, match="size: found 0"):
        prefetch(iter([]), size=0)
