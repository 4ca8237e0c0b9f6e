"""Weights of every kind of layer, and CP written out entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = {
    "bias": (5,),
    "dense": (4, 6),
    "conv1d": (3, 4, 5),
    "attention": (6, 2, 4),
    "conv2d": (3, 3, 4, 5),
    "depthwise": (3, 3, 1, 6),
    "conv3d": (2, 3, 2, 3, 4),
}


def cp_formula(w, node):
    """w[i, j, ..] + scale * sum_r f1[row1, r] f2[row2, r] .., entry by entry."""
    merged = np.array(w, np.float64)
    for index in np.ndindex(*w.shape):
        product = np.ones(node.rank)
        for factor, span in zip(node.factors, node.axes, strict=True):
            row = 0
            for axis in span:
                row = row * w.shape[axis] + index[axis]
            product *= np.asarray(factor[row], np.float64)
        merged[index] += node.scale * product.sum()
    return merged


def weight(name, dtype=jnp.float32):
    rng = np.random.default_rng(sum(map(ord, name)))
    return jnp.asarray(rng.normal(size=WEIGHTS[name]), dtype)


def randomized(node, seed=0):
    """Every array drawn anew: a zero factor would hide what the others do."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), node)
