"""Streams of batches of one static shape: shuffled for training, in order for tests.

All randomness is a function of (seed, epoch, index of the example), so batches do not
depend on threads or prefetching, and any step can be reached without the ones before.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt64

from ftn_jax.data.domain import ArraySource, DenseExample, Source, Subset
from ftn_jax.data.pipeline import Step, Transform, flatten

# "image" float32 (b, h, w, c); "label" int32 (b,); "mask" float32 (b,): 1 for an
# example that counts, 0 for one that only fills the batch. Dense examples add their
# targets by name, (b, h, w) or (b, h, w, c).
Batch = dict[str, np.ndarray]

T = TypeVar("T")


class _Selection(NamedTuple):
    """Names the examples of one batch and the key of their random streams."""

    indices: Int[np.ndarray, " n"]
    key: UInt64[np.ndarray, "2"]


def steps_per_epoch(source: Source, *, batch_size: int) -> int:
    """Count the training batches of one pass: full ones, or one padded batch."""
    return max(1, len(source) // batch_size)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    seed: int,
    start_step: int = 0,
    num_epochs: int | None = None,
    threads: int = 0,
) -> Generator[Batch, None, None]:
    """Yield shuffled, augmented batches, epoch after epoch.

    The examples that do not fill a last batch are left out of that epoch. A source
    smaller than one batch is padded by its own examples with mask 0 (its own, so that
    batch statistics stay those of real images).

    Args:
        source: examples to draw from.
        batch_size: examples in a batch.
        transform: gives float32 images of one size; `rng` is the example's own.
        seed: fixes order and augmentation, together with the epoch.
        start_step: batches to leave out at the start; the rest is the same as in an
            uninterrupted run.
        num_epochs: passes over the source, counted from step 0; `None` has no end.
        threads: read and augment with so many threads; 0 uses the caller's own.

    Raises:
        ValueError: where a number is out of range, or images come out of different
            shapes or not as float32.
    """
    _at_least(
        1, batch_size=batch_size, num_epochs=1 if num_epochs is None else num_epochs
    )
    _at_least(0, seed=seed, start_step=start_step, threads=threads)
    selections = _shuffled(
        source,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        num_epochs=num_epochs,
    )
    return _batches(
        source, selections, batch_size=batch_size, transform=transform, threads=threads
    )


def eval_batches(
    source: Source, *, batch_size: int, transform: Transform, threads: int = 0
) -> Generator[Batch, None, None]:
    """Yield every example once, in order; the last batch is padded with mask 0.

    Raises:
        ValueError: where a number is out of range, the transform has a random step, or
            images come out of different shapes or not as float32.
    """
    _at_least(1, batch_size=batch_size)
    _at_least(0, threads=threads)
    for step in flatten(transform):
        if isinstance(step, Step) and step.random:
            raise ValueError(f"eval_batches: {step} is random, expected fixed steps")
    return _batches(
        source,
        _in_order(source, batch_size=batch_size),
        batch_size=batch_size,
        transform=transform,
        threads=threads,
    )


def prefetch(iterator: Iterator[T], *, size: int = 2) -> Generator[T, None, None]:
    """Run an iterator in a thread, up to `size` items ahead.

    The thread starts with the first item asked for. Its exceptions are raised again
    here, with their traceback; closing the generator ends it and closes `iterator`.

    Raises:
        ValueError: where `size` is below 1.
    """
    _at_least(1, size=size)
    return _prefetch(iterator, size=size)


def _prefetch(iterator: Iterator[T], *, size: int) -> Generator[T, None, None]:
    items: queue.Queue = queue.Queue(size)
    stop = threading.Event()
    end = object()

    def produce() -> None:
        error = None
        try:
            for item in iterator:
                items.put((item, None))
                if stop.is_set():
                    break
            if isinstance(iterator, Generator):
                iterator.close()
        except BaseException as raised:  # handed to the consumer, who raises it
            error = raised
        if not stop.is_set():
            items.put((end, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            # Free the place that the thread may be waiting for.
            while not items.empty():
                items.get()
            thread.join(timeout=0.05)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: found {value}, expected at least {least}")


def _shuffled(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_epochs: int | None,
) -> Iterator[_Selection]:
    per_epoch = steps_per_epoch(source, batch_size=batch_size)
    epoch, first = divmod(start_step, per_epoch)
    while num_epochs is None or epoch < num_epochs:
        for_order, for_images = np.random.SeedSequence((seed, epoch)).spawn(2)
        order = np.random.default_rng(for_order).permutation(len(source))
        key = for_images.generate_state(2, np.uint64)
        for step in range(first, per_epoch):
            yield _Selection(order[step * batch_size : (step + 1) * batch_size], key)
        epoch, first = epoch + 1, 0


def _in_order(source: Source, *, batch_size: int) -> Iterator[_Selection]:
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, min(start + batch_size, len(source)))
        yield _Selection(indices, np.zeros(2, np.uint64))


def _batches(
    source: Source,
    selections: Iterator[_Selection],
    *,
    batch_size: int,
    transform: Transform,
    threads: int,
) -> Generator[Batch, None, None]:
    steps = flatten(transform)
    # The steps at the end that take a stack run once per batch, not per image.
    cut = len(steps)
    while cut and getattr(steps[cut - 1], "stackable", False):
        cut -= 1
    each, stacked = steps[:cut], steps[cut:]

    def read(index: int, key: UInt64[np.ndarray, "2"]) -> Batch:
        example = source[index]
        item: Any = example.image
        if isinstance(example, DenseExample):  # its steps change image and targets
            item = {"image": item, **example.targets}
        # One key for the epoch, one counter for the example: a stream of its own.
        bits = np.random.Philox(key=key, counter=[0, index, 0, 0])
        rng = np.random.Generator(bits)
        for step in each:
            item = step(rng, item)
        return item if isinstance(item, dict) else {"image": item}

    with ThreadPoolExecutor(threads) if threads else nullcontext() as pool:
        run = pool.map if pool else map
        for indices, key in selections:
            batch = None if each else _gather(source, indices)
            if batch is None:
                batch = _stack(list(run(partial(read, key=key), indices.tolist())))
            for step in stacked:
                batch["image"] = step(np.random.default_rng(0), batch["image"])
            if batch["image"].dtype != np.float32:
                raise ValueError(
                    f"the transform gives {batch['image'].dtype} images, expected "
                    "float32; end it with Normalize"
                )
            batch["label"] = source.labels[indices].astype(np.int32)
            mask = np.ones(len(indices), np.float32)
            if len(indices) < batch_size:
                again = np.arange(batch_size) % len(indices)
                batch = {name: array[again] for name, array in batch.items()}
                mask = (np.arange(batch_size) < len(indices)).astype(np.float32)
            yield batch | {"mask": mask}


def _gather(source: Source, indices: Int[np.ndarray, " b"]) -> Batch | None:
    """Take a stack of images at once where they lie in memory, else give `None`."""
    while isinstance(source, Subset):
        indices, source = source.indices[indices], source.source
    return (
        {"image": source.images[indices]} if isinstance(source, ArraySource) else None
    )


def _stack(items: list[Batch]) -> Batch:
    for name in items[0]:
        shapes = sorted({item[name].shape for item in items})
        if len(shapes) > 1:
            raise ValueError(
                f"the {name}s of a batch have different shapes {shapes[:4]}, expected "
                "one; add Resize, or ToRGB, to the transform"
            )
    return {name: np.stack([item[name] for item in items]) for name in items[0]}
