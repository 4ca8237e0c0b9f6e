"""What layers put out: which pixels of which convolutions, in evaluation mode."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ftn_jax import extend, make_delta, materialize
from ftn_jax.models import ResNet
from ftn_jax.nodes.rcm import RCM, pca_bases
from ftn_jax.responses import conv_responses

KERNELS = ".*conv\\d*/kernel"
IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)


def small(**options):
    return ResNet((1, 1), None, width=4, stem="3x3", **options)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(small().init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)
    kinds = {
        "params": lambda x: rng.normal(size=x.shape, scale=0.5),
        "batch_stats": lambda x: rng.uniform(0.5, 2, size=x.shape),
    }
    drawn = {kind: jax.tree.map(f, shapes[kind]) for kind, f in kinds.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


@pytest.fixture(scope="module")
def whole(variables, key0):
    return conv_responses(small(), variables, IMAGES, KERNELS, key=key0, positions=None)


@pytest.fixture(scope="module")
def key0():
    return jax.random.key(0)


def by_hand(variables):
    """The stem and the first block, written out."""

    def norm(y, block, name):
        p, s = (variables[c][block][name] for c in ("params", "batch_stats"))
        p, s = (jax.tree.map(np.asarray, x) for x in (p, s))
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def conv(x, w):
        return np.asarray(
            jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    params = variables["params"]
    found = {"stem/conv": conv(IMAGES, params["stem"]["conv"]["kernel"])}
    x = np.maximum(norm(found["stem/conv"], "stem", "bn"), 0)
    block = params["layer1_0"]
    found["layer1_0/conv1"] = conv(x, block["conv1"]["kernel"])
    y = np.maximum(norm(found["layer1_0/conv1"], "layer1_0", "bn1"), 0)
    found["layer1_0/conv2"] = conv(y, block["conv2"]["kernel"])
    return {f"{p}/kernel": y.reshape(-1, 4) for p, y in found.items()}


def test_every_pixel_of_every_convolution(variables, whole):
    assert {path: y.shape for path, y in whole.items()} == {
        "stem/conv/kernel": (6 * 256, 4),
        "layer1_0/conv1/kernel": (6 * 256, 4),
        "layer1_0/conv2/kernel": (6 * 256, 4),
        "layer2_0/conv1/kernel": (6 * 64, 8),
        "layer2_0/conv2/kernel": (6 * 64, 8),
        "layer2_0/shortcut/conv/kernel": (6 * 64, 8),
    }
    for path, expected in by_hand(variables).items():
        np.testing.assert_allclose(whole[path], expected, atol=1e-4)
        assert np.abs(expected).max() > 1e-1


def test_rematerialized_blocks_give_the_same(variables, whole, key0):
    found = conv_responses(
        small(remat=True), variables, IMAGES, KERNELS, key=key0, positions=None
    )
    chex.assert_trees_all_close(found, whole, atol=1e-5)


def test_pixels_are_drawn_evenly_from_images_and_batches(variables, whole, key0):
    pattern = "stem/conv/kernel"
    found = conv_responses(
        small(), variables, IMAGES, pattern, key=key0, positions=32, batch_size=2
    )
    assert list(found) == [pattern] and found[pattern].shape == (6 * 32, 4)
    pixels = whole[pattern].reshape(6, 256, 1, 4)
    drawn = found[pattern].reshape(6, 1, 32, 4)
    near = np.abs(pixels - drawn).max(axis=-1) < 1e-5
    assert (near.sum(axis=1) == 1).all()  # each is one pixel of its own image
    picks = near.argmax(axis=1)
    assert all(len({*row}) == 32 for row in picks)  # none twice
    assert len({tuple(row) for row in picks}) == 6  # other pixels in other images
    other = conv_responses(
        small(), variables, IMAGES, pattern, key=jax.random.key(1), positions=32
    )
    assert (other[pattern] != found[pattern]).any()


def test_more_pixels_than_there_are_takes_all(variables, whole, key0):
    found = conv_responses(
        small(), variables, IMAGES, "layer2_0/conv./kernel", key=key0, positions=64
    )
    for path, y in found.items():
        np.testing.assert_allclose(y, whole[path], atol=1e-5)


def test_rcm_in_the_basis_of_responses(variables, whole, key0):
    bases = pca_bases(whole)
    y = whole["layer2_0/conv1/kernel"] @ np.asarray(bases["layer2_0/conv1/kernel"]["u"])
    spread = np.cov(y.T)
    assert (np.diff(np.diag(spread)) < 1e-6).all()
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-4 * spread.max()
    extended = extend(variables["params"], pca=bases)
    delta = make_delta(key0, extended, {KERNELS: RCM.init})
    chex.assert_trees_all_equal(materialize(extended, delta), variables["params"])


class Odd(nn.Module):
    """A kernel used twice, one never called, one with outputs of two axes."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Conv(3, (1, 1), name="twice")
        self.sow("intermediates", "own", x)
        x = twice(twice(x))
        unused = self.param("unused", lambda _: {"kernel": jnp.ones((2, 2))})
        y = nn.DenseGeneral((2, 3), name="general")(x)
        return x.mean() + y.mean() + unused["kernel"].mean()


def test_refusals(variables, key0):
    def run(model=None, images=IMAGES, pattern=KERNELS, given=variables, **options):
        options = {"key": key0} | options
        return conv_responses(model or small(), given, images, pattern, **options)

    with pytest.raises(ValueError, match="matches no kernel.*the network has"):
        run(pattern="conv")
    for bad in ({"images": IMAGES[:0]}, {"positions": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="need images, batch_size >= 1"):
            run(**bad)
    odd = Odd()
    shapes = jax.eval_shape(odd.init, key0, IMAGES)
    given = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    common = {"model": odd, "given": given, "options": {}}
    with pytest.raises(ValueError, match="twice/kernel: expected one output of 3"):
        run(pattern="twice/kernel", **common)
    with pytest.raises(ValueError, match="'unused/kernel'.*no module's call uses"):
        run(pattern="unused/kernel", **common)
    assert run(pattern="general/kernel", **common)["general/kernel"].shape[-1] == 3
