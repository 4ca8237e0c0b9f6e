"""The two operations that are factored: `lax.conv_general_dilated`, `dot_general`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ftn_jax.factored.factors import Factors, Roles


class Op(Protocol):
    """An operation on inputs and a kernel, with everything but these two bound."""

    @property
    def name(self) -> str:
        """What the operation is called in a plan."""
        ...

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of the window; empty where there is none."""
        ...

    @property
    def groups(self) -> int:
        """Number of groups of channels that do not see each other."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """The other arguments, `precision` among them."""
        ...

    def roles(self, ndim: int) -> Roles | None:
        """Return the roles of the kernel's axes; `None`: there is no low-rank path."""
        ...

    def __call__(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run the operation itself."""
        ...

    def narrow(
        self,
        x: Float[Array, "..."],
        kernel: tuple[int, ...],
        factors: Factors,
        *,
        by_taps: bool = False,
    ) -> Float[Array, "*front c"]:
        """Run it with the kernel that `taps` and `left` make: out to rank channels.

        Args:
            x: inputs.
            kernel: shape of the whole kernel.
            factors: of the kernel; `right` is not used.
            by_taps: go over the taps one by one even where `left` spans them: under
                `jax.vmap` over factors, a convolution would be a grouped one, which
                is slow.

        Returns:
            The narrow map, with `rank` channels for each group.
        """
        ...


@dataclass(frozen=True)
class Contraction:
    """`lax.dot_general`, as Dense and DenseGeneral layers call it."""

    dimension_numbers: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "dot"
    strides: tuple[int, ...] = ()
    groups: int = 1

    def roles(self, ndim: int) -> Roles | None:
        """Return which of the kernel's axes are summed over."""
        (_, contracted), (batch, _) = self.dimension_numbers
        if batch or not contracted or not _plain(self.options):
            return None
        outputs = tuple(a for a in range(ndim) if a not in contracted)
        return Roles((), tuple(contracted), outputs)

    def __call__(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run `lax.dot_general`."""
        return lax.dot_general(x, kernel, self.dimension_numbers, **self.options)

    def narrow(
        self,
        x: Float[Array, "..."],
        kernel: tuple[int, ...],
        factors: Factors,
        *,
        by_taps: bool = False,
    ) -> Float[Array, "*front r"]:
        """Contract with `left`; without taps, their factor has one row, of ones."""
        (axes, contracted), _ = self.dimension_numbers
        left = factors.left.reshape(*(kernel[a] for a in contracted), -1)
        return contract(x, left, axes, range(len(axes)), self.options)


@dataclass(frozen=True)
class Convolution:
    """`lax.conv_general_dilated`, as Conv layers call it: channels last."""

    strides: tuple[int, ...]
    padding: Any
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    options: Mapping[str, Any]
    name: str = "conv"

    def roles(self, ndim: int) -> Roles | None:
        """Return taps, input and output channels, if they lie as Flax lays them."""
        last = ndim - 1
        spatial = tuple(range(ndim - 2))
        behind = tuple(a + 1 for a in spatial)
        found = self.options.get("dimension_numbers")
        expected = ((0, last, *behind), (last, last - 1, *spatial), (0, last, *behind))
        laid = found is not None and tuple(map(tuple, found)) == expected
        if not laid or not _plain(self.options):
            return None
        return Roles(spatial, (last - 1,), (last,))

    def __call__(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Run `lax.conv_general_dilated`."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            feature_group_count=self.groups,
            **self.options,
        )

    def narrow(
        self,
        x: Float[Array, "n *s i"],
        kernel: tuple[int, ...],
        factors: Factors,
        *,
        by_taps: bool = False,
    ) -> Float[Array, "n *t g*r"]:
        """Convolve to `rank` channels, or mix the channels and go over the taps.

        Depthwise convolutions are slow, in their gradient above all; the taps are
        shifted multiply-adds of a map that has few channels.
        """
        left, window, steps = factors.left, kernel[:-2], self.strides
        if factors.taps is None and not by_taps:
            left = left.reshape(*kernel[:-1], -1).astype(x.dtype)
            return self(x, jnp.tile(left, self.groups))
        if factors.taps is None:  # each tap mixes the channels in its own way
            left = left.reshape(math.prod(window), -1, left.shape[-1])
            left = left.swapaxes(0, 1).reshape(left.shape[1], -1)
        pads = self._pads(x.shape[1:-1], window)
        if math.prod(window) == 1 and not any(map(any, pads)):
            every = [slice(None, None, s) for s in steps]
            x, steps = x[:, *every], (1,) * len(steps)
            pads = [(0, 0)] * len(steps)
        *front, channels = x.shape
        x = x.reshape(*front, self.groups, channels // self.groups)
        mixed = contract(x, left, [x.ndim - 1], [0], self.options)
        rank = factors.left.shape[-1]
        if factors.taps is None:  # tap by tap, the groups of channels side by side
            mixed = mixed.reshape(*front, self.groups, math.prod(window), rank)
            mixed = mixed.swapaxes(-3, -2)
        mixed = mixed.reshape(*front, math.prod(mixed.shape[len(front) :]))
        inside = [
            (lo, hi, d - 1)
            for (lo, hi), d in zip(pads, self.input_dilation, strict=True)
        ]
        around = [(0, 0, 0), *inside, (0, 0, 0)]
        mixed = lax.pad(mixed, jnp.zeros((), mixed.dtype), around)
        sizes = window, self.kernel_dilation, steps
        if factors.taps is None:
            reach = _reach(mixed.shape[1:-1], *sizes)
            views = _views(mixed, window, self.kernel_dilation, reach, steps)
            width = mixed.shape[-1] // len(views)
            own = [v[..., n * width :][..., :width] for n, v in enumerate(views)]
            return sum(own[1:], own[0])
        taps = jnp.tile(factors.taps, (1, self.groups)).astype(mixed.dtype)
        return _shifted_sum(mixed, taps, *sizes)

    def _pads(
        self, sizes: tuple[int, ...], window: tuple[int, ...]
    ) -> list[tuple[int, int]]:
        if not isinstance(self.padding, str):
            return [(lo, hi) for lo, hi in self.padding]
        given = zip(sizes, self.input_dilation, strict=True)
        dilated = [(n - 1) * d + 1 for n, d in given]
        taps = zip(window, self.kernel_dilation, strict=True)
        spans = [(k - 1) * d + 1 for k, d in taps]
        return list(lax.padtype_to_pads(dilated, spans, self.strides, self.padding))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_sum(
    x: Float[Array, "n *s c"],
    taps: Float[Array, "taps c"],
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    steps: tuple[int, ...],
) -> Float[Array, "n *t c"]:
    """Sum the map as each tap sees it, each channel times the tap's weight."""
    reach = _reach(x.shape[1:-1], window, dilation, steps)
    return _weighed(_views(x, window, dilation, reach, steps), taps)


def _shifted_sum_forward(x: Any, taps: Any, *sizes: Any) -> tuple[Any, Any]:
    return _shifted_sum(x, taps, *sizes), (x, taps)


def _shifted_sum_backward(
    window: Any, dilation: Any, steps: Any, kept: Any, out_bar: Any
) -> tuple[Any, Any]:
    """Shift the gradient, not the input.

    What is shifted depends on the gradient: the compiler cannot make the shifted maps
    of all layers in the forward pass already, and keep them.
    """
    x, taps = kept
    sizes = x.shape[1:-1]
    before = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
    spans = zip(sizes, out_bar.shape[1:-1], steps, strict=True)
    after = [n - (m - 1) * s - 1 for n, m, s in spans]
    around = zip(before, after, (s - 1 for s in steps), strict=True)
    zero = jnp.zeros((), out_bar.dtype)
    spread = lax.pad(out_bar, zero, [(0, 0, 0), *around, (0, 0, 0)])
    once = (1,) * len(window)
    # The first tap sees what lies furthest on.
    views = _views(spread, window, dilation, sizes, once)[::-1]
    axes = tuple(range(x.ndim - 1))
    taps_bar = jnp.stack([(x * view).sum(axes, dtype=taps.dtype) for view in views])
    return _weighed(views, taps), taps_bar


_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


def _reach(sizes: Any, window: Any, dilation: Any, steps: Any) -> list[int]:
    """Return how far each tap's view goes from its first place to its last."""
    spans = zip(sizes, window, dilation, steps, strict=True)
    return [(n - (k - 1) * d - 1) // s * s + 1 for n, k, d, s in spans]


def _views(
    x: Any, window: Any, dilation: Any, reach: Any, steps: Any
) -> list[Float[Array, "n *t c"]]:
    """Cut out what each tap of a window sees."""
    views = []
    for place in itertools.product(*map(range, window)):
        start = [p * d for p, d in zip(place, dilation, strict=True)]
        stop = [a + n for a, n in zip(start, reach, strict=True)]
        limits = (0, *start, 0), (x.shape[0], *stop, x.shape[-1])
        views.append(lax.slice(x, *limits, (1, *steps, 1)))
    return views


def _weighed(
    views: Sequence[Float[Array, "n *t c"]], taps: Float[Array, "taps c"]
) -> Float[Array, "n *t c"]:
    shape = (1,) * (views[0].ndim - 1) + (-1,)
    return sum(v * w.reshape(shape) for v, w in zip(views, taps, strict=True))  # pyright: ignore[reportReturnType]


def _plain(options: Mapping[str, Any]) -> bool:
    """Tell whether the low-rank path honours all options (not, say, a sharding)."""
    known = {"dimension_numbers", "precision", "preferred_element_type"}
    return {*options} <= known


def contract(
    x: Any, y: Any, x_axes: Any, y_axes: Any, options: Mapping[str, Any]
) -> Float[Array, "..."]:
    """Sum over axes of x and y, in x's type, the sum in float32 or better."""
    return lax.dot_general(
        x,
        y.astype(x.dtype),
        ((tuple(x_axes), tuple(y_axes)), ((), ())),
        precision=options.get("precision"),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
