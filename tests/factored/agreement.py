"""What "the same numbers" means, and one program for the layers of a whole table."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftn_jax import make_delta
from ftn_jax.apply import from_linen
from ftn_jax.core import iter_nodes
from ftn_jax.factored import Factored
from ftn_jax.paths import path_name

KEY = jax.random.key(0)
CHAIN, BRANCH = Factored(choose="chain"), Factored(choose="branch")


class Zoo(nn.Module):
    """Runs each layer on an input of its own; sequential where a value is a list."""

    layers: Mapping[str, Any]

    @nn.compact
    def __call__(self, inputs):
        return {
            name: make(name=name)(inputs[name]) for name, make in self.layers.items()
        }


class Case:
    """A network with a delta in which every array is random."""

    def __init__(self, model, inputs, rules, *, seed=0, scale=0.3):
        self.batch = {"x": inputs}
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(model.init, jax.random.key(seed), inputs)["params"]
        delta = jax.eval_shape(partial(make_delta, rules=rules), KEY, shapes)
        self.shared = jax.tree.map(lambda s: draw(rng, s.shape), shapes)
        self.delta = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(0, scale, s.shape), s.dtype), delta
        )
        self.apply = from_linen(model, inputs="x", train_options={}, eval_options={})

    @property
    def paths(self):
        """The weights that have a node."""
        return [path for path, _ in iter_nodes(self.delta)]

    def plan(self, forward=CHAIN):
        """The plan of every weight, by path."""
        rows = forward.plan(self.apply, self.shared, self.delta, {}, self.batch)
        return {row.path: row for row in rows}

    def numbers(self, forward, **options):
        """Return the factors' gradients, and the outputs with and without them."""

        def objective(delta, shared, batch):
            outputs, _ = forward(
                self.apply, shared, delta, {}, batch, train=True, **options
            )
            return swing(outputs), outputs

        def run(delta, shared, batch):
            gradients, outputs = jax.grad(objective, has_aux=True)(delta, shared, batch)
            return gradients, outputs, self.apply(shared, {}, batch, train=True)[0]

        arguments = self.delta, self.shared, self.batch
        gradients, outputs, frozen = jax.jit(run)(*arguments)
        near = {p: d for p, d in distances(frozen, outputs).items() if d < 1e-2}
        assert not near, f"control: the delta does not matter in {near}"
        return gradients, outputs


def draw(rng, shape, dtype=jnp.float32):
    """Normal numbers, smaller where there are many of them to add up."""
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 1
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), dtype)


def swing(outputs):
    """A scalar whose gradient differs from entry to entry."""
    return sum(jnp.sin(y.astype(jnp.float32)).sum() for y in jax.tree.leaves(outputs))


def distances(found, expected):
    """By path, the largest difference relative to the largest entry."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree_util.tree_leaves_with_path(expected),
        strict=True,
    )
    return {
        path_name(path): float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-30))
        for (path, a), (_, b) in pairs
    }


def assert_same_numbers(found, expected, tolerance=1e-5):
    """Assert that every array agrees, to the tolerance, with an expected one."""
    wrong = {p: d for p, d in distances(found, expected).items() if not d <= tolerance}
    assert not wrong, f"{len(wrong)} differ: {sorted(wrong.items())[:8]}"
