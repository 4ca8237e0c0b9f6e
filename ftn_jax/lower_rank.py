"""Bring updates down to a lower rank, and say what that costs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ftn_jax.algebra import check_low_rank
from ftn_jax.node import Node, is_node
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.matrix import check_rank
from ftn_jax.nodes.replace import Replace
from ftn_jax.paths import at, path_name

Matrix = Float[np.ndarray, "rows rank"]


class Recompressed(NamedTuple):
    """A task of lower rank.

    Attributes:
        delta: the task's tree; nodes of that rank or less are as they were.
        errors: by path, `||update' - update|| / ||update||` (Frobenius), of the arrays
            as they are returned; 0 for nodes that are as they were.
    """

    delta: Any
    errors: dict[str, float]


def recompress(
    delta: Any, rank: int, *, starts: int = 4, iterations: int = 300, seed: int = 0
) -> Recompressed:
    """Replace each low-rank update by one of a lower rank that is near it.

    LoRA, and CP of two factors, by their singular value decomposition: there is none
    nearer. CP of three or more factors by alternating least squares, from several
    starts: its error is what was found, and may not be the least there is.

    Args:
        delta: the task's tree; its `Replace` nodes stay as they are.
        rank: the highest that is left (for LoRA of the form `"reshape"`, the size of
            the inner axis).
        starts: of alternating least squares: the largest terms, the terms of a matrix
            pencil, which are right if that rank is enough, then random ones.
        iterations: of each start, at most.
        seed: of the random starts.

    Raises:
        ValueError: for a bad rank, or for nodes that are no sums of factors' products
            or hold numbers that are not finite (names the path).

    Source: Kolda and Bader, "Tensor decompositions and applications" (2009), figure
    3.3, for alternating least squares; Leurgans, Ross, Abel, "A decomposition for
    three-way arrays" (1993), for the pencil.
    """
    check_rank(rank)
    check_rank(starts)
    errors: dict[str, float] = {}

    def nearer(factors: Sequence[Matrix]) -> list[Matrix]:
        if len(factors) == 1:  # a sum of vectors is one vector
            return [factors[0].sum(axis=1, keepdims=True)]
        if len(factors) == 2:
            left, right = factors
            return _truncated(left, right, rank)
        return _alternating(factors, rank, starts, iterations, seed)

    def one(key_path: Any, node: Any) -> Node:
        path = path_name(key_path)
        if isinstance(node, Replace):
            return node
        with at(path):
            check_low_rank(node)
        old = _factors(node)
        if old[0].shape[1] <= rank:
            errors[path] = 0.0
            return node
        if not all(np.isfinite(f).all() for f in old):
            raise ValueError(f"{path}: the factors hold NaN or infinity")
        new = _with_factors(node, nearer(old))
        size = _norm(old)
        gap = _norm(_difference(_factors(new), old))
        errors[path] = gap / size if size else gap
        return new

    new = jax.tree_util.tree_map_with_path(one, delta, is_leaf=is_node)
    return Recompressed(new, errors)


def _factors(node: Any) -> list[Matrix]:
    """Return a node's factor matrices, without its scale."""
    if isinstance(node, CP):
        return [np.asarray(f, np.float64) for f in node.factors]
    left, right = (node.a, node.b.T) if node.form == "conv" else (node.b, node.a.T)
    return [np.asarray(left, np.float64), np.asarray(right, np.float64)]


def _with_factors(node: Any, factors: Sequence[Matrix]) -> Node:
    if isinstance(node, CP):
        pairs = zip(factors, node.factors, strict=True)
        return node.replace(factors=tuple(jnp.asarray(x, f.dtype) for x, f in pairs))
    assert isinstance(node, LoRA)
    left, right = factors
    a, b = (left, right.T) if node.form == "conv" else (right.T, left)
    return node.replace(a=jnp.asarray(a, node.a.dtype), b=jnp.asarray(b, node.b.dtype))


def _truncated(left: Matrix, right: Matrix, rank: int) -> list[Matrix]:
    """Keep the largest singular values of `left right^T`, shared out evenly."""
    (q, r), (p, s) = np.linalg.qr(left), np.linalg.qr(right)
    u, values, vt = np.linalg.svd(r @ s.T)
    k = min(rank, len(values))
    root = np.sqrt(values[:k])
    return [q @ (u[:, :k] * root), p @ (vt[:k].T * root)]


def _difference(a: Sequence[Matrix], b: Sequence[Matrix]) -> list[Matrix]:
    """Return the factors of the difference of two sums of outer products."""
    first = np.concatenate([a[0], -b[0]], axis=1)
    pairs = zip(a[1:], b[1:], strict=True)
    return [first, *(np.concatenate(pair, axis=1) for pair in pairs)]


def _norm(factors: Sequence[Matrix]) -> float:
    """Return the Frobenius norm of a sum of outer products.

    Taken of the core that is left when each factor is made orthonormal: inner products
    of the terms would cancel where the sum is near zero.
    """
    cores = [np.linalg.qr(f, mode="r") for f in factors]
    letters = [chr(ord("a") + n) for n in range(len(cores))]
    terms = ",".join(f"{x}Z" for x in letters) + "->" + "".join(letters)
    return float(np.linalg.norm(np.einsum(terms, *cores, optimize=True)))


def _alternating(
    factors: Sequence[Matrix], rank: int, starts: int, iterations: int, seed: int
) -> list[Matrix]:
    """Fit `rank` terms by alternating least squares; the best of several starts."""
    bases, cores = zip(*(np.linalg.qr(f) for f in factors), strict=True)
    rng = np.random.default_rng(seed)
    begin = [_largest(cores, rank), _pencil(cores, rank, rng)]
    while len(begin) < starts:
        begin.append([rng.normal(size=(len(c), rank)) for c in cores])
    fits = [_descend(cores, start, iterations) for start in begin[:starts]]
    # The start is a candidate too: a fit never leaves it for a worse one.
    best = min([begin[0], *fits], key=lambda fit: _norm(_difference(fit, cores)))
    return [q @ f for q, f in zip(bases, _balanced(best), strict=True)]


def _largest(factors: Sequence[Matrix], rank: int) -> list[Matrix]:
    size = np.prod([np.linalg.norm(f, axis=0) for f in factors], axis=0)
    keep = np.argsort(-size, kind="stable")[:rank]
    return [f[:, keep] for f in factors]


def _pencil(factors: Sequence[Matrix], rank: int, rng: Any) -> list[Matrix]:
    """Return the terms that two mixtures of the tensor's slices have in common.

    Random ones if there are not three factors, two of them with `rank` rows.
    """
    order = sorted(range(len(factors)), key=lambda n: -len(factors[n]))
    a, b, *rest = (factors[n] for n in order)
    if len(rest) != 1 or len(b) < rank:
        return [rng.normal(size=(len(f), rank)) for f in factors]
    tensor = np.einsum("ir,jr,kr->ijk", a, b, rest[0], optimize=True)
    sides = tensor.reshape(len(a), -1), tensor.swapaxes(0, 1).reshape(len(b), -1)
    u, v = (np.linalg.svd(x, full_matrices=False)[0][:, :rank] for x in sides)
    mixtures = rng.normal(size=(len(rest[0]), 2))
    one, two = u.T @ (tensor @ mixtures).transpose(2, 0, 1) @ v
    terms = u @ np.real(np.linalg.eig(one @ np.linalg.pinv(two))[1])
    # Each term's partners are the nearest outer product of what is left.
    left = (np.linalg.pinv(terms) @ sides[0]).reshape(rank, len(b), -1)
    p, s, q = np.linalg.svd(left, full_matrices=False)
    found = terms, (p[:, :, 0] * s[:, :1]).T, q[:, 0].T
    return [found[order.index(n)] for n in range(3)]


def _descend(
    target: Sequence[Matrix], start: Sequence[Matrix], iterations: int
) -> list[Matrix]:
    """Solve for one factor after the other until the fit stands still."""
    fit, last = list(start), np.inf
    for _ in range(iterations):
        for n in range(len(fit)):
            others = [m for m in range(len(fit)) if m != n]
            gram = np.prod([fit[m].T @ fit[m] for m in others], axis=0)
            cross = np.prod([target[m].T @ fit[m] for m in others], axis=0)
            # Terms may come to lie along each other; the pseudo-inverse bears that.
            fit[n] = target[n] @ cross @ np.linalg.pinv(gram, rcond=1e-12)
            if n < len(fit) - 1:
                length = np.linalg.norm(fit[n], axis=0)
                fit[n] = fit[n] / np.where(length > 0, length, 1)
        gap = _norm(_difference(fit, target))
        if last - gap <= 1e-9 * last:
            break
        last = gap
    return fit


def _balanced(factors: Sequence[Matrix]) -> list[Matrix]:
    """Give each term's vectors one length, so that they train at one pace."""
    lengths = np.stack([np.linalg.norm(f, axis=0) for f in factors])
    even = np.prod(lengths, axis=0) ** (1 / len(factors))
    safe = np.where(lengths > 0, lengths, 1)
    return [f * (even / s) for f, s in zip(factors, safe, strict=True)]
