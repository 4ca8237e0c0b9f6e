"""Read a node as low-rank factors of the operation that its weight serves."""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.node import Node, register
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.lora import LoRA


class Roles(NamedTuple):
    """What an operation does with each axis of its kernel."""

    taps: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Polyadic(NamedTuple):
    """A sum of `rank` outer products: `scale * sum_r f1[:, r] o f2[:, r] o ...`.

    Attributes:
        factors: one `(size of the axis group, rank)` matrix for each group of axes.
        axes: the weight's axes that each factor spans.
        scale: multiplies the sum.
    """

    factors: tuple[Float[Array, "_ rank"], ...]
    axes: tuple[tuple[int, ...], ...]
    scale: float

    @property
    def rank(self) -> int:
        """The number of terms."""
        return self.factors[0].shape[-1]


@singledispatch
def polyadic(node: Node, shape: tuple[int, ...]) -> Polyadic | None:
    """Return what the node adds to a weight of this shape, if it has that form.

    Register a function for a node type of your own to have it run factored:
    `node.merge(w)` must then be `w` plus this sum. A subclass of CP or LoRA that
    merges in another way has no such form until a function is registered for it.
    """
    return None


@polyadic.register
def _(node: CP, shape: tuple[int, ...]) -> Polyadic | None:
    if type(node).merge is not CP.merge:
        return None
    return Polyadic(node.factors, node.axes, node.scale)


@polyadic.register
def _(node: LoRA, shape: tuple[int, ...]) -> Polyadic | None:
    # loralib's layout, the form "reshape", mixes taps and channels.
    if node.form != "conv" or type(node).merge is not LoRA.merge:
        return None
    rows, every = node.a.shape[0], range(len(shape))
    cuts = [n + 1 for n in every if math.prod(shape[: n + 1]) == rows]
    if not cuts:  # it does not fit: the merge says so
        return None
    axes = tuple(every[: cuts[0]]), tuple(every[cuts[0] :])
    return Polyadic((node.a, node.b.T), axes, node.scale)


@dataclass(frozen=True)
class Factors:
    """The low-rank path of one layer: to `rank` channels, over the taps, out.

    Attributes:
        taps: weight of each tap for each term; `None` if `left` spans the taps too;
            one row of ones for an operation without taps.
        left: what reads the input channels (or taps and input channels, row-major).
        right: what makes the output channels, the scale included.
    """

    taps: Float[Array, "taps rank"] | None
    left: Float[Array, "inputs rank"]
    right: Float[Array, "outputs rank"]


register(Factors, ("taps", "left", "right"), ())


def factors_of(node: Node, shape: tuple[int, ...], roles: Roles) -> Factors | None:
    """Arrange a node's factors for the operation that its weight serves.

    Args:
        node: a complete node that fits the weight.
        shape: of the weight.
        roles: of the kernel's axes in the operation.

    Returns:
        The factors, or `None` if the node has no polyadic form, or one that ties an
        output channel to an input channel or a tap.
    """
    form = polyadic(node, shape)
    if form is None:
        return None
    sides: dict[str, list[int]] = {"taps": [], "left": [], "right": [], "mixed": []}
    for n, span in enumerate(form.axes):
        # An axis of one entry ties nothing to anything.
        real = {a for a in span if shape[a] > 1}
        if real <= {*roles.outputs}:
            sides["right"].append(n)
        elif real <= {*roles.inputs}:
            sides["left"].append(n)
        elif real <= {*roles.taps}:
            sides["taps"].append(n)
        elif real <= {*roles.taps, *roles.inputs}:
            sides["mixed"].append(n)
        else:
            return None
    right = _product(form, sides["right"], roles.outputs, shape)
    right = jnp.asarray(form.scale, right.dtype) * right
    if sides["mixed"]:
        terms = sides["mixed"] + sides["left"] + sides["taps"]
        return Factors(
            None, _product(form, terms, (*roles.taps, *roles.inputs), shape), right
        )
    left = _product(form, sides["left"], roles.inputs, shape)
    return Factors(_product(form, sides["taps"], roles.taps, shape), left, right)


def _product(
    form: Polyadic, terms: list[int], axes: tuple[int, ...], shape: tuple[int, ...]
) -> Float[Array, "rows rank"]:
    """Multiply some of the factors to one matrix over `axes`, row-major."""
    rows = math.prod(shape[a] for a in axes)
    if not terms:
        return jnp.ones((rows, form.rank), form.factors[0].dtype)
    letters = [chr(ord("a") + a) for a in range(len(shape))]
    arrays, subscripts = [], []
    for n in terms:
        span, factor = form.axes[n], form.factors[n]
        arrays.append(factor.reshape(*(shape[a] for a in span), form.rank))
        subscripts.append("".join(letters[a] for a in span) + "Z")
    # An axis of one entry may be in a factor of another side: those count last.
    order = [letters[a] for a in axes] + letters
    order = [x for x in dict.fromkeys(order) if x in "".join(subscripts)]
    equation = ",".join(subscripts) + "->" + "".join(order) + "Z"
    # At full precision, as a merge computes it.
    product = jnp.einsum(equation, *arrays, precision="highest")
    return product.reshape(rows, form.rank)
