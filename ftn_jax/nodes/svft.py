"""SVFT: new weights between the frozen singular vectors of the weight."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ftn_jax.node import Node, beside, frozen, static
from ftn_jax.nodes.matrix import add, check_matrix, is_whole, matrix_shape
from ftn_jax.paths import at, path_name, some

SVFTInit = Literal["zeros", "kaiming"]


class SVFT(Node):
    """Add `u M vt` to the weight `u diag(s) vt`; starts exactly at the weight.

    The weight is a matrix (inputs, outputs) and k = min(inputs, outputs). M of (k, k)
    has trained entries m on its diagonal (plain), on the diagonals from
    -off_diagonals to +off_diagonals (banded), or in places drawn once (random); entry
    (i, j) leads from singular direction i of the inputs to direction j of the outputs.
    With a gate it is `sigmoid(gate) u M vt`.

    The released code builds the weight again from its decomposition, which changes it
    by rounding, has the gate always, starts m away from zero, and draws random places
    with repetition; here the update is added to the weight itself, the gate is an
    option (the papers' count for ViT-B/32, 55,296, is without), m starts at zero, and
    places differ.

    The bases lie beside the backbone, see `svd_bases`.

    Source: SVFT (arXiv 2405.19597), method section; the gate is the code's.

    Attributes:
        m: trained entries of M (coefficients,): for the banded form, diagonal after
            diagonal, 0, 1, -1, 2, -2, ...
        k: number of singular directions.
        u: left singular vectors (inputs, k), beside the backbone.
        vt: right singular vectors (k, outputs), beside the backbone.
        gate: trained scalar, or None.
        places: rows and columns of the random form's entries (2, coefficients), or
            None.
        off_diagonals: on each side of the diagonal.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ftn_jax import extend, make_delta, materialize
        >>> shared = {"fc": {"kernel": jnp.arange(12.0).reshape(3, 4)}}
        >>> extended = extend(shared, svd=svd_bases(shared, "fc/kernel"))
        >>> delta = make_delta(jax.random.key(0), extended, {"fc/kernel": SVFT.init})
        >>> delta["fc"]["kernel"].m.shape
        (3,)
        >>> params = materialize(extended, delta)
        >>> bool((params["fc"]["kernel"] == shared["fc"]["kernel"]).all())
        True
    """

    m: Float[Array, " coefficients"]
    k: int = static()
    u: Float[Array, "inputs k"] | None = beside("svd")
    vt: Float[Array, "k outputs"] | None = beside("svd")
    gate: Float[Array, ""] | None = None
    places: Int[Array, "2 coefficients"] | None = frozen(default=None)
    off_diagonals: int = static(default=0)
    group: str = static(default="factors")

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "..."],
        *,
        off_diagonals: int = 0,
        random: int | None = None,
        gate: bool = False,
        init: SVFTInit = "zeros",
        inputs: int | None = None,
        group: str = "factors",
    ) -> "SVFT":
        """Make the coefficients for the weight `w`, in float32 or better.

        Args:
            key: PRNG key.
            w: the weight; only its shape and dtype are used.
            off_diagonals: 0 for the plain form, else the banded one.
            random: number of coefficients, for the random form.
            gate: whether to train a gate; it starts at 0, a factor of one half.
            init: of m. `"zeros"`, or `"kaiming"`: N(0, sqrt(2 / coefficients)), the
                released code's, which starts away from the pretrained weight.
            inputs: how many leading axes of w are inputs, as for `svd_bases`.
            group: optimizer group.

        Raises:
            ValueError: if the weight has no inputs and outputs, the numbers of
                diagonals or coefficients do not fit k, both are asked for, or the init
                is unknown.
        """
        k = min(matrix_shape(w.shape, inputs))
        if not is_whole(off_diagonals) or not 0 <= off_diagonals < k:
            raise ValueError(
                f"off_diagonals must be 0 to {k - 1} for {k} singular values, found "
                f"{off_diagonals!r}"
            )
        if random is not None and off_diagonals:
            raise ValueError(
                f"choose off_diagonals or random, found off_diagonals={off_diagonals} "
                f"and random={random}"
            )
        if random is not None and not (is_whole(random) and 1 <= random <= k * k):
            raise ValueError(
                f"random must be 1 to {k * k} coefficients for {k} singular values, "
                f"found {random!r}"
            )
        b, places = off_diagonals, None
        size = k * (2 * b + 1) - b * (b + 1)
        where, draw = jax.random.split(key)
        if random is not None:
            flat = jax.random.choice(where, k * k, (random,), replace=False)
            places, size = jnp.stack(jnp.divmod(flat, k)), random
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        if init == "zeros":
            m = jnp.zeros(size, dtype)
        elif init == "kaiming":
            m = (2 / size) ** 0.5 * jax.random.normal(draw, (size,), dtype)
        else:
            raise ValueError(f"init must be zeros or kaiming, found {init!r}")
        return cls(
            m,
            k=k,
            u=None,
            vt=None,
            gate=jnp.zeros((), dtype) if gate else None,
            places=places,
            off_diagonals=off_diagonals,
            group=group,
        )

    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return `w` plus the update, in w's dtype.

        The sum is formed in the coefficients' precision and rounded once.

        Raises:
            ValueError: if the bases are not those of a weight of w's shape, or have
                another number of directions than the coefficients are for.
        """
        if self.u is None or self.vt is None:
            raise ValueError(
                "SVFT has no bases: lay svd_bases beside the backbone (extend) and let "
                "materialize merge, which completes the node"
            )
        check_matrix(w.shape, self.u.shape[0], self.vt.shape[1], "SVFT")
        if not self.u.shape[1] == self.vt.shape[0] == self.k:
            raise ValueError(
                f"SVFT was made for {self.k} singular directions, found bases of "
                f"{self.u.shape[1]}; give svd_bases and SVFT.init the same inputs"
            )
        dtype = jnp.promote_types(w.dtype, self.m.dtype)
        u, m, vt = (x.astype(dtype) for x in (self.u, self.m, self.vt))
        if self.gate is not None:
            m = m * jax.nn.sigmoid(self.gate.astype(dtype))
        # At full precision: accelerators would round the bases to TF32 or bf16.
        if self.places is None and self.off_diagonals == 0:
            right = m[:, None] * vt
        else:
            places = self.places
            if places is None:
                places = banded_places(self.k, self.off_diagonals)
            middle = jnp.zeros((self.k, self.k), dtype)
            middle = middle.at[places[0], places[1]].set(m)
            right = jnp.matmul(middle, vt, precision="highest")
        update = jnp.matmul(u, right, precision="highest")
        return add(w, update.reshape(w.shape), 1.0)


def svd_bases(
    shared: Any, pattern: str, *, inputs: int | None = None
) -> dict[str, dict[str, Array]]:
    """Decompose weights, for `extend(shared, svd=...)`.

    Singular vectors are not reproducible from one linear-algebra library to another
    (signs, and whole subspaces where values are close): save them beside the checkpoint
    with `ftn_jax.save_extras`, a task is of no use without those it was trained with.
    They take up to twice the memory of the weights.

    Args:
        shared: the backbone's tree of arrays.
        pattern: regular expression that matches whole paths, as in rules. For weights
            that differ in `inputs`, join the results of several calls with `|`.
        inputs: how many leading axes of these weights are inputs. Default: all but the
            last; Flax query, key and value kernels want 1.

    Returns:
        For each path `{"u": (inputs, k), "s": (k,), "vt": (k, outputs)}`, computed in
        float64 on the host and kept in float32 or better.

    Raises:
        ValueError: if the pattern matches no path, or a weight that has no inputs and
            outputs (names the path).
    """
    leaves = {
        path_name(path): w for path, w in jax.tree_util.tree_leaves_with_path(shared)
    }
    found = {p: w for p, w in leaves.items() if re.fullmatch(pattern, p)}
    if not found:
        raise ValueError(
            f"the pattern {pattern!r} matches no leaf (it must match the whole path); "
            f"shared has the leaves {some([*leaves])}"
        )
    bases = {}
    for path, w in found.items():
        with at(path):
            matrix = np.asarray(w, np.float64).reshape(matrix_shape(w.shape, inputs))
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        arrays = np.linalg.svd(matrix, full_matrices=False)
        bases[path] = {
            name: jnp.asarray(x, dtype)
            for name, x in zip(("u", "s", "vt"), arrays, strict=True)
        }
    return bases


def banded_places(k: int, off_diagonals: int) -> Int[np.ndarray, "2 coefficients"]:
    """List rows and columns of a k x k matrix's diagonals 0, 1, -1, 2, -2, ..."""
    n = np.arange(k)
    diagonals = [np.stack([n, n])]
    for offset in range(1, off_diagonals + 1):
        above = np.stack([n[:-offset], n[offset:]])
        diagonals += [above, above[::-1]]
    return np.concatenate(diagonals, axis=1)
