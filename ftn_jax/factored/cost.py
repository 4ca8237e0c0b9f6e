"""Count the work of a weight's gradient, whole or along the factors, and compare."""

import math
from typing import NamedTuple

import jax

from ftn_jax.factored.factors import Factors
from ftn_jax.factored.hooks import Use


class Cost(NamedTuple):
    """Counted work.

    Attributes:
        matmul: floating-point operations in products and convolutions.
        elementwise: those in shifted multiply-adds.
        bytes: read and written, each array once an operation.
        moved: numbers that change their order for the gradient of a whole kernel.
    """

    matmul: float
    elementwise: float
    bytes: float
    moved: float = 0.0

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.matmul + self.elementwise


class Work(NamedTuple):
    """What a node adds to a training step of the frozen network, on each way.

    Attributes:
        kernel: merge; the gradient of the whole weight, then the merge's own.
        chain: merge; the gradient along the low-rank path.
        branch: the low-rank path beside the frozen operation, and its gradient.
    """

    kernel: Cost
    chain: Cost
    branch: Cost


class Machine(NamedTuple):
    """What a machine does in a second, coarsely."""

    matmul: float
    elementwise: float
    bytes: float
    moved: float

    def seconds(self, cost: Cost) -> float:
        """Return how long the work takes."""
        return sum(c / r for c, r in zip(cost, self, strict=True))


# CPU: fitted to the convolutions of a ResNet-18 at 96 px on two cores; only ratios
# matter. Others: round figures of a large GPU in float32, not fitted to timings.
MACHINES = {"cpu": Machine(matmul=100e9, elementwise=4e9, bytes=20e9, moved=3e8)}
ACCELERATOR = Machine(matmul=50e12, elementwise=5e12, bytes=2e12, moved=5e11)


def cheapest(work: Work, backend: str | None = None) -> str:
    """Return the name of the way that takes least time by the counts.

    Args:
        work: of one weight.
        backend: name of JAX's backend, by default the current one.
    """
    machine = MACHINES.get(backend or jax.default_backend(), ACCELERATOR)
    return min(work._fields, key=lambda name: machine.seconds(getattr(work, name)))


def count_merge(kernel: jax.ShapeDtypeStruct, rank: int) -> Cost:
    """Count the work of multiplying out a low-rank kernel and adding it."""
    product, total = kernel.size, 3.0 * kernel.size
    width = kernel.dtype.itemsize
    return Cost(2.0 * kernel.size * rank, 0.0, width * (product + total))


def count_use(use: Use, factors: Factors) -> Work:
    """Count the work of one use of a weight in one training step, less the merge.

    Args:
        use: the operation and its shapes.
        factors: of one layer (of what scans slice, one slice).
    """
    op, (x, kernel, out) = use.op, (use.x, use.kernel, use.out)
    roles = op.roles(len(kernel.shape))
    assert roles is not None, f"{op.name} has no low-rank path"
    rank = factors.right.shape[-1]
    outputs = math.prod(kernel.shape[a] for a in roles.outputs)
    each, width = kernel.size // outputs, kernel.dtype.itemsize
    narrow = out.size // outputs * op.groups * rank  # each group has its own channels
    into, shift = 2.0 * narrow * each, 0.0
    if factors.taps is not None:
        taps = math.prod(kernel.shape[a] for a in roles.taps)
        slow = 2 if any(s > 1 for s in op.strides) else 1
        slow *= max(1, 8 / (op.groups * rank))  # few channels fill no vector
        into, shift = 2.0 * x.size * rank, 2.0 * narrow * taps * slow * (taps > 1)
    once, both = into + 2.0 * out.size * rank, width * (x.size + out.size)
    whole = Cost(
        2.0 * out.size * each + 4.0 * kernel.size * rank,
        0.0,
        both + 4.0 * width * kernel.size,
        float(x.size + out.size),
    )
    return Work(
        kernel=whole,
        chain=Cost(2 * once, 3 * shift, 2.0 * both),
        branch=Cost(3 * once, 3 * shift, 5.0 * both),
    )
