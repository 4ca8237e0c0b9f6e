"""SSF: scale and shift what a layer puts out, merged into its kernel and bias."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static, tied
from ftn_jax.paths import path_name, some

ScaleInit = Literal["identity", "normal"]


class Scale(Node):
    """Scale a layer's outputs: `w * gamma + beta`; starts exactly at the weight.

    `y = gamma * (x W + b) + beta` is `W' = W gamma` and `b' = b gamma + beta`, and the
    same for the scale and bias of a norm. So the kernel (or the norm's scale) has a
    node with `gamma` alone, of the weight's output axes, and the bias has one with
    `beta` too. The two have gamma in common by their `share` label, one label for each
    layer: `scale_rules` writes the rules. A layer without a bias has no place for beta;
    where a norm follows (a convolution's BatchNorm), scale the norm instead.

    Source: SSF (arXiv 2210.08823), method section and its re-parameterization.

    Attributes:
        gamma: on the last axes of the weight, tied.
        beta: of the weight's shape, for a bias; else None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ftn_jax import count, make_delta, materialize
        >>> shared = {"fc": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        >>> delta = make_delta(jax.random.key(0), shared, scale_rules(shared, "fc"))
        >>> count(delta).total  # gamma and beta of six outputs
        12
        >>> params = materialize(shared, delta)
        >>> bool((params["fc"]["kernel"] == shared["fc"]["kernel"]).all())
        True
    """

    gamma: Float[Array, "..."] = tied()
    beta: Float[Array, "..."] | None = None
    share: str | None = static(default=None)
    group: str = static(default="factors")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        shift: bool = False,
        share: str | None = None,
        init: ScaleInit = "identity",
        std: float = 0.02,
        inputs: int | None = None,
        group: str = "factors",
    ) -> "Scale":
        """Make gamma, and beta for a bias, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            shift: whether w is a bias: it gets beta, and all its axes are outputs.
            share: label of the kernel and the bias that have gamma in common.
            init: `"identity"`: gamma one, beta zero. `"normal"`: gamma N(1, std) and
                beta N(0, std), the paper's, which starts away from the weight.
            std: standard deviation of the `"normal"` init.
            inputs: how many leading axes of w are inputs, which gamma does not have.
                Default: all but the last of a kernel, none of a vector or a bias; a
                Flax query kernel (d_model, heads, head_dim) wants 1.
            group: optimizer group.

        Raises:
            ValueError: if inputs are not some of w's axes, or the init is unknown.
        """
        cut = inputs
        if cut is None:
            cut = 0 if shift or w.ndim < 2 else w.ndim - 1
        if not 0 <= cut <= max(w.ndim - 1, 0):
            raise ValueError(
                f"inputs must be 0 to {max(w.ndim - 1, 0)} leading axes of the shape "
                f"{w.shape}, found {inputs!r}"
            )
        if shift and cut:
            raise ValueError(
                f"a bias has no inputs, found inputs={inputs} with shift=True"
            )
        if init not in ("identity", "normal"):
            raise ValueError(f"init must be identity or normal, found {init!r}")
        noise = std if init == "normal" else 0.0
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        keys = jax.random.split(key)
        gamma, beta = (noise * jax.random.normal(k, w.shape[cut:], dtype) for k in keys)
        return cls(1 + gamma, beta if shift else None, share=share, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w * gamma + beta`, in w's dtype, rounded once.

        Raises:
            ValueError: if gamma is not of w's last axes, or beta not of w's shape.
        """
        outputs = self.gamma.shape
        if outputs != w.shape[w.ndim - len(outputs) :] or len(outputs) > w.ndim:
            raise ValueError(
                f"gamma has the shape {outputs}, the weight {w.shape} does not end so; "
                "give the nodes of one share label the same outputs (see inputs)"
            )
        dtype = jnp.promote_types(w.dtype, self.gamma.dtype)
        gamma = self.gamma.astype(dtype)
        gamma = gamma.reshape((1,) * (w.ndim - len(outputs)) + outputs)
        merged = w.astype(dtype) * gamma
        if self.beta is not None:
            if self.beta.shape != w.shape:
                raise ValueError(
                    f"beta has the shape {self.beta.shape}, the weight {w.shape}"
                )
            merged = merged + self.beta.astype(dtype)
        return merged.astype(w.dtype)


def scale_rules(
    shared: Any, pattern: str, *, inputs: int | None = None, **options: Any
) -> dict[str, Callable[..., Scale]]:
    """Write `make_delta`'s rules for layers to scale, each with a label of its own.

    Args:
        shared: the backbone's tree of arrays, or of shapes.
        pattern: regular expression that matches the whole path of a layer, the place
            of its kernel (or scale) and bias: `"blocks_0/mlp/fc1"`.
        inputs: how many leading axes of these layers' kernels are inputs. Default: all
            but the last; Flax query, key and value kernels want 1. Join the results of
            several calls with `|`.
        options: for `Scale.init`.

    Raises:
        ValueError: if the pattern matches no layer, or a layer holds other leaves
            than kernel, scale and bias.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    paths = [path_name(path) for path, _ in leaves]
    rules = {}
    for path in paths:
        layer, _, name = path.rpartition("/")
        if not re.fullmatch(pattern, layer):
            continue
        if name not in ("kernel", "scale", "bias"):
            raise ValueError(
                f"{path}: a layer to scale has kernel or scale, and bias, found "
                f"{name!r}; leave it out of the pattern {pattern!r}"
            )
        role = {"shift": True} if name == "bias" else {}
        if name == "kernel":
            role = {"inputs": inputs}
        rules[re.escape(path)] = partial(Scale.init, share=layer, **role, **options)
    if not rules:
        raise ValueError(
            f"the pattern {pattern!r} matches no layer (it must match the whole path "
            f"of one); shared has the leaves {some(paths)}"
        )
    return rules
