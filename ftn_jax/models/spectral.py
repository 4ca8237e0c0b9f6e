"""Spectral normalization as a function of a parameter tree: W / sigma for each kernel.

A network is trained on unnormalized weights by running it on `normalize`'s result;
what is frozen, saved and adapted later is that result, in which nothing is left to do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class Normalized(NamedTuple):
    """The parameters that run, and the vectors for the next call."""

    params: Any
    vectors: Any


def start_vectors(
    key: Key[Array, ""],
    params: Any,
    *,
    where: Callable[[str], bool] = lambda path: path.endswith("kernel"),
) -> Any:
    """Draw the vector that approximates each kernel's first singular vector.

    Args:
        key: PRNG key.
        params: A tree of arrays.
        where: Which leaves are normalized, by path (`"block0/conv1/kernel"`).

    Returns:
        A tree like `params`: a unit vector of the last axis' length, or `None`.
    """

    def draw(path: Any, w: Any, key: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _unit(jax.random.normal(key, w.shape[-1:])) if where(name) else None

    leaves, treedef = jax.tree.flatten(params)
    keys = treedef.unflatten(list(jax.random.split(key, len(leaves))))
    return jax.tree_util.tree_map_with_path(draw, params, keys)


def normalize(params: Any, vectors: Any, *, steps: int = 1) -> Normalized:
    """Divide kernels by their largest singular value, estimated by power iteration.

    Differentiable in `params`; the vectors count as constants.

    Args:
        params: A tree of arrays; the last axis of each is its outputs.
        vectors: From `start_vectors` or an earlier call.
        steps: Iterations, at least 1.

    Source: Miyato et al., "Spectral normalization for GANs" (2018), Algorithm 1.
    """
    leaves, treedef = jax.tree.flatten(params)
    old = treedef.flatten_up_to(vectors)
    pairs = [
        (w, None) if u is None else _divide(w, u, steps)
        for w, u in zip(leaves, old, strict=True)
    ]
    return Normalized(*(treedef.unflatten(x) for x in zip(*pairs, strict=True)))


def _divide(
    w: Float[Array, "... o"], u: Float[Array, " o"], steps: int
) -> tuple[Float[Array, "... o"], Float[Array, " o"]]:
    matrix = w.reshape(-1, w.shape[-1])
    fixed = jax.lax.stop_gradient(matrix)
    u = jax.lax.fori_loop(0, steps - 1, lambda _, u: _unit(_unit(fixed @ u) @ fixed), u)
    v = _unit(fixed @ u)
    u = _unit(v @ fixed)
    return w / (v @ matrix @ u), u


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)
