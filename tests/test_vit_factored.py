"""Every transformer preset gives the same numbers by the factored path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import make_delta
from ftn_jax.apply import from_linen
from ftn_jax.core import trainable, with_trained
from ftn_jax.factored import factored
from ftn_jax.forward import merged
from ftn_jax.method import Backbone
from ftn_jax.models import stack_layers, vit_tiny_cifar
from ftn_jax.presets.vit import VIT, VIT_METHODS

pytestmark = pytest.mark.long

MODEL = vit_tiny_cifar(3, width=12, depth=1, image_px=8, mlp_width=16)
OPTIONS = {"kadaptation_qv": {"n": 4, "scale": 1.0}}
LOW_RANK = ("ftn_o", "ftn_qv", "ftn_attention", "ftn_attention_mlp", "lora_qv")

QUICK = ("ftn_o", "ftn_qv", "lora_qv")


@pytest.fixture(scope="module")
def plain():
    image = jnp.zeros((1, *MODEL.image_shape))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / math.sqrt(12), x.dtype), shapes
    )


def loss_and_gradients(forward, apply, shared, delta, batch):
    def loss(trained):
        logits, _ = forward(
            apply, shared, with_trained(delta, trained), {}, batch, train=True
        )
        return (jax.nn.logsumexp(logits, -1) - logits[:, 0]).mean(), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(trainable(delta))
    return logits, gradients


@pytest.mark.parametrize("scan_layers", [False, True], ids=["blocks", "scanned"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in VIT_METHODS
    ],
)
def test_a_presets_gradients_are_the_merged_ones(name, scan_layers, plain):
    model = MODEL.clone(scan_layers=scan_layers)
    shared = stack_layers(plain) if scan_layers else plain
    method = VIT_METHODS[name](VIT, classes=3, **OPTIONS.get(name, {}))
    apply = from_linen(model)
    if method.prepare:
        backbone = Backbone(lambda classes: apply, shared, {}, VIT)
        shared = method.prepare(backbone).shared
    delta = make_delta(jax.random.key(1), shared, method.rules_for(shared))
    start = trainable(delta)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), start)
    delta = with_trained(delta, jax.tree.map(jnp.float32, moved))
    batch = {"image": jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)}

    @jax.jit
    def both(shared, delta):
        runs = [
            loss_and_gradients(forward, apply, shared, delta, batch)
            for forward in (merged, factored)
        ]
        frozen, _ = merged(
            apply, shared, with_trained(delta, start), {}, batch, train=True
        )
        return runs, frozen

    ((logits, expected), (found_logits, found)), frozen = both(shared, delta)
    size = np.abs(logits).max()
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-5 * size)
    assert np.abs(frozen - logits).max() > 1e-3 * size  # the delta does something
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A key's bias has no gradient but rounding: compare with the largest of all.
        scale = max(np.abs(b).max(), 1e-2 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
    plan = factored.plan(apply, shared, delta, {}, batch)
    ways = {row.choice for row in plan if row.path.endswith("kernel")}
    if name in LOW_RANK:
        low_rank = {row.node for row in plan} & {"CP", "LoRA", "Stacked"}
        assert low_rank and ways & {"chain", "branch"}
    else:
        assert ways <= {"kernel"}
