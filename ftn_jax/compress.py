"""Compress trained parallel adapters by SVD, one task's or several tasks' together.

Source: Rebuffi, Bilen, Vedaldi, "Efficient parametrization of multi-domain deep neural
networks" (arXiv 1803.10082), cross-domain adapter compression. The results are meant
to be trained on; the joint basis stays frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ftn_jax.core import Extended, extend, iter_nodes, split_extras
from ftn_jax.node import Node, is_node
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_svd import (
    BASIS,
    FactoredAdapter,
    SharedBasisAdapter,
    resolve_rank,
)
from ftn_jax.paths import path_name, some

ADAPTERS = (ParallelAdapter, FactoredAdapter)
"""The nodes whose `alpha` can be compressed."""


class Compressed(NamedTuple):
    """One task's compressed adapters.

    Attributes:
        delta: the task's tree; other nodes in it are as they were.
        errors: by path, `||alpha' - alpha|| / ||alpha||` (Frobenius; 0 for a zero
            alpha).
    """

    delta: Any
    errors: dict[str, float]


class JointlyCompressed(NamedTuple):
    """Several tasks' adapters in common bases.

    Attributes:
        shared: the backbone with the bases beside it.
        deltas: the tasks' trees, in the order given.
        errors: for each task, as in `Compressed`.
    """

    shared: Extended
    deltas: list[Any]
    errors: list[dict[str, float]]


def factor_adapters(delta: Any, *, rank: int | float) -> Compressed:
    """Replace every `ParallelAdapter` by the nearest `FactoredAdapter` of rank K.

    `alpha = U S V^T` becomes `beta = U_K S_K^(1/2)`, `gamma = S_K^(1/2) V_K^T`; the
    two have the same size, so that they train at the same pace. Dropout is left out.

    Args:
        delta: a task's tree.
        rank: K, a number or a share of min(C_in, C_out), see `resolve_rank`.

    Raises:
        ValueError: if the delta has no parallel adapter, or for a bad rank.
    """

    def factor(path: str, node: Any) -> FactoredAdapter:
        u, s, vt = _svd(node.alpha, rank)
        root, dtype = np.sqrt(s), node.alpha.dtype
        beta, gamma = (jnp.asarray(x, dtype) for x in (u * root, root[:, None] * vt))
        return FactoredAdapter(beta, gamma, tap=node.tap, group=node.group)

    return _compress(delta, factor, lambda path, node: node.alpha)


def joint_bases(
    deltas: Sequence[Any], *, rank: int | float
) -> dict[str, dict[str, Array]]:
    """Return the basis `beta = U_K S_K` that serves several tasks' adapters best.

    `[alpha_1 ... alpha_T] = U S V^T`, side by side along the output channels, so that
    beta (C_in, K) is what the tasks have in common. Tasks without an adapter at a path
    take no part there.

    Args:
        deltas: the tasks' trees, with `ParallelAdapter` or `FactoredAdapter` nodes.
        rank: K, a number or a share of min(C_in, C_out), see `resolve_rank`. All K
            there are, without any error, is min(C_in, T C_out).

    Returns:
        `{path: {"beta": array}}`, for `extend(shared, adapter_basis=...)`.

    Raises:
        ValueError: if no delta has an adapter, if the tasks' adapters differ in shape
            (names the path), or for a bad rank.
    """
    found: dict[str, list[Any]] = {}
    for delta in deltas:
        for path, node in iter_nodes(delta):
            if isinstance(node, ADAPTERS):
                found.setdefault(path, []).append(node.alpha)
    if not found:
        raise ValueError(
            f"none of the {len(deltas)} deltas has a ParallelAdapter or "
            "FactoredAdapter; train such adapters first"
        )
    bases = {}
    for path, alphas in found.items():
        shapes = [x.shape for x in alphas]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"{path}: the tasks' adapters need one shape, found {shapes}"
            )
        k = rank if _is_number(rank) else resolve_rank(rank, min(shapes[0]))
        u, s, _ = _svd(np.concatenate(alphas, axis=1), k)
        bases[path] = {"beta": jnp.asarray(u * s, alphas[0].dtype)}
    return bases


def share_adapters(shared: Extended, delta: Any) -> Compressed:
    """Project a task's adapters on the bases beside the backbone.

    `gamma` is the least-squares solution of `beta gamma = alpha`. For the tasks that
    the bases were made of this is their joint SVD; a task that came later reuses what
    there is, and its errors tell how much of it that catches.

    Args:
        shared: the backbone with `"adapter_basis"` beside it.
        delta: a task's tree with `ParallelAdapter` or `FactoredAdapter` nodes.

    Raises:
        ValueError: if the delta has no adapter, or one at a path without a basis that
            fits.
    """
    bases: Mapping[str, Any] = split_extras(shared)[1].get(BASIS, {})

    def project(path: str, node: Any) -> SharedBasisAdapter:
        beta = bases.get(path, {}).get("beta")
        if beta is None or beta.shape[0] != node.alpha.shape[0]:
            raise ValueError(
                f"{path}: an adapter of shape {node.alpha.shape} needs a basis of "
                f"{node.alpha.shape[0]} rows in {BASIS!r} beside the backbone, found "
                f"{None if beta is None else beta.shape} (there are bases at "
                f"{some([*bases])}); make them with joint_bases"
            )
        alpha, basis = _float64(node.alpha), _float64(beta)
        # What is below the basis's rounding is no direction to reach for.
        eps = float(jnp.finfo(beta.dtype).eps)
        gamma = np.linalg.lstsq(basis, alpha, rcond=eps)[0]
        gamma = jnp.asarray(gamma, node.alpha.dtype)
        return SharedBasisAdapter(gamma, tap=node.tap, beta=None, group=node.group)

    def rebuilt(path: str, node: Any) -> Any:
        return _float64(bases[path]["beta"]) @ _float64(node.gamma)

    return _compress(delta, project, rebuilt)


def compress_jointly(
    shared: Any, deltas: Sequence[Any], *, rank: int | float
) -> JointlyCompressed:
    """Give several tasks' adapters common bases: one beta a layer, one gamma a task.

    At full rank the parameters are the same to rounding. All tasks must be known; for
    one that comes later see `share_adapters`.

    Args:
        shared: the backbone (what else lies beside it stays).
        deltas: the tasks' trees.
        rank: K, see `joint_bases`; the paper takes half of the channels.

    Raises:
        ValueError: as `joint_bases`, or if the backbone already has such bases.
    """
    extended = extend(shared, **{BASIS: joint_bases(deltas, rank=rank)})
    done = [share_adapters(extended, delta) for delta in deltas]
    return JointlyCompressed(
        extended, [x.delta for x in done], [x.errors for x in done]
    )


def _compress(
    delta: Any,
    change: Callable[[str, Any], Node],
    alpha: Callable[[str, Any], Any],
) -> Compressed:
    """Change every adapter and measure what `alpha` tells of the result."""
    errors: dict[str, float] = {}

    def one(key_path: Any, node: Any) -> Any:
        if not isinstance(node, ADAPTERS):
            return node
        path = path_name(key_path)
        new, old = change(path, node), _float64(node.alpha)
        size = np.linalg.norm(old)
        gap = np.linalg.norm(_float64(alpha(path, new)) - old)
        errors[path] = float(gap / size) if size else float(gap)
        return new

    new = jax.tree_util.tree_map_with_path(one, delta, is_leaf=is_node)
    if not errors:
        raise ValueError(
            "the delta has no ParallelAdapter or FactoredAdapter; nothing to compress"
        )
    return Compressed(new, errors)


def _is_number(rank: Any) -> bool:
    return isinstance(rank, (int, np.integer))


def _svd(
    x: Any, rank: int | float
) -> tuple[Float[np.ndarray, "a k"], Float[np.ndarray, " k"], Float[np.ndarray, "k b"]]:
    u, s, vt = np.linalg.svd(_float64(x), full_matrices=False)
    k = resolve_rank(rank, len(s))
    return u[:, :k], s[:k], vt[:k]


def _float64(x: Any) -> Float[np.ndarray, "..."]:
    return np.asarray(x, np.float64)
