"""The DeepLabv3+ decoder: its size, its sizes, and the traps of its BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.models import cifar_resnet, resnet18
from ftn_jax.models.deeplab import ConvBNReLU, Decoder, DeepLab, resize_bilinear

pytestmark = pytest.mark.long


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("outputs", "expected"), [(41, 5_436_809), (3, 5_427_043), (1, 5_426_529)]
)
def test_published_size(outputs, expected):
    high = jax.ShapeDtypeStruct((1, 27, 35, 512), jnp.float32)
    low = jax.ShapeDtypeStruct((1, 107, 140, 64), jnp.float32)
    made = jax.eval_shape(Decoder(outputs).init, jax.random.key(0), high, low)
    assert sizes(made["params"]) == expected


@pytest.mark.parametrize("stride", [16, 8])
def test_output_stride_of_resnet18_at_the_published_size(stride):
    model = resnet18(output_stride=stride)
    image = jax.ShapeDtypeStruct((2, 425, 560, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    found = jax.eval_shape(
        lambda v, x: model.apply(v, x, features=True), variables, image
    )
    high = {16: (27, 35), 8: (54, 70)}[stride]
    assert found["layer4"].shape == (2, *high, 512)
    assert found["layer1"].shape == (2, 107, 140, 64)
    net = DeepLab(model, 41)
    whole = jax.eval_shape(net.init, jax.random.key(0), image)
    out = jax.eval_shape(net.apply, whole, image)
    assert out.shape == (2, 425, 560, 41)
    assert sizes(whole["params"]["decoder"]) == 5_436_809
    assert "head" not in whole["params"]["backbone"]


@pytest.fixture(scope="module")
def small():
    net = DeepLab(cifar_resnet(8), 2, high="layer3", width=4, low_width=2, rates=(2, 6))
    return net, net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 9, 3), (1, 1, 1)])
def test_odd_and_small_images_and_a_batch_of_one(small, shape):
    net, variables = small
    image = jax.random.normal(jax.random.key(1), (*shape, 3))
    assert net.apply(variables, image).shape == (*shape, 2)
    out, new = net.apply(variables, image, train=True, mutable=["batch_stats"])
    assert out.shape == (*shape, 2)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, new)))


def test_batchnorm_after_global_pooling_keeps_its_statistics_for_one_image():
    """One value has no variance: the result would be the bias, whatever the image."""
    layer, one = ConvBNReLU(3), jax.random.normal(jax.random.key(0), (1, 1, 1, 4))
    variables = layer.init(jax.random.key(1), 100 * one)

    def train(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])

    out, new = train(100 * one)
    np.testing.assert_array_equal(out, layer.apply(variables, 100 * one))
    chosen = jax.tree.leaves(variables["batch_stats"])
    for a, b in zip(jax.tree.leaves(new), chosen, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(out, train(-100 * one)[0])
    _, moved = train(jnp.concatenate([one, -one]))  # two images have statistics
    assert not np.array_equal(jax.tree.leaves(moved)[1], chosen[1])


def test_frozen_backbone_keeps_its_statistics_and_the_decoder_does_not(small):
    net, variables = small
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def stats(**options):
        _, new = net.apply(
            variables, image, train=True, mutable=["batch_stats"], **options
        )
        new, old = new["batch_stats"], variables["batch_stats"]
        return {
            part: all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(new[part]), jax.tree.leaves(old[part]), strict=True
                )
            )
            for part in ("backbone", "decoder")
        }

    assert stats() == {"backbone": False, "decoder": False}
    assert stats(frozen_backbone=True) == {"backbone": True, "decoder": False}


def test_unknown_features_are_named(small):
    with pytest.raises(ValueError, match=r"no features \['layer4'\], it gives"):
        DeepLab(cifar_resnet(8), 1).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


def test_resize_is_that_of_pixel_centres():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)

    def along(a, size, axis):
        n = a.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, n - 1)
        shape = [1] * a.ndim
        shape[axis] = -1
        share = (place - low).reshape(shape)
        return a.take(low, axis) * (1 - share) + a.take(high, axis) * share

    expected = along(along(x, 9, 1), 12, 2)
    np.testing.assert_allclose(resize_bilinear(x, 9, 12), expected, atol=1e-5)
    corners = along(along(x, 8, 1), 12, 2)
    assert not np.allclose(resize_bilinear(x, 8, 12)[:, :, :11], expected[:, :8, :11])
    np.testing.assert_allclose(resize_bilinear(x, 8, 12), corners, atol=1e-5)
