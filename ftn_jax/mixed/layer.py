"""What the examples of a batch have of their own at one layer."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

from ftn_jax.factored.factors import factors_of
from ftn_jax.factored.ops import Op
from ftn_jax.mixed.low_rank import low_rank, own_kernel
from ftn_jax.node import register
from ftn_jax.slots import LowRankSlots, Slots

PER_EXAMPLE = "per_example"
"""The name under which a layer's parameters hold its `Layer`."""


@dataclass(frozen=True, eq=False)
class Record:
    """What one trace found: by path, why a leaf cannot be served; empty if it can."""

    leaves: dict[str, str]


@dataclass(frozen=True)
class Layer:
    """A layer's share of the bank, gathered for the examples of a batch.

    It lies in the layer's own parameters, so that `nn.jit`, `nn.remat` and
    `jax.checkpoint` treat it as they treat these.

    Attributes:
        kernel: the examples' nodes.
        bias: the examples' biases.
        scale: the examples' scales (of norms).
        sizes: how many of the layer's outputs each example's task has.
        slots: of each example's task, one past the last for none; `None` in a probe,
            which only notes down what is met.
        path: of the layer.
        leaves: names and shapes of its leaves that have nodes, in a probe of its state
            too.
        ragged: whether its tasks have outputs of different sizes.
        record: to note down what is met.
    """

    kernel: Slots | None
    bias: Float[Array, "b ..."] | None
    scale: Float[Array, "b ..."] | None
    sizes: Int[Array, " b"] | None
    slots: Int[Array, " b"] | None
    path: str
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    ragged: bool
    record: Record

    def run(
        self, op: Op, x: Float[Array, "b ..."], kernel: Float[Array, "..."]
    ) -> Float[Array, "b ..."]:
        """Return what `op(x, kernel)` would, with every example's own kernel.

        Raises:
            ValueError: if the first axis is not the examples'.
        """
        check_examples(self, x)
        if not isinstance(self.kernel, LowRankSlots):
            assert self.kernel is not None
            return own_kernel(op, x, self.kernel.merge(kernel))
        roles = op.roles(kernel.ndim)
        assert roles is not None
        factors = jax.vmap(lambda node: factors_of(node, kernel.shape, roles))(
            self.kernel
        )
        assert factors is not None  # a probe has seen to it
        out = op(x, kernel)
        more = low_rank(op, x, kernel.shape, factors, out.shape)
        return out + more.astype(out.dtype)


def check_examples(layer: Layer, x: Float[Array, "b ..."]) -> None:
    """Check that a layer's input holds the batch's examples along its first axis.

    Raises:
        ValueError: if it does not.
    """
    assert layer.slots is not None
    if x.shape[:1] != layer.slots.shape:
        raise ValueError(
            f"{layer.path}: the layer's input has the shape {x.shape}, expected "
            f"{len(layer.slots)} examples along the first axis; a network that folds "
            "other axes into it cannot run a mixed batch"
        )


register(
    Layer,
    ("kernel", "bias", "scale", "sizes", "slots"),
    ("path", "leaves", "ragged", "record"),
)
