"""The low-rank path of an operation, and what is differentiated along it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.factored.factors import Factors
from ftn_jax.factored.ops import Op

Run = Callable[[Float[Array, "..."], Float[Array, "..."], Factors], Any]


def on_merged_kernel(op: Op) -> Run:
    """Make `run(x, kernel, factors)`: `op(x, kernel)`, differentiated by the factors.

    The kernel is what the factors were merged into. It has no gradient here; the
    factors have theirs, along the low-rank path, which does not run forward.
    """

    @jax.custom_vjp
    def run(x: Any, kernel: Any, factors: Factors) -> Any:
        return op(x, kernel)

    def forward(x: Any, kernel: Any, factors: Factors) -> tuple[Any, Any]:
        return op(x, kernel), (x, kernel, factors)

    def backward(kept: Any, out_bar: Any) -> tuple[Any, None, Factors]:
        x, kernel, factors = kept
        (x_bar,) = jax.vjp(lambda x: op(x, kernel), x)[1](out_bar)
        narrow, pull = jax.vjp(lambda f: op.narrow(x, kernel.shape, f), factors)
        narrow_bar, right_bar = _widen_back(op, narrow, factors.right, out_bar)
        (factors_bar,) = pull(narrow_bar)
        return x_bar, None, _with_right(factors_bar, right_bar)

    run.defvjp(forward, backward)
    return run


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
        out = out + _widen(op, narrow, factors.right, out.shape).astype(out.dtype)
        return out, (x, kernel, factors.right, narrow, pull)

    def backward(kept: Any, out_bar: Any) -> tuple[Any, None, Factors]:
        x, kernel, right, narrow, pull = kept
        (x_bar,) = jax.vjp(lambda x: op(x, kernel), x)[1](out_bar)
        narrow_bar, right_bar = _widen_back(op, narrow, right, out_bar)
        more, factors_bar = pull(narrow_bar)
        return x_bar + more, None, _with_right(factors_bar, right_bar)

    run.defvjp(forward, backward)
    return run


def _widen(
    op: Op,
    narrow: Float[Array, "*front g*r"],
    right: Float[Array, "g*o r"],
    shape: tuple[int, ...],
) -> Float[Array, "..."]:
    """Take each group's rank channels to its output channels."""
    x, y = _rows(op, narrow), right.reshape(op.groups, -1, right.shape[-1])
    return _sum(op, "ngr,gor->ngo", x, y).reshape(shape)


def _widen_back(
    op: Op,
    narrow: Float[Array, "*front g*r"],
    right: Float[Array, "g*o r"],
    out_bar: Float[Array, "..."],
) -> tuple[Float[Array, "*front g*r"], Float[Array, "g*o r"]]:
    """Return the gradients of the narrow map and of `right`."""
    wide = _rows(op, out_bar.reshape(*narrow.shape[:-1], -1))
    split = right.reshape(op.groups, -1, right.shape[-1])
    narrow_bar = _sum(op, "ngo,gor->ngr", wide, split).reshape(narrow.shape)
    # The narrow map is the one to be transposed, and it comes first.
    right_bar = _sum(op, "ngr,ngo->gro", _rows(op, narrow), wide)
    right_bar = right_bar.swapaxes(1, 2).reshape(right.shape)
    return narrow_bar.astype(narrow.dtype), right_bar.astype(right.dtype)


def _rows(op: Op, x: Float[Array, "*front g*c"]) -> Float[Array, "n g c"]:
    return x.reshape(math.prod(x.shape[:-1]), op.groups, -1)


def _sum(
    op: Op, subscripts: str, x: Float[Array, "_ _ _"], y: Float[Array, "_ _ _"]
) -> Float[Array, "_ _ _"]:
    """Multiply in the less precise of the two types, sum in float32 or better."""
    dtype = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    out = subscripts[-3:]
    if op.groups == 1:  # an axis of one entry would have large arrays copied
        group = [subscripts.index("g"), subscripts[4:].index("g")]
        x, y = x.squeeze(group[0]), y.squeeze(group[1])
        subscripts = subscripts.replace("g", "")
    total = jnp.einsum(
        subscripts,
        x.astype(dtype),
        y.astype(dtype),
        precision=op.options.get("precision"),
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    return jnp.expand_dims(total, out.index("g")) if op.groups == 1 else total


def _with_right(factors: Factors, right: Any) -> Factors:
    return Factors(factors.taps, factors.left, right)
