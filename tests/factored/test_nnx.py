"""NNX networks: the same numbers, through NNX's own transforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import (
    BRANCH,
    CHAIN,
    KEY,
    assert_same_numbers,
    draw,
    swing,
)
from flax import nnx
from jax import lax

from ftn_jax import make_delta
from ftn_jax.apply import from_nnx
from ftn_jax.forward import merged
from ftn_jax.nodes import CP, LoRA, Replace
from ftn_jax.nodes.stacked import Stacked

cp = partial(CP.init, rank=2)


def doubled(x, w, *args, **options):
    return lax.dot_general(x, 2 * w, *args, **options)


class Standardized(nnx.Linear):
    """A layer of the user's own that changes its kernel first."""

    def __call__(self, x):
        kernel = self.kernel[...]
        return self.dot_general(x, kernel / 2, (((x.ndim - 1,), (0,)), ((), ())))


class Net(nnx.Module):
    """Every kind of layer, and layers inside NNX's scan, remat and jit."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, padding="REFLECT", rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.own = nnx.Linear(8, 8, dot_general=doubled, rngs=rngs)
        self.standard = Standardized(8, 8, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        x = nnx.remat(lambda layer, x: layer(x))(self.grouped, x)
        x = x.reshape(len(x), -1, 8)
        x = x + self.attention(x)
        for layer in self.layers:  # one shape, each its own factors
            x = nnx.jit(lambda layer, x: layer(x))(layer, x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def scan(x, block):
            return jnp.tanh(block(x))

        x = self.standard(self.own(scan(x, self.blocks)))
        return self.head(self.layers[0](x).mean(axis=1))


def stack(key, w):
    nodes = [cp(k, w[i]) for i, k in enumerate(jax.random.split(key, len(w)))]
    return Stacked.of(nodes, place="blocks_{}/kernel")


RULES = {
    "head/kernel": partial(LoRA.init, rank=2),
    "blocks/kernel": stack,
    ".*/kernel": cp,
    "bn/.*": Replace.init,
}


@pytest.fixture(scope="module")
def case():
    graphdef, shared, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(make_delta, rules=RULES), KEY, shared)
    delta = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(scale=0.5, size=s.shape), s.dtype), shapes
    )
    batch = {"image": draw(rng, (2, 6, 8, 3))}
    return from_nnx(graphdef), shared, delta, state, batch


def numbers(forward, case):
    apply, shared, delta, state, batch = case

    def objective(delta, shared, state, batch):
        outputs = forward(apply, shared, delta, state, batch, train=True, key=KEY)
        return swing(outputs[0]), outputs

    gradient = jax.grad(objective, has_aux=True)
    return jax.jit(gradient)(delta, shared, state, batch)


@pytest.mark.slow
def test_nnx_networks_get_the_same_numbers(case):
    expected = numbers(merged, case)
    for forward in (CHAIN, BRANCH):
        assert_same_numbers(numbers(forward, case), expected, tolerance=1e-4)
    plain = (*case[:2], jax.tree.map(jnp.zeros_like, case[2]), *case[3:])
    with pytest.raises(AssertionError, match="differ"):  # control
        assert_same_numbers(numbers(merged, plain), expected, tolerance=1e-2)


def test_the_plan_names_what_is_not_reached(case):
    apply, shared, delta, state, batch = case
    plan = {r.path: r for r in CHAIN.plan(apply, shared, delta, state, batch, key=KEY)}
    chained = {path for path, row in plan.items() if row.choice == "chain"}
    kernels = {path for path in plan if path.endswith("kernel")}
    assert kernels - chained == {"own/kernel", "standard/kernel"}
    assert "no hook" in plan["own/kernel"].why
    assert "changed" in plan["standard/kernel"].why
    twice, once = (plan[f"layers/{i}/kernel"].work.chain for i in (0, 1))
    assert twice.flops > 1.5 * once.flops
