"""The two players train each other, and what comes out is a folded generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ftn_jax.fit import NonFiniteLoss, fit
from ftn_jax.gan import Gan
from ftn_jax.models import BigGAN, BigGANDiscriminator

pytestmark = pytest.mark.long

G = BigGAN((8, 8), num_classes=2, chunk=2, shared_dim=4, attention=())
D = BigGANDiscriminator((8,), (True,), num_classes=2)


@pytest.fixture(scope="module")
def gan():
    return Gan(G, D, d_steps=2, averaging=0.5)


@pytest.fixture(scope="module")
def step(gan):
    return jax.jit(gan.step)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = np.tanh(rng.normal(size=(8, 8, 8, 3))).astype(np.float32)
    return {"image": image, "label": np.arange(8) % 2}


def moved(a, b):
    return [
        float(np.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


def test_both_players_and_the_average_move(gan, step, batch):
    state = gan.start(jax.random.key(0))
    new, sums = step(None, state, batch)
    assert float(sums["count"]) == 8 and float(sums["nonfinite"]) == 0
    assert int(new.step) == 1
    assert min(
        moved(new.generator.weights["block0"], state.generator.weights["block0"])
    )
    assert max(moved(new.discriminator.weights, state.discriminator.weights)) > 0
    assert max(moved(new.batch_stats, state.batch_stats)) > 0
    middle = jax.tree.map(
        lambda a, w: a + 0.9 * (w - a), state.average, new.generator.weights
    )  # the first steps count more than `averaging` says
    assert max(moved(new.average, middle)) < 1e-6


def test_the_discriminator_learns_to_tell(gan, step, batch):
    state, losses = gan.start(jax.random.key(0)), []
    for _ in range(12):
        state, sums = step(None, state, batch)
        losses.append(float(sums["d_loss"] / sums["count"]))
    assert losses[0] > 1.5 and min(losses[-3:]) < 0.8 * losses[0]


def test_a_step_repeats_bit_for_bit_and_another_key_does_not(gan, step, batch):
    one, _ = step(None, gan.start(jax.random.key(0)), batch)
    two, _ = step(None, gan.start(jax.random.key(0)), batch)
    assert max(moved(one.generator.weights, two.generator.weights)) == 0
    other, _ = step(None, gan.start(jax.random.key(1)), batch)
    assert max(moved(one.generator.weights, other.generator.weights)) > 0


def test_finished_kernels_have_spectral_norm_one(gan, step, batch):
    state, _ = step(None, gan.start(jax.random.key(0)), batch)
    params, stats = gan.finish(state, batches=2, batch_size=4)
    for path, w in flatten_dict(params, sep="/").items():
        if path.endswith("kernel"):
            sigma = np.linalg.norm(np.reshape(w, (-1, w.shape[-1])), 2)
            assert abs(sigma - 1) < 0.05, path
    assert max(moved(stats, state.batch_stats)) > 1e-3
    images = G.apply(
        {"params": params, "batch_stats": stats}, jnp.ones((1, 4)), jnp.zeros(1, int)
    )
    assert images.shape == (1, 8, 8, 3)


def test_a_loss_that_is_not_finite_changes_nothing(gan, step, batch):
    state = gan.start(jax.random.key(0))
    bad = {**batch, "image": batch["image"] * np.nan}
    with pytest.raises(NonFiniteLoss) as error:
        fit(step, None, state, lambda start: iter([bad]), steps=1)  # pyright: ignore
    assert max(moved(error.value.state.average, state.average)) == 0


def test_bad_arguments(gan, batch):
    odd = {k: v[:7] for k, v in batch.items()}
    with pytest.raises(ValueError, match="7 images has no 2 equal parts"):
        gan.step(None, gan.start(jax.random.key(0)), odd)
    with pytest.raises(ValueError, match="2 classes and the discriminator 3"):
        Gan(G, D.clone(num_classes=3))
