"""What the examples of a batch have of their own at one layer."""

from dataclasses import dataclass
from typing import Any

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
    """A layer's share of the bank, and which task each example has.

    It lies in the layer's own parameters, so that `nn.jit`, `nn.remat` and
    `jax.checkpoint` treat it as they treat these.

    Attributes:
        kernel: the tasks' nodes.
        bias: the tasks' biases.
        scale: the tasks' scales (of norms).
        sizes: how many of the layer's outputs each task has.
        slots: of each example's task, one past the last for none; `None` in a probe,
            which only notes down what is met.
        path: of the layer.
        leaves: names and shapes of its leaves that have nodes, in a probe of its state
            too.
        ragged: whether its tasks have outputs of different sizes.
        record: to note down what is met.
    """

    kernel: Slots | None
    bias: Float[Array, "slots ..."] | None
    scale: Float[Array, "slots ..."] | None
    sizes: Int[Array, " slots"] | None
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
        self.check_examples(x)
        if not isinstance(self.kernel, LowRankSlots):
            assert self.kernel is not None
            return own_kernel(op, x, self.of_examples(self.kernel.merge(kernel)))
        roles = op.roles(kernel.ndim)
        assert roles is not None
        factors = jax.vmap(lambda node: factors_of(node, kernel.shape, roles))(
            self.kernel
        )
        assert factors is not None  # a probe has seen to it
        out = op(x, kernel)
        own = self.of_examples(factors)
        return out + low_rank(op, x, kernel.shape, own, out.shape).astype(out.dtype)

    def of_examples(self, tree: Any) -> Any:
        """Gather, for each example, its task's row of arrays by slots.

        As late as can be: what is computed of the rows is computed once a task.
        """
        return jax.tree.map(lambda x: x.at[self.slots].get(mode="clip"), tree)

    def check_examples(self, x: Float[Array, "b ..."]) -> None:
        """Check that the layer's input holds the batch's examples along its first axis.

        Raises:
            ValueError: if it does not.
        """
        assert self.slots is not None
        if x.shape[:1] != self.slots.shape:
            raise ValueError(
                f"{self.path}: the layer's input has the shape {x.shape}, expected "
                f"{len(self.slots)} examples along the first axis; a network that "
                "folds other axes into it cannot run a mixed batch"
            )


register(
    Layer,
    ("kernel", "bias", "scale", "sizes", "slots"),
    ("path", "leaves", "ragged", "record"),
)
