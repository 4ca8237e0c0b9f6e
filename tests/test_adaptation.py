"""One adaptation at several learning rates: one program, and nothing mixed up."""

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax.adapt import Adaptation, Recipe
from ftn_jax.data import ArraySource, Compose, Normalize, ToRGB
from ftn_jax.method import Backbone, Layers, Method
from ftn_jax.presets.patterns import head_rules

LAYERS = Layers(kernels="none", norms=None, head="head/kernel")


def apply(params, model_state, batch, *, train, key=None):
    x = batch["image"].reshape(len(batch["image"]), -1)
    return x @ params["head"]["kernel"], model_state


def adaptation(rate):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 4, 4, 1), np.uint8)
    backbone = Backbone(
        lambda classes: apply, {"head": {"kernel": jnp.zeros((48, 5))}}, {}, LAYERS
    )
    return Adaptation(
        backbone,
        Method(head_rules(LAYERS, 3), 3),
        Recipe(epochs=2, batch_size=8, rates={"head": rate}),
        ArraySource(images, np.arange(24) % 3),
        transform=Compose((ToRGB(), Normalize((0.5,) * 3, (0.5,) * 3))),
    )


def kernel(state):
    return np.asarray(state.task.delta["head"]["kernel"].value)


def test_another_rate_trains_as_its_own_adaptation_would_without_compiling():
    slow = adaptation(1e-3)
    first = kernel(slow.run(0))
    fast = slow.at({"head": 1e-1})
    found = kernel(fast.run(0))
    np.testing.assert_array_equal(found, kernel(adaptation(1e-1).run(0)))
    assert np.abs(found - first).max() > 1e-2
    (step,) = fast._steps
    assert step is slow._steps[0] and step._cache_size() == 1
    np.testing.assert_array_equal(kernel(slow.run(0)), first)
    assert jax.tree.map(float, fast.recipe.rates) == {"head": 1e-1}
