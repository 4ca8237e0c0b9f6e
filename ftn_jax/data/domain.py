"""What a classification data set is: sources of examples, domains, and their parts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8


class Example(NamedTuple):
    """Pairs one uint8 image with its class index."""

    image: UInt8[np.ndarray, "h w c"]
    label: int


class DenseExample(NamedTuple):
    """Pairs one uint8 image with maps that say something about each of its pixels.

    Attributes:
        image: the picture.
        targets: maps by name, (h, w) or (h, w, c), of the image's height and width.
        label: the class of an example that has none, so that all that splits and
            limits sources by class takes dense ones too.
    """

    image: UInt8[np.ndarray, "h w c"]
    targets: Mapping[str, np.ndarray]
    label: int = 0


@runtime_checkable
class Source(Protocol):
    """Gives examples by index, and all labels without decoding an image.

    With `__len__` and `__getitem__` a source is also what Grain calls a
    `RandomAccessDataSource`.
    """

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """Class indices of all examples, in order."""
        ...

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def __getitem__(self, index: int, /) -> Example | DenseExample:
        """Give the example at `index`."""
        ...


class ArraySource:
    """Holds images of one size in memory.

    Args:
        images: uint8, 1 or 3 channels.
        labels: integers, one for each image, none negative.

    Raises:
        ValueError: where dtype, shape, length or sign is not as above.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, " n"] | Sequence[int],
    ):
        labels = np.asarray(labels)
        if images.dtype != np.uint8:
            raise ValueError(f"images: found dtype {images.dtype}, expected uint8")
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images: found shape {images.shape}, expected (n, h, w, 1) or "
                "(n, h, w, 3); transpose channels-first arrays to channels-last"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels: found {labels.dtype} of shape {labels.shape}, expected "
                "integers of shape (n,)"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"found {len(images)} images and {len(labels)} labels, expected one "
                "label for each image"
            )
        if not len(labels):
            raise ValueError("found no example, expected at least one")
        if labels.min() < 0:
            raise ValueError(f"labels: found {labels.min()}, expected none below 0")
        if labels.max() > np.iinfo(np.int32).max:
            raise ValueError(f"labels: found {labels.max()}, expected int32 values")
        self.images = images
        self.labels = labels.astype(np.int32)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Example:
        """Give the example at `index`."""
        return Example(self.images[index], int(self.labels[index]))


class Subset:
    """Shows the examples of `source` at `indices`, in that order.

    Raises:
        ValueError: where `indices` is not a row of indices into `source`.
    """

    source: Source
    indices: Int[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]

    def __init__(
        self, source: Source, indices: Integer[np.ndarray, " n"] | Sequence[int]
    ):
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise ValueError(
                f"indices: found {indices.dtype} of shape {indices.shape}, expected "
                "one or more integers of shape (n,)"
            )
        if indices.min() < 0 or indices.max() >= len(source):
            raise ValueError(
                f"indices: found {indices.min()}..{indices.max()}, expected "
                f"0..{len(source) - 1}"
            )
        self.source = source
        self.indices = indices.astype(np.int64)
        self.labels = source.labels[self.indices]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example | DenseExample:
        """Give the example at `index` of the subset."""
        return self.source[int(self.indices[index])]


@dataclass(frozen=True)
class Domain:
    """Names one classification task and holds its training and test examples.

    `validation` is the data set's own, where it has one beside train and test; what
    chooses rates and epochs then takes it, and never the test examples.

    Raises:
        ValueError: where a part has no example, or a label no class name.
    """

    name: str
    class_names: tuple[str, ...]
    train: Source
    test: Source
    validation: Source | None = None

    def __post_init__(self):
        for part in ("train", "test", "validation"):
            source: Source | None = getattr(self, part)
            if source is None:
                continue
            if not len(source):
                raise ValueError(f"{self.name}: {part} has no example")
            low, high = source.labels.min(), source.labels.max()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{self.name}: {part} has labels {low}..{high}, expected "
                    f"0..{self.num_classes - 1} ({self.num_classes} class names)"
                )

    @property
    def num_classes(self) -> int:
        """Count the classes."""
        return len(self.class_names)

    def limited(self, *, train: int | None = None, test: int | None = None) -> "Domain":
        """Keep at most so many examples.

        Training examples are balanced over classes; test examples are drawn at
        random, so that accuracy on them estimates accuracy on all.
        """
        changed = {}
        if train is not None:
            changed["train"] = limit(self.train, train, seed=0)
        if test is not None:
            changed["test"] = limit(self.test, test, seed=0, balanced=False)
        return replace(self, **changed)


class Split(NamedTuple):
    """Parts one training source in two, with no example in both."""

    train: Subset
    validation: Subset


class _Order(NamedTuple):
    """A shuffle of the examples, and each one's place within its own class."""

    indices: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    class_size: Int[np.ndarray, " n"]


def _shuffle_by_class(labels: Int32[np.ndarray, " n"], *, seed: int) -> _Order:
    indices = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[indices]
    by_class = np.argsort(shuffled, kind="stable")
    sizes = np.bincount(shuffled)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty_like(by_class)
    rank[by_class] = np.arange(len(labels)) - starts[shuffled[by_class]]
    return _Order(indices, rank, sizes[shuffled])


def split(source: Source, fraction: float, *, seed: int) -> Split:
    """Hold out about `fraction` of a source, in the proportions of its classes.

    Every class keeps at least one training example. The same arguments give the
    same parts.

    Raises:
        ValueError: where `fraction` is not between 0 and 1, or so small, or the
            classes are so small, that nothing would be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: found {fraction}, expected 0 < fraction < 1")
    order = _shuffle_by_class(source.labels, seed=seed)
    # Taking examples by their quantile within the class fills all classes evenly.
    quantile = (order.rank + 0.5) / order.class_size
    may_leave = order.rank < order.class_size - 1
    count = min(round(fraction * len(source)), int(may_leave.sum()))
    if not count:
        raise ValueError(
            f"fraction {fraction} of {len(source)} examples holds out none; use a "
            "larger fraction or more examples"
        )
    queue = np.argsort(np.where(may_leave, quantile, np.inf), kind="stable")
    held_out = np.zeros(len(source), bool)
    held_out[order.indices[queue[:count]]] = True
    return Split(
        train=Subset(source, np.flatnonzero(~held_out)),
        validation=Subset(source, np.flatnonzero(held_out)),
    )


def limit(source: Source, n: int, *, seed: int, balanced: bool = True) -> Source:
    """Keep at most `n` examples.

    With one seed, a smaller limit gives a part of what a larger one gives.

    Args:
        source: the examples.
        n: how many may stay.
        seed: of the choice.
        balanced: as evenly over the classes as they allow; otherwise at random.

    Raises:
        ValueError: where `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n: found {n}, expected at least 1")
    if n >= len(source):
        return source
    order = _shuffle_by_class(source.labels, seed=seed)
    kept = order.indices
    if balanced:
        kept = kept[np.argsort(order.rank, kind="stable")]
    return Subset(source, np.sort(kept[:n]))


def digest(source: Source) -> str:
    """Hash a source: all its labels, and 16 examples spread over it."""
    labels = np.ascontiguousarray(source.labels, np.int32)
    seen = hashlib.sha256(labels.tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        example = source[int(index)]
        targets = example.targets if isinstance(example, DenseExample) else {}
        for array in (example.image, *(targets[name] for name in sorted(targets))):
            array = np.ascontiguousarray(array)
            seen.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return seen.hexdigest()
