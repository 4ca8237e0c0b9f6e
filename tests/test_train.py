"""The training step: what it trains, what it leaves alone, where it runs."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import RATES, Net, batch, setup

from ftn_jax import (
    TaskState,
    make_eval_step,
    make_optimizer,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.apply import from_linen
from ftn_jax.metrics import classification, no_logit
from ftn_jax.nodes import Replace


def snapshot(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


def distance(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_shared_and_other_tasks_survive_donated_steps_bit_for_bit(tmp_path):
    shared, state, step = setup()
    _, other, _ = setup()
    save_task(tmp_path, other.task, shared=shared, name="other")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    before = snapshot(shared), snapshot((other.task, other.opt_state))
    start = snapshot(state.task.delta)
    jitted = jax.jit(step, donate_argnums=1)
    for n in range(100):
        state, _ = jitted(shared, state, batch(seed=n))
    assert not any(x.is_deleted() for x in jax.tree.leaves((shared, other.task)))
    after = snapshot(shared), snapshot((other.task, other.opt_state))
    for a, b in zip(before, after, strict=True):
        chex.assert_trees_all_equal(a, b)
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
    saved = restore_task(tmp_path, shared)  # which checks every byte of shared
    chex.assert_trees_all_equal(saved.task, other.task)
    end = snapshot(state.task.delta)
    moved = [np.abs(a - b).max() for a, b in zip(start, end, strict=True)]
    assert min(moved) > 1e-3


def test_pretrained_statistics_survive_donation():
    shared, state, step = setup()
    stats = {"batch_stats": jax.tree.map(jnp.ones_like, state.task.model_state)}
    tx = make_optimizer(RATES, steps=10)
    state = TaskState.create(
        state.task.delta, stats["batch_stats"], tx=tx, key=jax.random.key(0)
    )
    jax.jit(step, donate_argnums=1)(shared, state, batch())
    assert not any(x.is_deleted() for x in jax.tree.leaves(stats))


def test_it_learns_and_compiles_once():
    shared, state, step = setup()
    jitted = jax.jit(chex.assert_max_traces(step, 1), donate_argnums=1)
    data = batch(32)
    for _ in range(60):
        with jax.transfer_guard("disallow"):
            state, sums = jitted(shared, state, data)
    assert sums["correct"] / sums["count"] > 0.95
    assert int(state.step) == 60


def test_gradient_is_of_the_mean_over_real_examples():
    shared, state, step = setup()
    data = batch(8)
    padded = {
        **jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), data),
        "mask": jnp.array([1.0] * 8 + [0.0] * 2),
    }
    tx = optax.sgd(1.0)
    shared, state, step = setup(tx=tx, frozen_stats=True)
    plain, sums = step(shared, state, data)
    masked, masked_sums = step(shared, state, padded)
    assert masked_sums["count"] == sums["count"] == 8
    chex.assert_trees_all_close(plain.task.delta, masked.task.delta, atol=1e-6)
    mean_loss = lambda delta: optax.softmax_cross_entropy_with_integer_labels(  # noqa: E731
        Net().apply(
            {"params": materialize(shared, delta), **state.task.model_state},
            data["image"],
        ),
        data["label"],
    ).mean()
    by_hand = jax.tree.map(
        lambda d, g: d - g, state.task.delta, jax.grad(mean_loss)(state.task.delta)
    )
    chex.assert_trees_all_close(plain.task.delta, by_hand, atol=1e-6)
    assert distance(plain.task.delta, state.task.delta) > 1e-2


def test_frozen_stats_keeps_the_running_statistics():
    shared, state, step = setup(frozen_stats=True)
    new, _ = step(shared, state, batch())
    chex.assert_trees_all_equal(new.task.model_state, state.task.model_state)
    _, _, step = setup()
    moving, _ = step(shared, state, batch())
    assert distance(moving.task.model_state, state.task.model_state) > 1e-3


def test_eval_uses_the_tasks_own_statistics_and_head():
    shared, state, step = setup()
    for n in range(5):
        state, _ = step(shared, state, batch(seed=n))
    data = batch(16, seed=9)
    logits = make_eval_step(from_linen(Net()), metrics=None)(shared, state.task, data)
    expected = Net().apply(
        {"params": materialize(shared, state.task.delta), **state.task.model_state},
        data["image"],
    )
    chex.assert_trees_all_equal(logits, expected)
    sums = make_eval_step(from_linen(Net()))(shared, state.task, data)
    assert sums["correct"] == (logits.argmax(-1) == data["label"]).sum()


def test_accumulation_equals_the_whole_batch():
    tx = optax.sgd(1.0)
    shared, state, whole = setup(tx=tx, frozen_stats=True)
    _, _, parts = setup(tx=tx, frozen_stats=True, accumulate=4)
    a, a_sums = whole(shared, state, batch(16))
    b, b_sums = jax.jit(parts)(shared, state, batch(16))
    chex.assert_trees_all_close(a.task, b.task, atol=1e-6)
    chex.assert_trees_all_close(a_sums, b_sums, rtol=1e-5)
    with pytest.raises(ValueError, match="no 4 equal parts"):
        parts(shared, state, batch(6))


def test_remat_gives_the_same_numbers():
    shared, state, plain = setup()
    _, _, remat = setup(remat=True)
    policy = jax.checkpoint_policies.dots_saveable
    _, _, policed = setup(remat=policy)
    expected, _ = plain(shared, state, batch())
    for step in (remat, policed):
        found, _ = step(shared, state, batch())
        chex.assert_trees_all_close(found.task, expected.task, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(remat)(shared, state, batch()))
    assert "remat" in jaxpr or "checkpoint" in jaxpr


def test_bf16_compute_keeps_fp32_factors_and_statistics():
    shared, state, plain = setup(tx=optax.sgd(0.1))
    _, _, mixed = setup(tx=optax.sgd(0.1), compute_dtype=jnp.bfloat16)
    expected, _ = plain(shared, state, batch())
    found, _ = mixed(shared, state, batch())
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_close(found.task, expected.task, atol=2e-2)
    assert "bf16" in str(jax.make_jaxpr(mixed)(shared, state, batch()))
    assert 0 < distance(found.task, expected.task)


def test_dropout_differs_by_step_and_repeats_by_key():
    shared, state, step = setup(model=Net(dropout=0.5))
    first, a = step(shared, state, batch())
    _, again = step(shared, state, batch())
    _, b = step(shared, replace(state, step=first.step), batch())
    assert a["loss"] == again["loss"] != b["loss"]


def test_nonfinite_step_changes_nothing_and_says_so():
    shared, state, step = setup()
    bad = {**batch(), "image": batch()["image"].at[0].set(jnp.nan)}
    new, sums = jax.jit(step)(shared, state, bad)
    assert sums["nonfinite"] == 1
    chex.assert_trees_all_equal(new.task, state.task)
    chex.assert_trees_all_equal(new.opt_state, state.opt_state)
    assert int(new.step) == int(state.step)
    again, sums = jax.jit(step)(shared, new, batch())
    assert sums["nonfinite"] == 1  # a good batch after a bad one changes nothing
    chex.assert_trees_all_equal(again.task, state.task)
    good, sums = jax.jit(step)(shared, state, batch())
    assert sums["nonfinite"] == 0 and int(good.step) == 1


def test_weighted_examples_keep_the_mean():
    """Masks may be weights: only their ratios matter."""
    shared, state, step = setup(tx=optax.sgd(1.0), frozen_stats=True)
    whole, _ = step(shared, state, {**batch(), "mask": jnp.ones(8)})
    light, _ = step(shared, state, {**batch(), "mask": jnp.full(8, 0.01)})
    chex.assert_trees_all_close(whole.task.delta, light.task.delta, atol=1e-5)
    assert distance(whole.task.delta, state.task.delta) > 1e-2


def test_accumulation_keeps_a_sharded_batch_sharded():
    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
    )
    tx = optax.sgd(1.0)
    shared, state, single = setup(tx=tx, frozen_stats=True)
    _, _, step = setup(tx=tx, frozen_stats=True, accumulate=2)
    data = jax.device_put(batch(16), NamedSharding(mesh, P("data")))
    shared, start = jax.device_put((shared, state), NamedSharding(mesh, P()))
    compiled = jax.jit(step).lower(shared, start, data).compile()
    found, _ = compiled(shared, start, data)
    expected, _ = single(jax.device_get(shared), state, batch(16))
    chex.assert_trees_all_close(
        jax.device_get(found.task), jax.device_get(expected.task), atol=1e-5
    )
    text = compiled.as_text()
    assert "f32[4,8,8,3]" in text  # a device's half of a part of 8
    assert "collective-permute" not in text and "all-to-all" not in text


def test_vmap_over_tasks_equals_a_loop():
    shared, one, step = setup(seed=0)
    _, two, _ = setup(seed=7)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    batches = [batch(seed=1), batch(seed=2)]
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *batches)
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)))
    for _ in range(3):
        stacked, sums = mapped(shared, stacked, both)
        one, one_sums = step(shared, one, batches[0])
        two, _ = step(shared, two, batches[1])
    assert jnp.allclose(sums["loss"][0], one_sums["loss"], rtol=1e-5)
    for n, state in enumerate((one, two)):
        found = jax.tree.map(lambda x, n=n: x[n], stacked.task)
        chex.assert_trees_all_close(found, state.task, atol=1e-5)
    assert distance(one.task, two.task) > 1e-2


@pytest.mark.parametrize("form", ["pmap", "shard_map"])
def test_data_parallel_equals_one_device(form):
    """Halves of unequal real sizes: sums are added before they are divided."""
    devices = jax.devices()[:2]
    tx = optax.sgd(1.0)
    shared, state, single = setup(tx=tx, frozen_stats=True)
    _, _, step = setup(tx=tx, frozen_stats=True, axis_name="data")
    data = {**batch(16), "mask": jnp.array([1.0] * 11 + [0.0] * 5)}
    expected, sums = single(shared, state, data)
    if form == "pmap":
        halves = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), data)
        mapped = jax.pmap(
            step, axis_name="data", in_axes=(None, None, 0), devices=devices
        )
        found, found_sums = mapped(shared, state, halves)
        first = jax.tree.map(lambda x: x[0], (found, found_sums))
        second = jax.tree.map(lambda x: x[1], (found, found_sums))
        chex.assert_trees_all_equal(first[0].task, second[0].task)
        found, found_sums = first
    else:
        mesh = jax.make_mesh((2,), ("data",), devices=devices)
        mapped = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
            )
        )
        data = jax.device_put(data, NamedSharding(mesh, P("data")))
        found, found_sums = mapped(shared, state, data)
    chex.assert_trees_all_close(found.task, expected.task, atol=1e-5)
    assert found_sums["count"] == sums["count"] == 11
    assert distance(expected.task, state.task) > 1e-2


@pytest.mark.parametrize("form", ["pmap", "shard_map"])
def test_running_statistics_are_averaged_over_devices(form):
    devices = jax.devices()[:2]
    shared, state, step = setup(axis_name="data")
    data = batch(16)
    local = setup()[2]
    halves = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], data) for i in (0, 1)]
    stats = [local(shared, state, h)[0].task.model_state for h in halves]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *stats)
    if form == "pmap":
        mapped = jax.pmap(
            step, axis_name="data", in_axes=(None, None, 0), devices=devices
        )
        pair = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), data)
        found = jax.tree.map(lambda x: x[0], mapped(shared, state, pair)[0])
    else:
        mesh = jax.make_mesh((2,), ("data",), devices=devices)
        data = jax.device_put(data, NamedSharding(mesh, P("data")))
        found, _ = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
            )
        )(shared, state, data)
    chex.assert_trees_all_close(found.task.model_state, expected, atol=1e-6)
    assert distance(*stats) > 1e-3


def test_adam_moves_factors_and_sgd_the_rest():
    shared, state, step = setup(tx=make_optimizer(RATES, steps=10, schedule="constant"))
    new, _ = step(shared, state, batch())
    old_f = state.task.delta["conv"]["kernel"].factors
    new_f = new.task.delta["conv"]["kernel"].factors
    for a, b in zip(old_f, new_f, strict=True):
        # Adam's first step has the size of the rate, whatever the gradient's.
        np.testing.assert_allclose(jnp.abs(b - a), RATES["factors"], rtol=1e-2)
    moved = jnp.abs(
        new.task.delta["bn"]["scale"].value - state.task.delta["bn"]["scale"].value
    )
    assert moved.std() > 0.01 * moved.mean() > 0


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "steps", "constant"])
def test_schedules_and_warmup(schedule):
    tx = make_optimizer(
        {"norm": 1.0}, steps=10, schedule=schedule, warmup_steps=4, momentum=0.0
    )
    delta = {"w": Replace(jnp.zeros(()))}
    opt_state, rates = tx.init(delta), []
    for _ in range(11):
        updates, opt_state = tx.update({"w": Replace(jnp.ones(()))}, opt_state, delta)
        rates.append(-float(updates["w"].value))
    np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1], atol=1e-6)
    t = np.arange(7) / 6
    expected = {
        "cosine": (1 + np.cos(np.pi * t)) / 2,
        "polynomial": (1 - t) ** 0.9,
        "steps": [1, 1, 1, 1, 0.1, 0.01, 0.01],
        "constant": np.ones(7),
    }[schedule]
    np.testing.assert_allclose(rates[4:], expected, atol=1e-6)


def test_weight_decay_by_group_and_clipping():
    delta = {"w": Replace(jnp.full((4,), 2.0)), "h": Replace(jnp.ones(4), group="head")}
    grads = jax.tree.map(jnp.zeros_like, delta)
    tx = make_optimizer(
        {"norm": 1.0, "head": 1.0}, steps=5, weight_decay={"norm": 0.1}, momentum=0.0
    )
    updates, _ = tx.update(grads, tx.init(delta), delta)
    np.testing.assert_allclose(updates["w"].value, -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["h"].value, 0.0)
    tx = make_optimizer(
        {"norm": 1.0, "head": 1.0}, steps=5, clip_norm=1.0, momentum=0.0
    )
    ones = jax.tree.map(lambda x: 10 * jnp.ones_like(x), delta)
    updates, _ = tx.update(ones, tx.init(delta), delta)
    np.testing.assert_allclose(float(optax.tree.norm(updates)), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "found 'linear'"),
        ({"warmup_steps": 10}, "0 <= warmup_steps < steps"),
        ({"weight_decay": {"head": 0.1}}, r"groups \['head'\].*\['norm'\]"),
    ],
)
def test_optimizer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer({"norm": 1.0}, steps=10, **options)


def test_group_without_a_rate_is_named():
    tx = make_optimizer({"norm": 1.0}, steps=10)
    with pytest.raises(ValueError, match=r"\['head'\] without a learning rate"):
        tx.init({"h": Replace(jnp.ones(3), group="head")})


def test_classification_counts_every_example_once():
    logits = jnp.array([[4.0, 0, 0], [0, 4, 0], [jnp.inf, 0, 0]])
    data = {"label": jnp.array([0, 0, 1]), "mask": jnp.array([1.0, 1, 0])}
    sums = classification(logits, data)
    assert sums["count"] == 2 and sums["correct"] == 1
    log_z = np.log(np.exp(4) + 2)
    np.testing.assert_allclose(sums["loss"], (log_z - 4) + log_z, rtol=1e-6)
    smooth = classification(logits, data, label_smoothing=0.3)
    assert np.isfinite(smooth["loss"]) and smooth["loss"] != sums["loss"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_class_without_a_logit_has_no_share(dtype):
    logits = jnp.array([[4.0, 0, 1], [0, 4, 2]], dtype)
    data = {"label": jnp.array([0, 1])}
    absent = jnp.full((2, 2), no_logit(dtype))
    padded = jnp.concatenate([logits, absent], axis=1)
    loss = partial(classification, batch=data, label_smoothing=0.3)
    chex.assert_trees_all_equal(loss(padded), loss(logits))
    zeros = jnp.concatenate([logits, jnp.zeros_like(absent)], axis=1)
    assert abs(loss(zeros)["loss"] - loss(logits)["loss"]) > 0.1
    if dtype == jnp.bfloat16:
        wide = loss(padded.astype(jnp.float32))  # as networks often end
        chex.assert_trees_all_equal(wide, loss(logits))
