"""A backbone of every kind of leaf, and rules for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import Node
from ftn_jax.nodes import CP, Replace

random_cp = partial(CP.init, rank=2, init="normal")
RULES = {
    ".*/kernel": random_cp,
    ".*/bn/(scale|bias)": Replace.init,
    "head/.*": partial(Replace.init, group="head", shape=(..., 3)),
}


class Shift(Node):
    """Adds an array: the smallest node; counts how often it is traced."""

    value: jax.Array
    traces = []

    @classmethod
    def init(cls, key, w):
        return cls(jax.random.normal(key, w.shape))

    def merge(self, w):
        self.traces.append(w.shape)
        return w + self.value


def backbone():
    rng = np.random.default_rng(0)
    sizes = {
        "a": {"kernel": (3, 3, 2, 4), "bn": {"scale": (4,), "bias": (4,)}},
        "b": {"kernel": (4, 2, 3)},
        "head": {"bias": (5,), "w": (4, 5)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        sizes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def in_tuples(tree):
    return (tree["a"]["kernel"], [tree["b"]["kernel"], {"w": tree["head"]["w"]}])


def far(a, b, tolerance=1e-4):
    """True if some leaf moved by far more than a comparison would forgive."""
    return any(
        x.shape != y.shape or np.abs(x - y).max() > tolerance
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
