"""Hash arrays by value, wherever their parts lie.

The hash is a sum over the elements, so each device's part is summed where it is and
only the sums meet: `sum w[i, j, ...] * a[i] * b[j] * ...` over the elements' bits as
integers of at most 32 bits, modulo 2^64, with fixed odd weights for each axis
(multilinear hashing, Carter and Wegman 1979; two sets of weights, so 128 bits). It
tells any accident apart, one changed bit for certain; it is no defence against someone
who builds a collision.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt64

_BLOCK = 2**18  # elements that are summed at once: two megabytes as 64-bit words


def digest(x: Any) -> str:
    """Hash one array: dtype, shape and bits."""
    return digests([x])[0]


def digests(arrays: Sequence[Any]) -> list[str]:
    """Hash arrays; those spread over processes need all of them to call this.

    Nothing is gathered but 16 bytes for each array.
    """
    with ThreadPoolExecutor(4) as pool:
        sums = np.stack([*pool.map(_sums_here, arrays), np.zeros(2, np.uint64)])
    if any(is_spread(x) for x in arrays):
        from jax.experimental.multihost_utils import process_allgather

        # As 32-bit words: JAX may be set to hold no others.
        words = np.asarray(process_allgather(sums.view(np.uint32)))
        everywhere = words.view(np.uint64).sum(axis=0)
        spread = np.asarray([*map(is_spread, arrays), False])[:, None]
        sums = np.where(spread, everywhere, sums)
    return [
        hashlib.sha256(f"{x.dtype}{x.shape}".encode() + s.tobytes()).hexdigest()
        for x, s in zip(arrays, sums, strict=False)
    ]


def sha256_digest(x: Any) -> str:
    """Hash an array as formats 1 and 2 do: SHA-256 over dtype, shape and bytes."""
    x = whole(x)
    found = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    found.update(x.view(np.uint8).data if x.ndim else x.tobytes())
    return found.hexdigest()


def digests_of(format_version: int) -> Callable[[Sequence[Any]], list[str]]:
    """Choose the hash of a format of task files."""
    if format_version >= 3:
        return digests
    return lambda arrays: [sha256_digest(x) for x in arrays]


def whole(x: Any) -> np.ndarray:
    """Bring an array to this host; one spread over processes needs all to call this."""
    if is_spread(x):
        from jax.experimental.multihost_utils import process_allgather

        x = process_allgather(x, tiled=True)
    return np.asarray(x, order="C")


def is_spread(x: Any) -> bool:
    """Say whether other processes hold parts that this one does not."""
    return isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    )


def _sums_here(x: Any) -> UInt64[np.ndarray, "2"]:
    """Sum what this process holds, each element once in all processes."""
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return _sums(_words(np.asarray(x)), (0,) * x.ndim)
    total = np.zeros(2, np.uint64)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            first = tuple(at.start or 0 for at in shard.index)
            total += _sums(_words(np.asarray(shard.data)), first)
    return total


def _words(x: np.ndarray) -> np.ndarray:
    """See the elements' bits as unsigned integers, wide elements as several."""
    if x.itemsize > 4:  # of 64-bit words two changed signs would sum to nothing
        return np.ascontiguousarray(x)[..., None].view(np.uint32)
    return x.view(f"u{x.itemsize}")


def _sums(words: np.ndarray, first: tuple[int, ...]) -> UInt64[np.ndarray, "2"]:
    """Sum a part of an array whose first element stands at `first`."""
    first += (0,) * (words.ndim - len(first))
    if words.size > _BLOCK:
        axis = int(np.argmax(words.shape))
        half = words.shape[axis] // 2
        one, two = np.split(words, [half], axis)
        second = (*first[:axis], first[axis] + half, *first[axis + 1 :])
        return _sums(one, first) + _sums(two, second)
    total = words.astype(np.uint64)[..., None]
    for axis in reversed(range(words.ndim)):
        weights = _weights(axis, first[axis], words.shape[axis])
        if total.shape[-1] == 1:
            total = total[..., 0] @ weights
        else:
            total = (total * weights).sum(axis=-2, dtype=np.uint64)
    return np.broadcast_to(total, (2,))


@lru_cache(maxsize=64)
def _weights(axis: int, first: int, count: int) -> UInt64[np.ndarray, "count 2"]:
    """Draw odd numbers, a function of axis and index alone (SplitMix64)."""
    index = np.arange(first, first + count, dtype=np.uint64)[:, None]
    stream = np.arange(2 * axis + 1, 2 * axis + 3, dtype=np.uint64)[None]
    z = index * np.uint64(0x9E3779B97F4A7C15) + stream * np.uint64(0xD1342543DE82EF95)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
