"""Grain: the same batches from worker processes, and iterators that can be saved."""

import itertools
import json

import numpy as np
import pytest
from pictures import save_image, save_ramp

from ftn_jax.data import (
    ArraySource,
    Compose,
    FileSource,
    Flip,
    Normalize,
    RandomResizedCrop,
    eval_batches,
    grain_dataset,
    train_batches,
    train_steps,
)

pytest.importorskip("grain")
TRANSFORM = Compose([RandomResizedCrop(8), Flip(), Normalize()])


@pytest.fixture
def files(tmp_path):
    paths = [save_ramp(tmp_path / f"{n}.png", size=(9 + n, 12)) for n in range(11)]
    return FileSource(paths, np.arange(11))


def take(batches, count):
    with_close = batches if hasattr(batches, "close") else None
    found = list(itertools.islice(batches, count))
    if with_close:
        with_close.close()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("threads", [0, 2])
def test_grain_gives_the_same_batches(files, start, threads):
    options = {"batch_size": 4, "transform": TRANSFORM, "seed": 3}
    dataset = grain_dataset(
        train_steps(files, **options), start_step=start, threads=threads
    )
    expected = take(train_batches(files, start_step=start, **options), 6)
    assert_same(take(iter(dataset), 6), expected)
    other = take(train_batches(files, start_step=start + 1, **options), 6)
    with pytest.raises(AssertionError):
        assert_same(other, expected)


def test_a_saved_iterator_goes_on_where_it_stood(files):
    options = {"batch_size": 4, "transform": TRANSFORM, "seed": 3, "num_epochs": 3}
    dataset = grain_dataset(train_steps(files, **options))
    iterator = iter(dataset)
    whole = list(iter(dataset))
    assert len(whole) == 6
    assert_same([next(iterator), next(iterator)], whole[:2])
    state = json.loads(json.dumps(iterator.get_state()))
    next(iterator)
    again = iter(dataset)
    again.set_state(state)
    assert_same(list(again), whole[2:])


def test_worker_processes_give_the_same_batches_and_can_be_saved(files):
    options = {"batch_size": 4, "transform": TRANSFORM, "seed": 3}
    expected = take(train_batches(files, start_step=1, **options), 6)
    dataset = grain_dataset(train_steps(files, **options), start_step=1, workers=2)
    iterator = iter(dataset)
    found = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    ahead = next(iterator)
    iterator.set_state(state)
    found += [next(iterator) for _ in range(3)]
    iterator.close()
    assert_same(found, expected)
    assert_same([ahead], expected[3:4])


def test_errors_of_workers_name_the_file(tmp_path):
    bad = save_image(tmp_path / "bad.png", (1, 2, 3))
    bad.write_bytes(bad.read_bytes()[:30])
    batches = eval_batches(
        FileSource([bad], [0]), batch_size=1, transform=Normalize(), workers=1
    )
    with pytest.raises(ValueError, match="bad.png: does not decode"):
        next(batches)


def test_absent_grain_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    options = {"batch_size": 2, "transform": Normalize()}
    with pytest.raises(ImportError, match=r"pip install 'ftn_jax\[data\]'"):
        eval_batches(source, workers=1, **options)
    assert len(list(eval_batches(source, **options))) == 1


@pytest.mark.parametrize("change", [{"workers": -1}, {"ahead": 0}, {"start_step": -1}])
def test_bad_numbers_are_refused(files, change):
    steps = train_steps(files, batch_size=4, transform=TRANSFORM, seed=3)
    with pytest.raises(ValueError, match=f"{next(iter(change))}: found"):
        grain_dataset(steps, **change)
