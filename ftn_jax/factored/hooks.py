"""Stand in for a layer's operation, and carry what it needs beside the kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ftn_jax.factored.factors import Factors
from ftn_jax.factored.lowrank import beside_kernel, on_merged_kernel
from ftn_jax.factored.ops import Contraction, Convolution, Op
from ftn_jax.node import register

BESIDE = "kernel_factors"
"""The name, beside `kernel`, under which a layer's parameters hold its companion."""


class Companion(Protocol):
    """What lies beside a kernel and runs its layer's operation.

    A pytree in the layer's parameters, so that jit, scan, vmap and checkpoint, lifted
    by Flax or not, treat it as they treat the kernel: it is sliced with it, and two
    layers that share one trace share it only if their companions are alike.
    """

    def run(
        self, op: Op, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Return what `op(x, kernel)` would."""
        ...


@dataclass(frozen=True)
class Use:
    """One operation that a probe met, with the shapes it was called with.

    Attributes:
        path: of the weight whose layer ran it.
        op: the operation.
        x: its input.
        kernel: what it got for a kernel.
        out: its output.
    """

    path: str
    op: Op
    x: jax.ShapeDtypeStruct
    kernel: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct


@dataclass(frozen=True, eq=False)
class Record:
    """The uses that one probe met, each under a tag that the traced program shows."""

    uses: dict[str, Use]

    def tag(self, x: Any, use: Use) -> Any:
        """Mark the kernel `x` as what this use reads."""
        name = f"{id(self)}:{len(self.uses)}"
        self.uses[name] = use
        return checkpoint_name(x, name)


@dataclass(frozen=True)
class Mark:
    """The companion of a probe: without arrays, each of a tree structure of its own.

    Layers of one shape that share a trace under `nn.jit` are thus traced one by one,
    and a probe never meets the trace of an earlier one.
    """

    record: Record
    path: str

    def run(
        self, op: Op, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run the operation, and record it."""
        out = jax.eval_shape(op, x, kernel)
        use = Use(
            self.path,
            op,
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel, out)),
        )
        return op(x, self.record.tag(kernel, use))


register(Mark, (), ("record", "path"))


@dataclass(frozen=True)
class Chain:
    """The companion of a merged kernel: the factors of what was merged into it."""

    factors: Factors

    def run(
        self, op: Op, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run on the merged kernel; differentiate the factors, not the kernel."""
        return on_merged_kernel(op)(x, kernel, self.factors)


@dataclass(frozen=True)
class Branch:
    """The companion of a frozen kernel: the factors of what is added to it."""

    factors: Factors

    def run(
        self, op: Op, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run the low-rank path beside the operation on the frozen kernel."""
        return beside_kernel(op)(x, kernel, self.factors)


register(Chain, ("factors",), ())
register(Branch, ("factors",), ())


def convolve_with(companion: Companion) -> Callable[..., Any]:
    """Make the function that takes the place of `lax.conv_general_dilated`."""

    def conv_general_dilated(
        lhs: Float[Array, "..."],
        rhs: Float[Array, "..."],
        window_strides: Any,
        padding: Any,
        *,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        feature_group_count: int = 1,
        **options: Any,
    ) -> Float[Array, "..."]:
        once = (1,) * (lhs.ndim - 2)
        op = Convolution(
            strides=tuple(window_strides),
            padding=padding if isinstance(padding, str) else _pairs(padding),
            input_dilation=tuple(lhs_dilation or once),
            kernel_dilation=tuple(rhs_dilation or once),
            groups=feature_group_count,
            options=_given(options),
        )
        return companion.run(op, lhs, rhs)

    return conv_general_dilated


def contract_with(companion: Companion) -> Callable[..., Any]:
    """Make the function that takes the place of `lax.dot_general`."""

    def dot_general(
        lhs: Float[Array, "..."],
        rhs: Float[Array, "..."],
        dimension_numbers: Any,
        **options: Any,
    ) -> Float[Array, "..."]:
        op = Contraction(dimension_numbers, _given(options))
        return companion.run(op, lhs, rhs)

    return dot_general


FIELDS: Mapping[str, Callable[[Companion], Callable[..., Any]]] = {
    "conv_general_dilated": convolve_with,
    "dot_general": contract_with,
}
"""The fields of Flax's layers that hold their operation, and what takes its place."""


def _pairs(padding: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(lo), int(hi)) for lo, hi in padding)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
