"""Steps by the factored path are the merged path's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.factored import Factored, factored
from ftn_jax.forward import merged
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP
from ftn_jax.presets import METHODS, RESNET

pytestmark = pytest.mark.long


@pytest.mark.parametrize("method", ["ftn", "lora"])
def test_three_steps_of_a_resnet_are_the_merged_ones(method):
    model = RESNETS["cifar_resnet8"](num_classes=3)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, 8)),
    }
    variables = model.init(jax.random.key(0), batch["image"])
    shared, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    rules = METHODS[method](RESNET, classes=3, rank=2).rules
    delta = make_delta(jax.random.key(1), shared, rules)
    rates = {"factors": 1e-2, "norm": 0.1, "head": 0.1}
    before = jax.tree.map(np.array, shared)
    ends = {}
    for forward in (merged, factored):
        tx = make_optimizer(rates, steps=10, adam=())  # Adam divides by tiny numbers
        step = jax.jit(make_train_step(from_linen(model), tx, forward=forward))
        state = TaskState.create(delta, stats, tx=tx, key=jax.random.key(2))
        for _ in range(3):
            state, sums = step(shared, state, batch)
        ends[forward] = (state.task, sums["loss"])
    start = (delta, stats)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(
            jax.tree.leaves(ends[merged][0]), jax.tree.leaves(start), strict=True
        )
    ]
    assert np.median(moved) > 1e-3
    for a, b in zip(*(jax.tree.leaves(ends[f]) for f in ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 0.1))
    jax.tree.map(np.testing.assert_array_equal, shared, before)


def test_a_batch_that_is_split_explicitly_is_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    image = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="'image' is split as .*AxisType.Auto"):
        factored(from_linen(nn.Dense(3)), {}, {}, {}, {"image": image}, train=True)


def test_vmapped_tasks_share_the_backbone():
    module, x = nn.Conv(4, (3, 3)), jax.random.normal(jax.random.key(3), (2, 5, 5, 3))
    shared = module.init(jax.random.key(0), x)["params"]
    apply = from_linen(module, train_options={}, eval_options={})
    rules = {"kernel": partial(CP.init, rank=2, init="normal", std=0.5)}
    deltas = [make_delta(jax.random.key(n), shared, rules) for n in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *deltas)

    def run(forward, delta):
        return forward(apply, shared, delta, {}, {"image": x}, train=True)[0]

    found = jax.jit(jax.vmap(partial(run, Factored(choose="branch"))))(stack)
    for y, delta in zip(found, deltas, strict=True):
        np.testing.assert_allclose(y, run(merged, delta), atol=1e-5)
