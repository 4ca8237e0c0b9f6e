"""Every batch of a run by its step: what an interrupted run needs to go on exactly.

All randomness is a function of (seed, epoch, index of the example), so a batch depends
neither on the batches before it nor on threads, worker processes or the number of
processes that share it.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from ftn_jax.data.domain import ArraySource, DenseExample, Source, Subset
from ftn_jax.data.pipeline import Step, Transform, flatten

# "image" float32 (b, h, w, c), or uint8 where the device finishes it; "label" int32
# (b,); "mask" float32 (b,): 1 for an example that counts, 0 for one that only fills up.
# Dense examples add their targets by name, (b, h, w) or (b, h, w, c).
Batch = dict[str, np.ndarray]


class Shard(NamedTuple):
    """Says which of `count` equal parts of every batch is meant: rows in order."""

    index: int
    count: int


class _Selection(NamedTuple):
    """Names the examples of one batch and the key of their random streams."""

    indices: Int[np.ndarray, " n"]
    key: UInt64[np.ndarray, "2"]


class _Epoch(NamedTuple):
    number: int
    order: Int[np.ndarray, " n"]
    key: UInt64[np.ndarray, "2"]


class Steps:
    """Gives the batches of a run by step, like a sequence.

    With `__len__` and `__getitem__` it is also what Grain calls a
    `RandomAccessDataSource`. Made by `train_steps` and `eval_steps`.
    """

    def __init__(
        self,
        source: Source,
        select: "_Shuffled | _InOrder",
        *,
        batch_size: int,
        transform: Transform,
        shard: tuple[int, int],
        raw: bool = False,
    ):
        index, count = self.shard = Shard(*shard)
        if not 0 <= index < count:
            raise ValueError(
                f"shard: found index {index} of {count}, expected 0 <= index < count"
            )
        if batch_size % count:
            raise ValueError(
                f"batch_size: found {batch_size}, expected a multiple of {count}, the "
                "number of processes that share each batch"
            )
        self.source, self.batch_size, self.raw = source, batch_size, raw
        self._select = select
        steps = flatten(transform)
        # The steps at the end that take a stack run once per batch, not per image.
        cut = len(steps)
        while cut and getattr(steps[cut - 1], "stackable", False):
            cut -= 1
        self._each, self._stacked = steps[:cut], steps[cut:]

    def __len__(self) -> int:
        """Count the batches; a run without end has `sys.maxsize`."""
        return len(self._select)

    def __getitem__(self, step: int, /) -> Batch:
        """Make the batch of `step`, counted from 0.

        Raises:
            IndexError: where there are not so many.
            ValueError: where images come out of different shapes or not as float32.
        """
        return self.read(step)

    def read(self, step: int, *, run: Callable[..., Iterable] = map) -> Batch:
        """Make the batch of `step`; `run` maps a function over its examples."""
        if not 0 <= step < len(self):
            raise IndexError(f"found step {step}, expected 0..{len(self) - 1}")
        chosen, key = self._select(step)
        size = self.batch_size // self.shard.count
        rows = np.arange(size) + self.shard.index * size
        # Too few examples fill the batch again and again, without counting.
        indices = chosen[rows % len(chosen)]
        distinct = indices[: len(chosen)]
        batch = None if self._each else _gather(self.source, distinct)
        if batch is None:
            batch = _stack(list(run(partial(self._item, key), distinct.tolist())))
        images = batch["image"]
        for stacked in self._stacked:
            images = stacked(np.random.default_rng(0), images)
        expected = np.uint8 if self.raw else np.float32
        if images.dtype != expected:
            raise ValueError(
                f"the transform gives {images.dtype} images, expected "
                + (
                    "uint8; leave Normalize to the device"
                    if self.raw
                    else "float32; end it with Normalize"
                )
            )
        batch["image"] = images
        if len(distinct) < size:
            again = np.arange(size) % len(distinct)
            batch = {name: array[again] for name, array in batch.items()}
        batch["label"] = self.source.labels[indices].astype(np.int32)
        batch["mask"] = (rows < len(chosen)).astype(np.float32)
        return batch

    def _item(self, key: UInt64[np.ndarray, "2"], index: int) -> Batch:
        example = self.source[index]
        item: Any = example.image
        if isinstance(example, DenseExample):  # its steps change image and targets
            item = {"image": item, **example.targets}
        # One key for the epoch, one counter for the example: a stream of its own.
        bits = np.random.Philox(key=key, counter=[0, index, 0, 0])
        rng = np.random.Generator(bits)
        for step in self._each:
            item = step(rng, item)
        return item if isinstance(item, dict) else {"image": item}


def steps_per_epoch(source: Source, *, batch_size: int) -> int:
    """Count the training batches of one pass: full ones, or one padded batch."""
    return max(1, len(source) // batch_size)


def train_steps(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    seed: int,
    num_epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    raw: bool = False,
) -> Steps:
    """Give shuffled, augmented batches by step; see `train_batches`.

    `raw` batches hold uint8 images, which `augmented` finishes on the device.
    """
    at_least(
        1, batch_size=batch_size, num_epochs=1 if num_epochs is None else num_epochs
    )
    at_least(0, seed=seed)
    return Steps(
        source,
        _Shuffled(len(source), batch_size, seed, num_epochs),
        batch_size=batch_size,
        transform=transform,
        shard=shard,
        raw=raw,
    )


def eval_steps(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    shard: tuple[int, int] = (0, 1),
) -> Steps:
    """Give all examples in order, in batches by step; see `eval_batches`."""
    at_least(1, batch_size=batch_size)
    for step in flatten(transform):
        if isinstance(step, Step) and step.random:
            raise ValueError(f"eval_batches: {step} is random, expected fixed steps")
    select = _InOrder(len(source), batch_size)
    return Steps(
        source, select, batch_size=batch_size, transform=transform, shard=shard
    )


def at_least(least: int, **values: int) -> None:
    """Refuse numbers below `least`, by name."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: found {value}, expected at least {least}")


class _Shuffled:
    """Selects each step's examples: another order, and another key, every epoch."""

    def __init__(self, n: int, batch_size: int, seed: int, num_epochs: int | None):
        self.n, self.batch_size = n, batch_size
        self.seed, self.num_epochs = seed, num_epochs
        self.per_epoch = max(1, n // batch_size)
        self._last = self._epoch(0)

    def __len__(self) -> int:
        if self.num_epochs is None:
            return sys.maxsize
        return self.num_epochs * self.per_epoch

    def __call__(self, step: int) -> _Selection:
        number, place = divmod(step, self.per_epoch)
        epoch = self._last
        if epoch.number != number:
            self._last = epoch = self._epoch(number)
        first = place * self.batch_size
        return _Selection(epoch.order[first : first + self.batch_size], epoch.key)

    def _epoch(self, number: int) -> _Epoch:
        for_order, for_images = np.random.SeedSequence((self.seed, number)).spawn(2)
        order = np.random.default_rng(for_order).permutation(self.n)
        return _Epoch(number, order, for_images.generate_state(2, np.uint64))


class _InOrder:
    """Selects each step's examples: all of them once, as they lie."""

    def __init__(self, n: int, batch_size: int):
        self.n, self.batch_size = n, batch_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __call__(self, step: int) -> _Selection:
        first = step * self.batch_size
        indices = np.arange(first, min(first + self.batch_size, self.n))
        return _Selection(indices, np.zeros(2, np.uint64))


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
