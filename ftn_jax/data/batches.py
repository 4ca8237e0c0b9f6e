"""Streams of batches of one static shape: shuffled for training, in order for tests."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial

from ftn_jax.data.device import augmented, on_device
from ftn_jax.data.domain import Source
from ftn_jax.data.pipeline import Transform
from ftn_jax.data.steps import Batch, Steps, at_least, eval_steps, train_steps
from ftn_jax.data.workers import grain_dataset


def train_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    seed: int,
    start_step: int = 0,
    num_epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 0,
    workers: int = 0,
    device: Transform | None = None,
) -> Generator[Batch, None, None]:
    """Yield shuffled, augmented batches, epoch after epoch.

    The examples that do not fill a last batch are left out of that epoch. A source
    smaller than one batch is padded by its own examples with mask 0 (its own, so that
    batch statistics stay those of real images).

    Args:
        source: examples to draw from.
        batch_size: examples in a batch, over all shards.
        transform: gives float32 images of one size; `rng` is the example's own.
        seed: fixes order and augmentation, together with the epoch.
        start_step: batches to leave out at the start; the rest is the same as in an
            uninterrupted run.
        num_epochs: passes over the source, counted from step 0; `None` has no end.
        shard: `(index, count)`: yield the index-th of `count` equal parts of every
            batch. All parts together are the batch that `(0, 1)` gives.
        threads: read and augment with so many threads; 0 uses the caller's own.
        workers: make the batches in so many processes, by Grain, ahead of their use;
            0 makes them here. The batches are the same.
        device: steps that follow `transform` on the accelerator, as one jitted
            function (see `on_device`); images leave `transform` as uint8 then.

    Raises:
        ValueError: where a number is out of range, or images come out of different
            shapes or types.
        TypeError: where a step of `device` cannot run there.
        ImportError: where `workers` needs Grain and it is absent.
    """
    steps = train_steps(
        source,
        batch_size=batch_size,
        transform=transform,
        seed=seed,
        num_epochs=num_epochs,
        shard=shard,
        raw=device is not None,
    )
    stream = _stream(steps, start_step=start_step, threads=threads, workers=workers)
    if device is None:
        return stream
    return augmented(
        stream, on_device(device), seed=seed, start_step=start_step, shard=shard
    )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    shard: tuple[int, int] = (0, 1),
    threads: int = 0,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """Yield every example once, in order; the last batch is padded with mask 0.

    Args:
        source: the examples.
        batch_size: examples in a batch, over all shards.
        transform: gives float32 images of one size, without randomness.
        shard: see `train_batches`.
        threads: see `train_batches`.
        workers: see `train_batches`.

    Raises:
        ValueError: where a number is out of range, the transform has a random step, or
            images come out of different shapes or not as float32.
        ImportError: where `workers` needs Grain and it is absent.
    """
    steps = eval_steps(source, batch_size=batch_size, transform=transform, shard=shard)
    return _stream(steps, start_step=0, threads=threads, workers=workers)


def _stream(
    steps: Steps, *, start_step: int, threads: int, workers: int
) -> Generator[Batch, None, None]:
    at_least(0, start_step=start_step, threads=threads, workers=workers)
    if not workers:
        return _in_this_process(steps, range(start_step, len(steps)), threads)
    dataset = grain_dataset(
        steps, start_step=start_step, threads=threads, workers=workers
    )
    return _closing(iter(dataset))


def _in_this_process(
    steps: Steps, wanted: range, threads: int
) -> Generator[Batch, None, None]:
    with ThreadPoolExecutor(threads) if threads else nullcontext() as pool:
        read = partial(steps.read, run=pool.map) if pool else steps.read
        for step in wanted:
            yield read(step)


def _closing(iterator: Iterator[Batch]) -> Generator[Batch, None, None]:
    """End the worker processes together with the generator."""
    with closing(iterator):  # pyright: ignore[reportArgumentType]
        yield from iterator
