"""Run one operation with a low-rank update, or a kernel, of each example's own."""

import math

import jax
from jaxtyping import Array, Float

from ftn_jax.factored.factors import Factors
from ftn_jax.factored.lowrank import widen
from ftn_jax.factored.ops import Contraction, Convolution, Op


def low_rank(
    op: Op,
    x: Float[Array, "b ..."],
    kernel: tuple[int, ...],
    factors: Factors,
    shape: tuple[int, ...],
) -> Float[Array, "b ..."]:
    """Return what the examples' low-rank kernels make of them.

    Channels are reduced to `rank` by a batched product, shifted over the taps, and
    widened by another. The kernels are never multiplied out: one kernel for each
    example would be a grouped convolution, twenty times slower on a CPU.

    Args:
        op: the operation.
        x: inputs, one example after the other.
        kernel: shape of the kernel.
        factors: with a leading axis of examples.
        shape: of the outputs.
    """

    def one(x: Float[Array, "..."], factors: Factors) -> Float[Array, "..."]:
        narrow = op.narrow(x[None], kernel, factors, by_taps=True)
        return widen(op, narrow, factors.right, shape[1:])

    return jax.vmap(one)(x, factors)


def own_kernel(
    op: Op, x: Float[Array, "b ..."], kernels: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """Run a contraction, or a 1x1 convolution, with each example's own kernel.

    Raises:
        ValueError: for other operations, see `refusal`.
    """
    if why := refusal(op, kernels.shape[1:]):
        raise ValueError(why)
    if isinstance(op, Convolution):
        x = x[:, *(slice(None, None, s) for s in op.strides)]
        kernels = kernels.reshape(len(kernels), *kernels.shape[-2:])
        options = {k: v for k, v in op.options.items() if k != "dimension_numbers"}
        op = Contraction((((x.ndim - 1,), (0,)), ((), ())), options)
    return jax.vmap(lambda x, kernel: op(x[None], kernel)[0])(x, kernels)


def refusal(op: Op, kernel: tuple[int, ...]) -> str:
    """Say why an operation cannot have a kernel for each example; else empty."""
    if isinstance(op, Contraction):
        return "" if op.roles(len(kernel)) else "it contracts over a batch axis"
    assert isinstance(op, Convolution)
    padded = not isinstance(op.padding, str) and any(map(any, op.padding))
    plain = op.groups == 1 and all(d == 1 for d in op.input_dilation)
    if math.prod(kernel[:-2]) > 1 or padded or not plain:
        return (
            "a convolution with a kernel for each example is a grouped one, many times "
            "slower; give it CP or LoRA"
        )
    return ""
