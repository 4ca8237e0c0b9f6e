"""Latents belong to no weight, and train with a delta, or alone."""

import os
import signal
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import count, materialize, restore_task, save_task
from ftn_jax.apply import from_linen
from ftn_jax.factored import factored
from ftn_jax.forward import merged
from ftn_jax.generation import of_label
from ftn_jax.invert import Drawer, Inversion, Inverter, in_range
from ftn_jax.latents import (
    beside,
    for_file,
    from_file,
    make_latents,
    tables,
    with_latents,
)
from ftn_jax.models import BigGAN
from ftn_jax.presets.biggan import generator_ftn
from ftn_jax.reconstruction import p_norm, psnr, reconstruction
from ftn_jax.resume import StateFolder
from ftn_jax.train import Task, TaskState

pytestmark = pytest.mark.long

MODEL = BigGAN((8, 8), num_classes=3, chunk=2, shared_dim=4, attention=(8,))
APPLY = of_label(from_linen(MODEL, inputs=("z", "y")), 1)
RULES = generator_ftn(rank=2, norms="factors", linear_rank=1)
RECIPE = Inversion(
    steps=40,
    batch_size=8,
    rates={"factors": 0.02, "linear": 1e-3, "latents": 0.05},
    look_every=10,
)


@pytest.fixture(scope="module")
def generator():
    z, y = jnp.zeros((2, MODEL.dim_z)), jnp.zeros((2,), jnp.int32)
    variables = jax.jit(MODEL.init)(jax.random.key(0), z, y)
    params = variables["params"]
    params["attention0"]["gamma"] = jnp.array(0.5)
    return params, {"batch_stats": variables["batch_stats"]}


@pytest.fixture(scope="module")
def images():
    """Eight pictures with one bright corner each."""
    found = np.full((8, 8, 8, 3), 90, np.uint8)
    for n in range(8):
        found[n, 4 * (n % 2) :][:4, 4 * (n // 2 % 2) :][:, :4] = 40 * (n // 2) + 60
    return found


@pytest.fixture(scope="module")
def start():
    return {"z": jax.random.normal(jax.random.key(5), (8, MODEL.dim_z))}


@pytest.fixture(scope="module")
def inverter():
    return Inverter(APPLY, RULES, RECIPE)


@pytest.fixture(scope="module")
def found(inverter, generator, images, start):
    return inverter.run(*generator, images, start)


@pytest.fixture(scope="module")
def drawer():
    return Drawer(APPLY)


def mean_psnr(drawer, shared, task, images):
    drawn = drawer(shared, task, batch_size=8)
    return float(psnr(jnp.asarray(drawn), jnp.asarray(in_range(images))).mean())


def test_latents_and_a_delta_fit_better_than_latents_alone(
    found, generator, images, start, drawer
):
    before = jax.tree.map(np.array, generator)
    alone = Inverter(APPLY, {}, RECIPE).run(*generator, images, start)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(generator), strict=True):
        np.testing.assert_array_equal(x, y)  # frozen, and not deleted
    assert count(alone.task.delta).by_group == {"latents": 8 * MODEL.dim_z}
    task = Task(
        beside(alone.task.delta["generator"], make_latents(**start)), generator[1]
    )
    values = [
        mean_psnr(drawer, generator[0], t, images)
        for t in (task, alone.task, found.task)
    ]
    assert values[0] + 1 < values[1] < values[2] - 1
    assert [step for step, _ in found.curve] == [0, 10, 20, 30, 40]
    assert found.steps == 40
    assert found.curve[-1][1] > found.curve[0][1] + 1
    kept = mean_psnr(drawer, generator[0], found.task, images)
    np.testing.assert_allclose(found.reached[1], kept, atol=1e-4)


def test_a_saved_task_draws_the_same_bits(found, generator, drawer, tmp_path):
    save_task(tmp_path, for_file(found.task), shared=generator[0], name="corners")
    again = from_file(restore_task(tmp_path, generator[0]).task)
    drawn = drawer(generator[0], found.task)
    np.testing.assert_array_equal(drawer(generator[0], again), drawn)
    moved = jax.tree.map(lambda t: t + 0.1, tables(again.delta))
    other = Task(
        beside(again.delta["generator"], make_latents(**moved)), again.model_state
    )
    assert np.abs(drawer(generator[0], other) - drawn).max() > 1e-3


def test_an_adapted_generator_stands_for_its_delta(found, generator, drawer):
    """Held-out images are fitted on it as on any frozen generator."""
    delta = found.task.delta["generator"]
    adapted = materialize(generator[0], delta)
    nothing = jax.tree.map(lambda _: None, adapted)
    task = Task(beside(nothing, found.task.delta["latents"]), generator[1])
    drawn = drawer(generator[0], found.task)
    np.testing.assert_allclose(drawer(adapted, task), drawn, atol=1e-5)
    assert np.abs(drawer(generator[0], task) - drawn).max() > 1e-2


def test_an_interrupted_inversion_ends_with_the_same_bits(
    found, inverter, generator, images, start, tmp_path
):
    folder, stops = StateFolder(tmp_path / "run"), []

    def stop(step, means):
        stops.append(step)
        if step == 30:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the loop shall meet the signal

    with pytest.raises(KeyboardInterrupt):
        inverter.run(*generator, images, start, folder=folder, on_log=stop)
    steps = []
    again = inverter.run(
        *generator, images, start, folder=folder, on_log=lambda s, _: steps.append(s)
    )
    assert stops == [10, 20, 30] and steps == [40]
    assert again.curve == [(s, v) for s, v in found.curve]
    for x, y in zip(
        jax.tree.leaves(again.task), jax.tree.leaves(found.task), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_it_stops_when_nothing_is_gained(inverter, generator, images, start):
    stopping = inverter.at(RECIPE.rates)  # the same program: only the loop differs
    stopping.recipe = replace(RECIPE, patience=1, min_gain=100.0)
    assert stopping.run(*generator, images, start).steps == 10


def test_a_run_that_diverges_ends_with_the_best_it_saw(
    inverter, generator, images, start, drawer
):
    rates = {"factors": 3.0, "linear": 3.0, "latents": 0.05}
    diverged = inverter.at(rates).run(*generator, images, start)
    values = [value for _, value in diverged.curve]
    assert min(values[-2:]) < values[0] - 1  # worse than the frozen generator
    kept = mean_psnr(drawer, generator[0], diverged.task, images)
    np.testing.assert_allclose(kept, max(values), atol=1e-4)


def test_the_factored_path_agrees_on_the_generator(generator, images, start):
    delta = beside(
        jax.tree.map(
            lambda x: x + 0.05,
            Inverter(APPLY, RULES, RECIPE)
            .start(*generator, start, seed=0)
            .task.delta["generator"],
        ),
        make_latents(**start),
    )
    batch = {"index": np.arange(8), "image": in_range(images)}

    def loss(delta, forward):
        drawn, _ = with_latents(forward)(
            APPLY, generator[0], delta, generator[1], batch, train=False
        )
        return reconstruction(drawn, batch)["loss"], drawn

    (one, drawn), slope = jax.jit(
        jax.value_and_grad(lambda d: loss(d, merged), has_aux=True)
    )(delta)
    (two, same), other = jax.jit(
        jax.value_and_grad(lambda d: loss(d, factored), has_aux=True)
    )(delta)
    np.testing.assert_allclose(same, drawn, atol=1e-5)
    for x, y in zip(jax.tree.leaves(slope), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * (1e-3 + np.abs(x).max()))
    frozen = beside(jax.tree.map(lambda _: None, generator[0]), delta["latents"])
    assert np.abs(loss(frozen, merged)[1] - drawn).max() > 1e-2


def test_psnr_is_of_a_range_of_two():
    zeros = jnp.zeros((1, 2, 2, 3))
    np.testing.assert_allclose(psnr(zeros + 0.2, zeros), [20.0], rtol=1e-5)
    batch = {"image": np.zeros((2, 2, 2, 3)), "mask": np.array([1.0, 0.0])}
    sums = p_norm(4.0)(jnp.full((2, 2, 2, 3), 0.5), batch)
    assert float(sums["loss"]) == 0.5**4 and float(sums["count"]) == 1


def test_misfits_are_refused(generator, images, start):
    inverter = Inverter(APPLY, {}, RECIPE)
    with pytest.raises(ValueError, match="7 images but 8 rows of 'z'"):
        inverter.run(*generator, images[:7], start)
    with pytest.raises(ValueError, match="found dtype float32, expected uint8"):
        inverter.run(*generator, images.astype(np.float32), start)
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\), the data has \(4, 8"):
        inverter.run(*generator, images[:, :4], start)
    with pytest.raises(ValueError, match="p is 0.5, expected at least 1"):
        Inverter(APPLY, {}, replace(RECIPE, p=0.5))
    with pytest.raises(ValueError, match="different numbers of rows"):
        make_latents(z=jnp.zeros((2, 3)), y=jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="no latents in its state"):
        from_file(Task({}, {"batch_stats": {}}))


def test_the_state_holds_nothing_of_the_generator(inverter, generator, start):
    state = inverter.start(*generator, start, seed=0)
    assert isinstance(state, TaskState)
    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.task)}
    assert not own & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(generator)}
