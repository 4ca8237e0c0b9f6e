"""Weights of every kind of layer, and nodes with random arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from formulas import RANDOM

WEIGHTS = {
    "bias": (5,),
    "dense": (4, 6),
    "conv1d": (3, 4, 5),
    "attention": (6, 2, 4),
    "conv2d": (3, 3, 4, 5),
    "depthwise": (3, 3, 1, 6),
    "conv3d": (2, 3, 2, 3, 4),
}


def weight(name, dtype=jnp.float32):
    rng = np.random.default_rng(sum(map(ord, name)))
    return jnp.asarray(rng.normal(size=WEIGHTS[name]), dtype)


def randomized(node, seed=0):
    """Every trained array drawn anew: a zero factor would hide what the others do."""
    rng = np.random.default_rng(seed)
    if type(node).__name__ in RANDOM:
        return RANDOM[type(node).__name__](node, rng)

    def draw(x):
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    own = [n for n in node.data_fields if n not in node.frozen_fields]
    return node.replace(**{n: jax.tree.map(draw, getattr(node, n)) for n in own})
