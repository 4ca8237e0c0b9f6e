"""LoRA and DoRA: a product of two thin matrices added to the frozen weight."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static
from ftn_jax.nodes.matrix import add, check_matrix, check_rank, matrix_shape, product

Form = Literal["conv", "reshape"]
LoRAInit = Literal["kaiming", "normal"]


class LoRA(Node):
    """Add `scale * a b` to the weight; starts exactly at the pretrained weight.

    `form="conv"`: the weight is the matrix (inputs, outputs) of its flattened axes,
    `a` is (inputs, rank) and `b` is (rank, outputs). For a kernel (k, k, C_in, C_out)
    this is a k x k convolution to `rank` channels, with the kernel's own stride,
    dilation and padding, then a 1 x 1 convolution: `a` reshaped to (k, k, C_in, rank)
    is the first one's kernel. A grouped kernel (k, k, C_in / groups, C_out) is such a
    matrix too: its groups have `a` in common, so any rank does.

    `form="reshape"`: loralib's convolution. `b a`, with `a` of (rank k, C_in k) and
    `b` of (C_out k, rank k), is read as (C_out, C_in, k, k). It mixes taps and
    channels: another family of updates than `"conv"`. C_in is that of one group, where
    loralib divides C_out.

    Dropout on the branch's input, which the original has as an option, is no change
    of a weight and is left out.

    Source: LoRA (arXiv 2106.09685) eq. 3, `scale` its alpha / r; `loralib` for
    convolutions; rsLoRA (arXiv 2312.03732) for alpha / sqrt(r).

    Attributes:
        a: first factor, random at the start.
        b: second factor, zero at the start.
        form: how a convolution's kernel is laid out.
        scale: multiplies the update.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = LoRA.init(jax.random.key(0), w, rank=2, alpha=16)
        >>> node.a.shape, node.b.shape, node.scale
        ((144, 2), (2, 32), 8.0)
        >>> bool((node.merge(w) == w).all())
        True
    """

    a: Float[Array, "_ _"]
    b: Float[Array, "_ _"]
    form: Form = static(default="conv")
    scale: float = static(default=1.0)
    group: str = static(default="factors")

    def __post_init__(self) -> None:
        """Raise ValueError if the form is unknown or there is no common rank."""
        if self.form not in ("conv", "reshape"):
            raise ValueError(f"form must be conv or reshape, found {self.form!r}")
        left, right = (self.a, self.b) if self.form == "conv" else (self.b, self.a)
        _check_product(left, right)

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        rank: int,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        form: Form = "conv",
        init: LoRAInit = "kaiming",
        std: float = 0.02,
        inputs: int | None = None,
        group: str = "factors",
    ) -> "LoRA":
        """Make the factors for the weight `w`, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            rank: of the update (in the form `"reshape"`, of each tap's share).
            alpha: `scale` is alpha / rank. Default: rank, so that `scale` is 1.
            rank_stabilised: `scale` is alpha / sqrt(rank) instead.
            form: see the class.
            init: of `a`; `b` is zero. `"kaiming"`: uniform in +-1 / sqrt(fan in),
                loralib's. `"normal"`: N(0, std), with 0.02 PEViT's.
            std: standard deviation of the `"normal"` init.
            inputs: how many leading axes of w are inputs, for the form `"conv"`.
                Default: all but the last; a Flax query kernel (d_model, heads,
                head_dim) wants 1.
            group: optimizer group.

        Raises:
            ValueError: if the rank is not a positive integer, alpha is not finite, the
                weight has no inputs and outputs, or the form is `"reshape"` and the
                weight is no square 2-d kernel.
        """
        check_rank(rank)
        if form == "reshape":
            k, c_in, c_out = _square_kernel(w.shape)
            shapes = (rank * k, c_in * k), (c_out * k, rank * k)
            fan_in = c_in * k
        else:
            rows, columns = matrix_shape(w.shape, inputs)
            shapes = (rows, rank), (rank, columns)
            fan_in = rows
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        return cls(
            _start(key, shapes[0], dtype, init=init, fan_in=fan_in, std=std),
            jnp.zeros(shapes[1], dtype),
            form=form,
            scale=_scale(alpha, rank, rank_stabilised),
            group=group,
        )

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w` plus the update, in w's dtype.

        The sum is formed in the factors' precision and rounded once.

        Raises:
            ValueError: if the factors' product does not have w's shape.
        """
        dtype = jnp.promote_types(w.dtype, self.a.dtype)
        if self.form == "conv":
            check_matrix(w.shape, self.a.shape[0], self.b.shape[1], "LoRA")
            update = product(self.a, self.b, dtype).reshape(w.shape)
        else:
            k, c_in, c_out = _square_kernel(w.shape)
            found = self.b.shape[0], self.a.shape[1]
            if found != (c_out * k, c_in * k):
                raise ValueError(
                    f"LoRA's factors make a matrix {found}, the weight has shape "
                    f"{w.shape}, which needs {(c_out * k, c_in * k)}"
                )
            torch_view = product(self.b, self.a, dtype).reshape(c_out, c_in, k, k)
            update = torch_view.transpose(2, 3, 1, 0)
        return add(w, update, self.scale)


class DoRA(Node):
    """Train a weight's direction and magnitude apart; starts exactly at the weight.

    For each output column, with `v = W + scale * a b` (matrices as in `LoRA`):
    `W' = (|W| + magnitude) * v / |v|`, the norms over the inputs. The paper's magnitude
    vector m is `|W| + magnitude`: kept as a difference, the ratio of the norms is 1 at
    the start, to the last bit, whatever program computes them. A column of zeros has
    no direction; as long as `v` is zero there, the column is `v` itself.

    Source: DoRA (arXiv 2402.09353) eq. 5; `detach_norm` is its section 4.3.

    Attributes:
        a: first factor (inputs, rank), random at the start.
        b: second factor (rank, outputs), zero at the start.
        magnitude: what is added to each column's norm (outputs), zero at the start.
        scale: multiplies the update of the direction.
        detach_norm: treat `|v|` as a constant in the gradient, which spares memory
            where the update runs beside the layer (it does not here, where weights
            are merged), and is what other implementations do.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> node = DoRA.init(jax.random.key(0), w, rank=2)
        >>> node.a.shape, node.b.shape, node.magnitude.shape
        ((144, 2), (2, 32), (32,))
        >>> bool((node.merge(w) == w).all())
        True
    """

    a: Float[Array, "inputs rank"]
    b: Float[Array, "rank outputs"]
    magnitude: Float[Array, " outputs"]
    scale: float = static(default=1.0)
    detach_norm: bool = static(default=False)
    group: str = static(default="factors")

    def __post_init__(self) -> None:
        """Raise ValueError if there is no common rank or one magnitude a column."""
        _check_product(self.a, self.b)
        if self.magnitude.shape != self.b.shape[1:]:
            raise ValueError(
                f"magnitude needs one value for each column, {self.b.shape[1:]}, found "
                f"the shape {self.magnitude.shape}"
            )

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        rank: int,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        init: LoRAInit = "kaiming",
        std: float = 0.02,
        detach_norm: bool = False,
        inputs: int | None = None,
        group: str = "factors",
    ) -> "DoRA":
        """Make the arrays for the weight `w`, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            rank: of the update; for all others see `LoRA.init`.
            alpha: gives `scale`.
            rank_stabilised: gives `scale`.
            init: of `a`.
            std: of `a`.
            detach_norm: see the class.
            inputs: as there.
            group: optimizer group.

        Raises:
            ValueError: if the rank is not a positive integer, alpha is not finite, or
                the weight has no inputs and outputs.
        """
        check_rank(rank)
        rows, columns = matrix_shape(w.shape, inputs)
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        return cls(
            _start(key, (rows, rank), dtype, init=init, fan_in=rows, std=std),
            jnp.zeros((rank, columns), dtype),
            jnp.zeros(columns, dtype),
            scale=_scale(alpha, rank, rank_stabilised),
            detach_norm=detach_norm,
            group=group,
        )

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of the new directions and magnitudes, in w's dtype.

        Raises:
            ValueError: if the product does not have w's shape.
        """
        rows, columns = self.a.shape[0], self.b.shape[1]
        check_matrix(w.shape, rows, columns, "DoRA")
        dtype = jnp.promote_types(w.dtype, self.a.dtype)
        start = w.astype(dtype).reshape(rows, columns)
        v = add(start, product(self.a, self.b, dtype), self.scale)
        norm = _column_norms(v)
        if self.detach_norm:
            norm = jax.lax.stop_gradient(norm)
        wanted = _column_norms(start) + self.magnitude.astype(dtype)
        ratio = jnp.where(norm > 0, wanted / jnp.where(norm > 0, norm, 1), 1)
        return (v * ratio[None]).reshape(w.shape).astype(w.dtype)


def _column_norms(x: Float[Array, "inputs outputs"]) -> Float[Array, " outputs"]:
    """Take each column's length; a column of zeros has the gradient 0, not NaN."""
    squares = (x * x).sum(axis=0)
    root = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return jnp.where(squares > 0, root, 0)


def _start(
    key: Any, shape: tuple[int, int], dtype: Any, *, init: str, fan_in: int, std: float
) -> Float[Array, "_ _"]:
    if init == "kaiming":
        bound = 1 / math.sqrt(fan_in)  # kaiming-uniform of a = sqrt 5
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    if init == "normal":
        return std * jax.random.normal(key, shape, dtype)
    raise ValueError(f"init must be kaiming or normal, found {init!r}")


def _scale(alpha: float | None, rank: int, rank_stabilised: bool) -> float:
    alpha = float(rank if alpha is None else alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, found {alpha!r}")
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _square_kernel(shape: tuple[int, ...]) -> Sequence[int]:
    if len(shape) != 4 or shape[0] != shape[1]:
        raise ValueError(
            "the form 'reshape' is for square 2-d kernels (k, k, C_in, C_out), found "
            f"the shape {shape}; use form='conv'"
        )
    return shape[1:]


def _check_product(left: Any, right: Any) -> None:
    if left.ndim != 2 or right.ndim != 2 or not 1 <= left.shape[1] == right.shape[0]:
        raise ValueError(
            f"factors need one common rank >= 1, found shapes {left.shape} and "
            f"{right.shape}"
        )
