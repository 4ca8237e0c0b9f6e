"""The generators' shapes and counts; spectral normalization against an SVD."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ftn_jax.models import BIGGANS, BigGAN, BigGANDiscriminator, biggan, biggan_deep
from ftn_jax.models.spectral import normalize, start_vectors

pytestmark = pytest.mark.long

TINY = BigGAN((8, 8), num_classes=3, chunk=2, shared_dim=4, attention=(8,))


def shapes(model):
    z, y = jnp.zeros((1, model.dim_z)), jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), z, y)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def part(params, *names):
    flat = flatten_dict(params, sep="/")
    return sum(x.size for path, x in flat.items() if any(n in path for n in names))


@pytest.fixture(scope="module")
def tiny():
    z, y = jnp.zeros((2, TINY.dim_z)), jnp.zeros((2,), jnp.int32)
    variables = jax.jit(TINY.init)(jax.random.key(0), z, y)
    gamma = jnp.array(0.5)  # it starts at zero, where attention does nothing
    variables["params"]["attention0"]["gamma"] = gamma
    return variables


def test_biggan_128_has_the_published_parameters():
    variables = shapes(biggan(128))
    params = variables["params"]
    assert size(params) == 70_433_988
    assert size(variables["batch_stats"]) == 14_976
    assert part(params, "embedding") == 128_000
    assert part(params, "first") == 516_096
    assert part(params, "attention") == 46_081
    assert part(params, "/conv") - part(params, "output/conv") == 67_552_992
    assert part(params, "gain", "bias/kernel") == 2_188_032
    assert part(params, "output/conv") == 2_595 and part(params, "output/bn") == 192


def test_biggan_deep_128_has_the_published_parameters():
    variables = shapes(biggan_deep(128))
    assert size(variables["params"]) == 50_388_609


@pytest.mark.parametrize(
    "name", ["biggan32", "biggan64", "biggan256", "biggan_deep256"]
)
def test_named_generators_draw_their_size(name):
    model = BIGGANS[name](width=8, num_classes=2)
    assert name.endswith(str(model.resolution))
    z, y = jnp.zeros((1, model.dim_z)), jnp.zeros((1,), jnp.int32)
    images = jax.eval_shape(
        lambda key: model.init_with_output(key, z, y)[0], jax.random.key(0)
    )
    assert images.shape == (1, model.resolution, model.resolution, 3)


def test_labels_and_class_vectors_are_one(tiny):
    z = jax.random.normal(jax.random.key(1), (2, TINY.dim_z))
    labels = jnp.array([2, 1])
    rows = tiny["params"]["embedding"]["embedding"][labels]
    draw = jax.jit(TINY.apply)
    found = draw(tiny, z, rows)
    assert bool(jnp.abs(found).max() <= 1)
    np.testing.assert_array_equal(found, draw(tiny, z, labels))
    assert np.abs(found - draw(tiny, z, rows[::-1])).max() > 1e-2


def test_training_mode_normalizes_by_the_batch(tiny):
    z = jax.random.normal(jax.random.key(1), (4, TINY.dim_z))
    y = jnp.arange(4) % 3
    train = partial(TINY.apply, train=True, mutable=["batch_stats"])
    images, new = jax.jit(train)(tiny, z, y)
    old = tiny["batch_stats"]["block0"]["bn1"]["stats"]["mean"]
    moved = new["batch_stats"]["block0"]["bn1"]["stats"]["mean"]
    assert np.abs(moved - old).max() > 1e-3
    assert np.abs(images - jax.jit(TINY.apply)(tiny, z, y)).max() > 1e-2


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        ((2, 5), jnp.zeros(2, jnp.int32), r"z has shape \(2, 5\), expected .*4"),
        ((2, 4), jnp.zeros((2, 3)), r"class vectors of shape \(batch, 4\)"),
        ((2, 4), jnp.zeros(2), "float32 of shape"),
        ((2, 4), jnp.zeros(3, jnp.int32), "2 latent vectors but 3 classes"),
    ],
)
def test_other_lengths_are_refused(z, y, message):
    with pytest.raises(ValueError, match=message):
        TINY.init(jax.random.key(0), jnp.zeros(z), y)


def test_deep_has_no_training_mode_and_checks_its_truncation():
    model = biggan_deep(128, width=8, num_classes=2)
    z, y = jnp.zeros((1, 128)), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="no training mode"):
        model.init(jax.random.key(0), z, y, train=True)
    with pytest.raises(ValueError, match="truncation is 1.5"):
        model.clone(truncation=1.5).init(jax.random.key(0), z, y)


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match=r"resolution is 100, known are \[32, 64"):
        biggan(100)
    with pytest.raises(ValueError, match="dim_z is 3, expected at least 6"):
        biggan(128, dim_z=3)


def test_spectral_norm_divides_by_the_largest_singular_value(tiny):
    params = tiny["params"]
    vectors = start_vectors(jax.random.key(2), params)
    new = jax.jit(partial(normalize, steps=100))(params, vectors).params
    for path, w in flatten_dict(new, sep="/").items():
        old = flatten_dict(params, sep="/")[path]
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(w, old)
            continue
        sigma = np.linalg.norm(np.reshape(old, (-1, old.shape[-1])), 2)
        np.testing.assert_allclose(w, old / sigma, rtol=2e-2, err_msg=path)


def test_spectral_norm_takes_the_gradient_along_sigma_away():
    """Growing a kernel does not change it: the gradient is orthogonal to it."""
    w = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    u = start_vectors(jax.random.key(1), w)
    target = jax.random.normal(jax.random.key(2), (6, 4))

    def loss(w, u):
        return jnp.sum(normalize(w, u, steps=50).params["kernel"] * target)

    slope = jax.grad(loss)(w, u)["kernel"]
    assert abs(float(jnp.sum(slope * w["kernel"]))) < 1e-4
    assert float(jnp.abs(slope).max()) > 1e-2


def test_vectors_carry_the_iteration_on():
    w = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    u = start_vectors(jax.random.key(1), w)
    at_once = normalize(w, u, steps=3)
    for _ in range(3):
        found, u = normalize(w, u)
    np.testing.assert_allclose(found["kernel"], at_once.params["kernel"], rtol=1e-5)


def test_discriminator_scores_depend_on_image_and_class():
    model = BigGANDiscriminator((8,), (True,), num_classes=3, attention=(8,))
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = model.init(jax.random.key(1), x, jnp.array([0, 1]))
    scores = model.apply(variables, x, jnp.array([0, 1]))
    assert scores.shape == (2,)
    assert np.abs(scores - model.apply(variables, x, jnp.array([1, 1])))[0] > 1e-4
    assert np.abs(scores - model.apply(variables, x[::-1], jnp.array([0, 1]))).min() > 0
