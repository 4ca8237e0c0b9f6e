"""The factored path gives the merged path's numbers: outputs, gradients, steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.core import trainable, with_trained
from ftn_jax.factored import Factored, factored
from ftn_jax.forward import merged
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP, LoRA, Piggyback, Replace
from ftn_jax.presets import METHODS, RESNET

conv = partial(nn.Conv, 6, (3, 3))
LAYERS = {
    "same": (conv(), (7, 6, 4)),
    "stride 2": (conv(strides=2, padding=((1, 1), (1, 1))), (8, 7, 4)),
    "valid, stride (2, 1)": (conv(strides=(2, 1), padding="VALID"), (8, 7, 4)),
    "dilated": (conv(kernel_dilation=(2, 1)), (9, 8, 4)),
    "lopsided": (conv(padding=((1, 2), (0, 1)), use_bias=False), (6, 6, 4)),
    "circular": (conv(padding="CIRCULAR"), (7, 6, 4)),
    "reflect": (conv(padding="REFLECT"), (7, 6, 4)),
    "groups": (conv(feature_group_count=2), (7, 6, 4)),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), (7, 6, 4)),
    "1x1": (nn.Conv(5, (1, 1), strides=2), (5, 4, 4)),
    "causal": (nn.Conv(5, (3,), padding="CAUSAL", kernel_dilation=2), (9, 4)),
    "3d": (nn.Conv(3, (2, 3, 2), strides=(1, 2, 1)), (4, 5, 4, 2)),
    "dense": (nn.Dense(6), (5, 4)),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 3)),
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=8), (5, 6)),
}
NODES = {
    "cp": partial(CP.init, rank=2, init="normal", std=0.5),
    "lora": partial(LoRA.init, rank=3),
}


def outputs_and_gradients(forward, apply, shared, delta, x):
    def loss(trained):
        y, _ = forward(
            apply, shared, with_trained(delta, trained), {}, {"image": x}, train=True
        )
        weights = jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) / y.size
        return (y * weights).sum(), y

    return jax.jit(jax.grad(loss, has_aux=True))(trainable(delta))


def assert_close(found, expected, tolerance=1e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    # A key's bias has no gradient but rounding: compare with the largest of all.
    size = max(np.abs(b).max() for b in expected)
    for a, b in zip(found, expected, strict=True):
        scale = max(np.abs(b).max(), 1e-2 * size)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("choose", ["chain", "branch"])
@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_outputs_and_gradients_are_the_merged_ones(name, kind, choose, key):
    module, shape = LAYERS[name]
    x = jax.random.normal(key, (2, *shape))
    shared = module.init(key, x)["params"]
    rules = {"(.*/)?kernel": NODES[kind], "(.*/)?bias": Replace.init}
    if not any("bias" in str(p) for p, _ in jax.tree.leaves_with_path(shared)):
        del rules["(.*/)?bias"]
    delta = make_delta(key, shared, rules)
    delta = jax.tree.map(lambda x: x + 0.3, delta)  # LoRA starts at zero
    apply = from_linen(module, train_options={}, eval_options={})
    run = partial(outputs_and_gradients, apply=apply, shared=shared, delta=delta, x=x)
    forward = Factored(choose=choose)
    expected = run(merged)
    assert_close(run(forward), expected)
    plan = forward.plan(apply, shared, delta, {}, {"image": x})
    chosen = {row.choice for row in plan if row.path.endswith("kernel")}
    assert chosen <= {choose, "kernel"}
    # Where LoRA takes an output axis for an input there is no chain.
    split = kind == "lora" and name in ("general", "attention")
    if name not in ("groups", "depthwise") and not split:
        assert chosen == {choose}
    frozen, _ = apply(shared, {}, {"image": x}, train=True)
    size = np.abs(expected[1]).max()
    assert np.abs(frozen - expected[1]).max() > 1e-3 * size  # negative control


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


def test_what_no_hook_reaches_is_materialized_and_named():
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("kernel", nn.initializers.normal(), (16, 16))
            return nn.Dense(3, name="out")(x @ w)

    module, x = Raw(), jnp.ones((2, 16))
    shared = module.init(jax.random.key(0), x)["params"]
    rules = {"kernel": NODES["cp"], "out/kernel": Piggyback.init}
    delta = make_delta(jax.random.key(1), shared, rules)
    apply = from_linen(module, train_options={}, eval_options={})
    run = partial(outputs_and_gradients, apply=apply, shared=shared, delta=delta, x=x)
    assert_close(run(factored)[1], run(merged)[1])
    plan = {
        row.path: row for row in factored.plan(apply, shared, delta, {}, {"image": x})
    }
    assert plan["kernel"].choice == "kernel" and plan["kernel"].why
    with pytest.raises(ValueError, match="strict: .*kernel"):
        run(Factored(strict=True))


def test_siblings_of_one_trace_keep_their_own_factors():
    """Under nn.jit layers of one shape share a trace; closed-over factors are wrong."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for n in range(3):
                x = nn.jit(nn.Dense)(4, name=f"layer{n}")(x)
            return x

    module, x = Net(), jax.random.normal(jax.random.key(3), (2, 4))
    shared = module.init(jax.random.key(0), x)["params"]
    for only in range(3):
        rules = {f"layer{only}/kernel": NODES["cp"]}
        delta = make_delta(jax.random.key(1), shared, rules)
        apply = from_linen(module, train_options={}, eval_options={})
        run = partial(
            outputs_and_gradients, apply=apply, shared=shared, delta=delta, x=x
        )
        assert_close(run(factored), run(merged))


def test_vmapped_tasks_share_the_backbone():
    module, x = nn.Conv(4, (3, 3)), jax.random.normal(jax.random.key(3), (2, 5, 5, 3))
    shared = module.init(jax.random.key(0), x)["params"]
    apply = from_linen(module, train_options={}, eval_options={})
    rules = {"kernel": NODES["cp"]}
    deltas = [make_delta(jax.random.key(n), shared, rules) for n in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *deltas)

    def run(forward, delta):
        return forward(apply, shared, delta, {}, {"image": x}, train=True)[0]

    found = jax.jit(jax.vmap(partial(run, Factored(choose="branch"))))(stack)
    for y, delta in zip(found, deltas, strict=True):
        np.testing.assert_allclose(y, run(merged, delta), atol=1e-5)
