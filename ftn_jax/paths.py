"""Paths of a tree's leaves: their names, their keys, their errors."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jaxtyping import Array, Key


def fold_in_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Derive a key by a hash of `name` that is the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def path_name(path: tuple[Any, ...]) -> str:
    """Write a key path as rules see it: `"layer1_0/conv1/kernel"`.

    A Flax NNX variable's last key, `value`, is left out: the same rules then serve
    a Linen tree and an `nnx.State`.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


@contextmanager
def at(path: str) -> Iterator[None]:
    """Put the path in front of a node's complaint."""
    try:
        yield
    except (TypeError, ValueError) as error:  # shapes that do not fit raise either
        raise ValueError(f"{path}: {error}") from error


def some(paths: list[str], limit: int = 6) -> str:
    """Write a list of paths, cut where it gets long."""
    rest = f", ... ({len(paths)} in all)" if len(paths) > limit else ""
    return f"[{', '.join(paths[:limit])}{rest}]"
