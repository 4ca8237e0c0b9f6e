"""One calling convention: Linen models of any signature, NNX models, functions."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy import RATES, batch

from ftn_jax import (
    TaskState,
    count,
    make_delta,
    make_eval_step,
    make_optimizer,
    make_train_step,
    restore_task,
    save_task,
)
from ftn_jax.apply import from_linen, from_nnx
from ftn_jax.nodes import CP, Replace


class Stranger(nn.Module):
    """A model with another way to say "training", another input, two streams."""

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        x = nn.Dense(4, name="body")(pixels.reshape(len(pixels), -1))
        noise = 0.0 if deterministic else jax.random.normal(self.make_rng("noise"))
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return nn.Dense(3, name="head")(x) + noise


def train(apply, shared, model_state, rules, *, steps=30, inputs="image"):
    tx = make_optimizer(RATES, steps=steps)
    delta = make_delta(jax.random.key(1), shared, rules)
    state = TaskState.create(delta, model_state, tx=tx, key=jax.random.key(2))
    step = jax.jit(make_train_step(apply, tx), donate_argnums=1)
    for n in range(steps):
        data = batch(32, seed=n)
        data[inputs] = data.pop("image")
        state, sums = step(shared, state, data)
    return state, sums


def test_linen_model_of_another_signature():
    model = Stranger()
    pixels = batch()["image"]
    shared = model.init(jax.random.key(0), pixels)["params"]
    apply = from_linen(
        model,
        inputs="pixels",
        train_options={"deterministic": False},
        eval_options={"deterministic": True},
        rngs=("dropout", "noise"),
    )
    rules = {"body/kernel": partial(CP.init, rank=2), "head/.*": Replace.init}
    state, sums = train(apply, shared, {}, rules, inputs="pixels")
    assert state.task.model_state == {}
    assert np.isfinite(sums["loss"])
    evaluate = make_eval_step(apply, metrics=None)
    logits = evaluate(shared, state.task, {"pixels": pixels})
    chex.assert_trees_all_equal(
        logits, evaluate(shared, state.task, {"pixels": pixels})
    )


class NNXNet(nnx.Module):
    """Conv, BatchNorm, dropout, attention, head."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        x = x.reshape(len(x), -1, 8)
        x = x + self.attention(x)
        return self.head(self.dropout(x.mean(axis=1)))


def test_nnx_model_trains_evaluates_and_comes_back_from_disk(tmp_path):
    model = NNXNet(nnx.Rngs(0))
    graphdef, shared, model_state = nnx.split(model, nnx.Param, ...)
    apply = from_nnx(graphdef)
    rules = {
        "conv/kernel": partial(CP.init, rank=2),
        "attention/(query|value)/kernel": partial(CP.init, rank=2),
        "bn/(scale|bias)": Replace.init,
        "head/(kernel|bias)": partial(Replace.init, group="head"),
    }
    state, sums = train(apply, shared, model_state, rules, steps=60)
    assert sums["correct"] / sums["count"] > 0.8
    assert count(state.task.delta).by_group["factors"] == 2 * (9 + 3 + 8 + 2 * 14)
    moved = jnp.abs(state.task.model_state["bn"]["mean"][...] - 0.0).max()
    assert moved > 1e-3  # the running statistics are the task's own
    assert jnp.abs(model_state["bn"]["mean"][...]).max() == 0
    data = batch(16, seed=99)
    evaluate = make_eval_step(apply, metrics=None)
    logits = evaluate(shared, state.task, data)
    untrained = NNXNet(nnx.Rngs(0))
    untrained.eval()
    assert jnp.abs(logits - untrained(data["image"])).max() > 0.1
    save_task(tmp_path, state.task, shared=shared, name="nnx")
    saved = restore_task(tmp_path, shared, model_state=model_state)
    chex.assert_trees_all_equal(evaluate(shared, saved.task, data), logits)


def test_nnx_dropout_follows_the_key_and_runs_under_shard_map():
    graphdef, shared, model_state = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param, ...)
    apply, data = from_nnx(graphdef), batch(16)
    calls = [
        apply(shared, model_state, data, train=True, key=jax.random.key(n))
        for n in (1, 1, 2)
    ]
    chex.assert_trees_all_equal(calls[0], calls[1])
    assert jnp.abs(calls[0][0] - calls[2][0]).max() > 1e-3
    tx = optax.sgd(0.1)
    delta = make_delta(jax.random.key(1), shared, {"head/kernel": Replace.init})
    state = TaskState.create(delta, model_state, tx=tx, key=jax.random.key(2))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    step = jax.shard_map(
        make_train_step(apply, tx, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
    )
    data = jax.device_put(data, NamedSharding(mesh, P("data")))
    new, sums = jax.jit(step)(shared, state, data)
    assert sums["count"] == 16 and new.finite


def test_linen_streams_do_not_share_their_numbers():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            a, b = self.make_rng("dropout"), self.make_rng("drop_path")
            return jnp.stack([jax.random.normal(a), jax.random.normal(b)])

    apply = from_linen(Two(), rngs=("dropout", "drop_path"))
    (a, b), _ = apply({}, {}, batch(), train=True, key=jax.random.key(0))
    assert a != b


def test_a_plain_function_will_do():
    def apply(params, model_state, batch, *, train, key=None):
        logits = batch["image"].mean(axis=(1, 2)) @ params["w"]
        return logits + params["b"][None], model_state

    shared = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(3)}
    state, sums = train(apply, shared, {}, {".": Replace.init}, steps=150)
    assert sums["correct"] / sums["count"] > 0.8


@pytest.mark.parametrize("train_mode", [True, False])
def test_linen_apply_is_the_models_own(train_mode):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train, name="bn")(x)

    model, x = Plain(), batch()["image"]
    variables = model.init(jax.random.key(0), x)
    state = {"batch_stats": variables["batch_stats"]}
    y, new = from_linen(model)(
        variables["params"], state, {"image": x}, train=train_mode
    )
    expected, mutated = model.apply(variables, x, train=train_mode, mutable=True)
    chex.assert_trees_all_equal(y, expected)
    chex.assert_trees_all_equal(new["batch_stats"], mutated["batch_stats"])
