"""RCM: the kernel as a frozen filter bank, mixed anew for each task.

Source: Kanakis et al., "Reparameterizing convolutions for incremental multi-task
learning without task interference" (arXiv 2007.12540).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, beside, static
from ftn_jax.nodes.matrix import matrix_shape, product
from ftn_jax.nodes.pointwise import add_on_outputs
from ftn_jax.paths import at, path_name, some

PCA = "pca"
"""The kind, beside the backbone, of what `RCM` reads."""


class RCM(Node):
    """Mix a filter bank by a modulator: `W' = (W U) Wt^T`, in HWIO.

    The bank `W U` are the frozen filters in an orthogonal basis U (C_out, C_out) of
    the layer's responses, `U^T W` in the paper's layout; the task's 1x1 convolution
    Wt (C_out, C_out) comes after it. Its rows are normalized (the paper's normalized
    feature fusion): `Wt[o] = g[o] v[o] / ||v[o]||`, with g here in units of the row's
    norm in U, which is 1.

    With `Wt = U` (response initialization) the network is the pretrained one. So that
    it is, bit for bit, the merge is written `W + W U (Wt - U)^T`: the same function
    for every orthogonal U. The paper's offset of the mean response, `(I - U U^T) y`,
    is zero for a square U, and the node takes no other. A bias of the layer itself is
    not mixed: give it a node that trains it (`Replace`). Like `SeriesAdapter` it is
    not for grouped kernels.

    The paper trains the stem and the 3x3 convolutions this way, and full copies of
    the 1x1 shortcuts.

    Source: arXiv 2007.12540, response initialization and normalized feature fusion.

    Attributes:
        v: the modulator's rows.
        g: the rows' norms; None for rows as they are.
        u: the basis, one column for each filter of the bank; beside the backbone.
        inputs: how many leading axes of the weight are inputs; None for all but the
            last.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.ones((3, 3, 16, 32))
        >>> basis = weight_bases({"conv": {"kernel": w}}, ".*/kernel")
        >>> extra = {"pca": basis["conv/kernel"]}
        >>> node = RCM.init(jax.random.key(0), w, extra=extra)
        >>> node.v.shape, node.g.shape
        ((32, 32), (32,))
    """

    v: Float[Array, "c_out c_out"]
    g: Float[Array, " c_out"] | None
    u: Float[Array, "c_out c_out"] | None = beside(PCA)
    inputs: int | None = static(default=None)
    group: str = static(default="adapters")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        extra: Mapping[str, Mapping[str, Any]],
        normalize: bool = True,
        inputs: int | None = None,
        group: str = "adapters",
    ) -> "RCM":
        """Start at the pretrained weight: the modulator is U, in float32 or better.

        Args:
            key: not used.
            w: the weight; only its shape and dtype are used.
            extra: what lies beside the backbone at this path: `"pca"`.
            normalize: train the norms and directions of the modulator's rows apart;
                otherwise the rows as they are.
            inputs: how many leading axes of w are inputs, 1 for attention kernels
                (d_model, heads, head_dim); default all but the last.
            group: optimizer group.

        Raises:
            ValueError: if no axis of w is left for the inputs or for the outputs, or
                if there is no square basis of w's outputs.
        """
        _, n = matrix_shape(w.shape, inputs)
        if "u" not in extra.get(PCA, {}):
            raise ValueError(
                f"found no {PCA!r} beside the backbone for this weight; extend it by "
                "pca_bases of its responses, or by weight_bases"
            )
        u = extra[PCA]["u"]
        if u.shape != (n, n):
            raise ValueError(
                f"the basis has the shape {u.shape}, the weight of shape {w.shape} "
                f"with inputs={inputs} needs {(n, n)}"
            )
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        g = jnp.ones((n,), dtype) if normalize else None
        v = jnp.array(u, dtype, copy=True)
        return cls(v, g, u=None, inputs=inputs, group=group)

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the filters mixed by the modulator, in w's dtype.

        Raises:
            ValueError: if the node is not complete, or not of w's outputs.
        """
        if self.u is None:
            raise ValueError(
                f"u lies beside the backbone ({PCA!r}) and is not filled in; merge "
                "through ftn_jax.materialize"
            )
        _, n = matrix_shape(w.shape, self.inputs)
        if self.v.shape != (n, n):
            raise ValueError(
                f"the modulator has the shape {self.v.shape}, the weight's shape "
                f"{w.shape} with inputs={self.inputs} needs {(n, n)}"
            )
        dtype = jnp.promote_types(w.dtype, self.v.dtype)
        u, rows = self.u.astype(dtype), self.v.astype(dtype)
        if self.g is not None:
            # Both norms by one reduction, so that their ratio is exactly 1 at v = u.
            norms = jnp.linalg.norm(jnp.stack([u, rows]), axis=-1)
            rows = (self.g.astype(dtype) * norms[0] / norms[1])[:, None] * rows
        return add_on_outputs(w, product(u, (rows - u).T, dtype))


def weight_bases(
    shared: Any, pattern: str, *, inputs: int | None = None
) -> dict[str, dict[str, Array]]:
    """Return an orthogonal basis of each weight's outputs, from the weight alone.

    The left singular vectors of the (C_out, inputs) matrix, largest first. RCM's
    start is the pretrained network in any such basis; that of the responses
    (`pca_bases`) needs images.

    Args:
        shared: the backbone's tree.
        pattern: regular expression of whole paths.
        inputs: how many leading axes of these weights are inputs; default all but the
            last.

    Returns:
        `{path: {"u": (C_out, C_out)}}`, for `extend(shared, pca=...)`.

    Raises:
        ValueError: if no path matches, or a matching weight has no outputs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    weights = {path_name(path): w for path, w in leaves}
    found = [path for path in weights if re.fullmatch(pattern, path)]
    if not found:
        raise ValueError(
            f"pattern {pattern!r} matches no path (a pattern must match the whole "
            f"path); shared has the leaves {some([*weights])}"
        )
    bases = {}
    for path in found:
        w = weights[path]
        with at(path):
            _, n = matrix_shape(w.shape, inputs)
        matrix = np.asarray(w, np.float64).reshape(-1, n)
        u = _directions(matrix.T @ matrix)
        bases[path] = {"u": jnp.asarray(u, jnp.promote_types(w.dtype, jnp.float32))}
    return bases


def pca_bases(
    responses: Mapping[str, Any | Iterable[Any]],
) -> dict[str, dict[str, Array]]:
    """Return the principal directions of each layer's responses, largest first.

    Args:
        responses: for each kernel's path its outputs (n, C_out), before any norm, or
            an iterable of such arrays, which is read once; from
            `ftn_jax.responses.conv_responses`, for example.

    Returns:
        `{path: {"u": (C_out, C_out)}}` in float32, for `extend(shared, pca=...)`.

    Raises:
        ValueError: if a layer's responses are empty, are not of shape (n, C_out), or
            are not finite (names the path).
    """
    return {path: {"u": _principal(path, given)} for path, given in responses.items()}


def _principal(path: str, given: Any) -> Float[Array, "c_out c_out"]:
    count: int = 0
    total: Any = 0.0
    moment: Any = 0.0
    for chunk in [given] if hasattr(given, "shape") else given:
        y = np.asarray(chunk, np.float64)
        if y.ndim != 2 or (count and y.shape[1:] != total.shape):
            raise ValueError(
                f"{path}: responses need the shape (n, C_out), found {y.shape}"
                + (f" after C_out = {len(total)}" if count else "")
            )
        if not np.isfinite(y).all():
            raise ValueError(f"{path}: the responses have NaN or infinity")
        count, total, moment = count + len(y), total + y.sum(0), moment + y.T @ y
    if not count:
        raise ValueError(f"{path}: no responses, found 0 rows; give some images")
    mean = total / count
    return jnp.asarray(_directions(moment / count - np.outer(mean, mean)), jnp.float32)


def _directions(covariance: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Sort the eigenvectors, largest first; the largest entry of each is positive."""
    u = np.linalg.eigh(covariance)[1][:, ::-1]
    peaks = u[np.abs(u).argmax(axis=0), np.arange(len(u))]
    return u * np.sign(peaks)
