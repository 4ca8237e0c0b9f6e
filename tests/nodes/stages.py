"""A network of two stages of equal blocks, for groups of kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .convolution import draw

PATTERN = r"(?P<label>layer\d+)_(?P<block>\d+)/conv(?P<conv>\d)/kernel"
SHAPES = {f"layer1_{b}": (3, 3, 4, 4) for b in range(3)} | {
    f"layer2_{b}": (3, 3, 8, 8) for b in range(2)
}


def network(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """Two kernels and a norm in each block."""
    return {
        name: {
            "bn1": {"scale": jnp.ones(s[-1])},
            "conv1": {"kernel": jnp.asarray(draw(*s, seed=2 * n))},
            "conv2": {"kernel": jnp.asarray(draw(*s, seed=2 * n + 1))},
        }
        for n, (name, s) in enumerate(shapes.items())
    }


def perturbed(delta: Any, seed: int = 0) -> Any:
    """Factors a little off identity, in the nodes that hold them."""
    rng = np.random.default_rng(seed)
    move = lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(move, delta)
