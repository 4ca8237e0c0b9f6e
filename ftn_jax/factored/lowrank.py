"""The low-rank path of an operation, and what is differentiated along it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from ftn_jax.factored.factors import Factors
from ftn_jax.factored.ops import Op, contract

Run = Callable[[Float[Array, "..."], Float[Array, "..."], Factors], Any]


def on_merged_kernel(op: Op) -> Run:
    """Make `run(x, kernel, factors)`: `op(x, kernel)`, differentiated by the factors.

    The kernel is what the factors were merged into. It has no gradient here; the
    factors have theirs, along the low-rank path, which does not run forward.

    Raises:
        NotImplementedError: when a gradient is differentiated by the factors once
            more: that the kernel depends on them is not known here.
    """

    @jax.custom_vjp
    def run(x: Any, kernel: Any, factors: Factors) -> Any:
        return op(x, kernel)

    def forward(x: Any, kernel: Any, factors: Factors) -> tuple[Any, Any]:
        return op(x, kernel), (x, kernel, _differentiated_once(factors))

    def backward(kept: Any, out_bar: Any) -> tuple[Any, None, Factors]:
        x, kernel, factors = kept
        (x_bar,) = jax.vjp(lambda x: op(x, kernel), x)[1](out_bar)
        narrow, pull = jax.vjp(lambda f: op.narrow(x, kernel.shape, f), factors)
        narrow_bar, right_bar = _widen_back(op, narrow, factors.right, out_bar)
        (factors_bar,) = pull(narrow_bar)
        return x_bar, None, _with_right(factors_bar, right_bar)

    run.defvjp(forward, backward)
    return run


@jax.custom_jvp
def _differentiated_once(factors: Factors) -> Factors:
    return factors


@_differentiated_once.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "the factored path has first derivatives only where it merges kernels; take "
        "second ones with forward=merged, or with Factored(choose='branch')"
    )


def beside_kernel(op: Op) -> Run:
    """Make `run(x, kernel, factors)`: `op(x, kernel)` plus the low-rank path.

    The kernel is frozen and has no gradient.
    """

    @jax.custom_vjp
    def run(x: Any, kernel: Any, factors: Factors) -> Any:
        return forward(x, kernel, factors)[0]

    def forward(x: Any, kernel: Any, factors: Factors) -> tuple[Any, Any]:
        narrow, pull = jax.vjp(lambda x, f: op.narrow(x, kernel.shape, f), x, factors)
        out = op(x, kernel)
        out = out + widen(op, narrow, factors.right, out.shape).astype(out.dtype)
        return out, (x, kernel, factors.right, narrow, pull)

    def backward(kept: Any, out_bar: Any) -> tuple[Any, None, Factors]:
        x, kernel, right, narrow, pull = kept
        (x_bar,) = jax.vjp(lambda x: op(x, kernel), x)[1](out_bar)
        narrow_bar, right_bar = _widen_back(op, narrow, right, out_bar)
        more, factors_bar = pull(narrow_bar)
        return x_bar + more, None, _with_right(factors_bar, right_bar)

    run.defvjp(forward, backward)
    return run


def widen(
    op: Op,
    narrow: Float[Array, "*front g*r"],
    right: Float[Array, "g*o r"],
    shape: tuple[int, ...],
) -> Float[Array, "..."]:
    """Take each group's rank channels to its output channels."""

    def one(narrow: Any, right: Any) -> Float[Array, "n o"]:
        return contract(narrow, right, [1], [1], op.options)

    (rows,), columns = _by_group(op, right, narrow)
    if op.groups > 1:
        return jax.vmap(one, (1, 0), 1)(rows, columns).reshape(shape)
    return one(rows[:, 0], columns[0]).reshape(shape)


def _widen_back(
    op: Op,
    narrow: Float[Array, "*front g*r"],
    right: Float[Array, "g*o r"],
    out_bar: Float[Array, "..."],
) -> tuple[Float[Array, "*front g*r"], Float[Array, "g*o r"]]:
    """Return the gradients of the narrow map and of `right`."""

    def back(narrow: Any, right: Any, out_bar: Any) -> tuple[Any, Any]:
        narrow_bar = contract(out_bar, right, [1], [0], op.options)
        # The narrow one first, since a product over rows has its first one transposed.
        narrow = narrow.astype(out_bar.dtype)
        return narrow_bar, contract(narrow, out_bar, [0], [0], op.options).T

    (rows, bars), columns = _by_group(op, right, narrow, out_bar)
    if op.groups > 1:
        narrow_bar, right_bar = jax.vmap(back, (1, 0, 1), (1, 0))(rows, columns, bars)
    else:  # not as a group of one: large arrays would be copied for it
        narrow_bar, right_bar = back(rows[:, 0], columns[0], bars[:, 0])
    narrow_bar = narrow_bar.reshape(narrow.shape).astype(narrow.dtype)
    return narrow_bar, right_bar.reshape(right.shape).astype(right.dtype)


def _by_group(op: Op, right: Any, narrow: Any, *maps: Any) -> tuple[list[Any], Any]:
    """Lay maps out as (places, group, channels), and `right` as (group, channels, r).

    Sizes are said, not left to `reshape`: a map may be empty.
    """
    places, groups = math.prod(narrow.shape[:-1]), op.groups
    wide, rank = right.shape[0] // groups, right.shape[1]
    rows = [narrow.reshape(places, groups, rank)]
    rows += [x.reshape(places, groups, wide) for x in maps]
    return rows, right.reshape(groups, wide, rank)


def _with_right(factors: Factors, right: Any) -> Factors:
    return Factors(factors.taps, factors.left, right)
