"""Whole training steps of ResNets: the factored step is the merged one."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factored.agreement import (
    BRANCH,
    CHAIN,
    KEY,
    assert_same_numbers,
    distances,
    draw,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ftn_jax import TaskState, make_delta, make_eval_step, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.factored import factored
from ftn_jax.forward import merged
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP, LoRA, Replace

pytestmark = pytest.mark.slow

TX = optax.sgd(0.05)
RULES = {
    r".*(conv1|shortcut/conv)/kernel": partial(CP.init, rank=4, init="normal"),
    r".*conv\d*/kernel": partial(LoRA.init, rank=2, init="normal"),
    ".*/bn.*": Replace.init,
    "head/.*": Replace.init,
}


def setup(name="cifar_resnet8", px=16, n=8, **options):
    model = RESNETS[name](5, **options)
    rng = np.random.default_rng(0)
    x = draw(rng, (n, px, px, 3))
    shapes = jax.eval_shape(model.init, KEY, x)
    params = jax.tree.map(lambda s: draw(rng, s.shape), shapes["params"])
    stats = jax.tree_util.tree_map_with_path(
        lambda p, s: jnp.full(s.shape, float(p[-1].key == "var")), shapes["batch_stats"]
    )
    delta = jax.eval_shape(partial(make_delta, rules=RULES), KEY, params)
    delta = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), delta
    )
    state = TaskState.create(delta, {"batch_stats": stats}, tx=TX, key=KEY)
    batch = {"image": x, "label": jnp.arange(n) % 5}
    return from_linen(model), params, state, batch


@pytest.fixture(scope="module")
def small():
    return setup()


def step(apply, forward, **options):
    return make_train_step(apply, TX, forward=forward, **options)


def moved(new, old):
    """What a step changed: to compare states would hide a small wrong gradient."""
    return jax.tree.map(jnp.subtract, new.task, old.task)


@pytest.fixture(scope="module")
def merged_step(small):
    apply, *arguments = small
    return jax.jit(step(apply, merged))(*arguments)


@pytest.mark.parametrize("forward", [CHAIN, BRANCH, factored])
def test_a_step_is_the_merged_step(small, merged_step, forward):
    apply, shared, state, batch = small
    new, sums = jax.jit(step(apply, forward))(shared, state, batch)
    expected, expected_sums = merged_step
    assert_same_numbers(sums, expected_sums)
    assert_same_numbers(moved(new, state), moved(expected, state), tolerance=1e-4)
    statistics = new.task.model_state, expected.task.model_state
    assert_same_numbers(*statistics)
    assert max(distances(new.task.model_state, state.task.model_state).values()) > 1e-2


def test_a_resnet18_step_is_the_merged_step():
    apply, shared, state, batch = setup("resnet18", px=32, n=4, width=8)
    both = {}
    for name, forward in (("merged", merged), ("factored", factored)):
        both[name], _ = jax.jit(step(apply, forward))(shared, state, batch)
    moves = [moved(both[name], state) for name in ("factored", "merged")]
    # Normalized over four places, rounding grows from layer to layer.
    assert_same_numbers(*moves, tolerance=1e-3)
    plan = factored.plan(apply, shared, state.task.delta, state.task.model_state, batch)
    assert {"chain", "branch", "kernel"} == {row.choice for row in plan}


def test_shared_is_bit_equal_after_donated_steps(small):
    apply, shared, state, batch = small
    before = jax.tree.map(lambda x: np.asarray(x).copy(), shared)
    copy = jax.tree.map(jnp.copy, state)
    train = jax.jit(step(apply, CHAIN), donate_argnums=1)
    for _ in range(3):
        copy, sums = train(shared, copy, batch)
    assert copy.finite and sums["nonfinite"] == 0
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, shared), before)


def test_evaluation_is_the_merged_one(small):
    apply, shared, state, batch = small

    def both(shared, task, batch):
        return [
            make_eval_step(apply, metrics=None, forward=forward)(shared, task, batch)
            for forward in (factored, CHAIN, merged)
        ]

    auto, chain, expected = jax.jit(both)(shared, state.task, batch)
    assert_same_numbers(auto, expected, tolerance=1e-4)
    chex.assert_trees_all_equal(chain, expected)  # merged kernels, to the bit


def test_remat_and_micro_batches(small):
    apply, shared, state, batch = small
    options = {"remat": True, "accumulate": 2}
    got, expected = (
        jax.jit(step(apply, forward, **options))(shared, state, batch)[0]
        for forward in (CHAIN, merged)
    )
    assert_same_numbers(moved(got, state), moved(expected, state), tolerance=1e-4)


def test_models_that_checkpoint_their_blocks():
    apply, shared, state, batch = setup(px=8, n=4, remat=True)
    got, expected = (
        jax.jit(step(apply, forward))(shared, state, batch)[0]
        for forward in (factored, merged)
    )
    assert_same_numbers(moved(got, state), moved(expected, state), tolerance=1e-4)


def test_half_precision(small):
    """Merged kernels are rounded once merged; gradients of factors are float32."""
    apply, shared, state, batch = small

    def gradients(forward, dtype=jnp.bfloat16):
        def objective(delta):
            outputs, _ = forward(
                apply,
                shared,
                delta,
                state.task.model_state,
                batch,
                train=True,
                compute_dtype=dtype,
            )
            assert outputs.dtype == dtype
            return jnp.sin(outputs.astype(jnp.float32)).sum(), outputs

        return jax.grad(objective, has_aux=True)

    delta = state.task.delta
    exact, _ = jax.jit(gradients(merged, jnp.float32))(delta)
    (chain, y_chain), (branch, _), (expected, y) = (
        jax.jit(gradients(forward))(delta) for forward in (CHAIN, BRANCH, merged)
    )
    chex.assert_trees_all_equal(y_chain, y)
    assert {g.dtype for g in jax.tree.leaves(chain)} == {jnp.dtype(jnp.float32)}

    def error(found):
        return np.median([*distances(found, exact).values()])

    assert error(chain) < 1.2 * error(expected)
    # Beside the frozen operation, the low-rank path and the sum are rounded too: 1.504.
    assert error(branch) < 1.6 * error(expected)


def test_stacked_tasks_train_in_one_program(small):
    """The shared backbone is one; deltas, statistics and optimizer are mapped over."""
    apply, shared, state, batch = small
    other = jax.tree.map(lambda x: 0.5 * x, state.task)
    states = [state, replace(state, task=other)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    for forward in (CHAIN, BRANCH):
        one = step(apply, forward)
        together, _ = jax.jit(jax.vmap(one, (None, 0, None)))(shared, stacked, batch)
        for i, alone in enumerate(states):
            new, _ = jax.jit(one)(shared, alone, batch)
            got = jax.tree.map(lambda x, i=i: x[i], together)
            assert_same_numbers(moved(got, alone), moved(new, alone), tolerance=5e-4)


def test_a_sharded_step_is_the_whole_batchs(small):
    apply, shared, state, batch = small
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    results = []
    for forward in (CHAIN, BRANCH, merged):
        sharded = jax.shard_map(
            step(apply, forward, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=(P(), P()),
        )
        results.append(jax.jit(sharded)(shared, state, batch)[0])
    *got, expected = [moved(new, state) for new in results]
    for one in got:
        assert_same_numbers(one, expected, tolerance=1e-4)


def test_a_wrong_step_would_be_noticed(small, merged_step):
    apply, shared, state, batch = small
    new, _ = jax.jit(step(apply, CHAIN))(shared, state, batch)
    smaller = jax.tree.map(lambda x: 0.999 * x, moved(new, state))
    with pytest.raises(AssertionError, match="differ"):
        assert_same_numbers(smaller, moved(merged_step[0], state), tolerance=1e-4)
