"""Each generator gives the numbers of an independent PyTorch implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.models import BigGAN, BigGANDeep, biggan_deep
from ftn_jax.pretrained import load_biggan, load_biggan_deep

torch = pytest.importorskip("torch")

from .torch_biggan import TorchBigGAN, randomize  # noqa: E402

SMALL = {"channels": (16, 16, 16, 8), "num_classes": 5, "chunk": 3, "shared_dim": 6}


def gap(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def torch_images(net, *inputs):
    with torch.no_grad():
        return net(*inputs).numpy().transpose(0, 2, 3, 1)


def small_net():
    return randomize(TorchBigGAN((16, 16, 16, 8), 5, 3, 6, attention=1))


def test_biggan_from_a_file(tmp_path):
    net = small_net()
    torch.save(net.state_dict(), tmp_path / "G_ema.pth")
    model, weights = load_biggan(tmp_path / "G_ema.pth")
    assert model == BigGAN(**SMALL, attention=(16,))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, model.dim_z)).astype(np.float32)
    labels = np.array([0, 4, 2])
    expected = torch_images(net, torch.from_numpy(z), torch.from_numpy(labels))
    draw = jax.jit(model.apply)
    assert gap(draw(weights._asdict(), z, labels), expected) < 1e-4
    weights.params["attention1"]["gamma"] *= 0
    assert gap(draw(weights._asdict(), z, labels), expected) > 1e-2


@pytest.fixture(scope="module")
def deep():
    package = pytest.importorskip("pytorch_pretrained_biggan")
    config = package.BigGANConfig(
        output_dim=32,
        z_dim=6,
        class_embed_dim=6,
        channel_width=4,
        num_classes=5,
        layers=[
            (True, 16, 8),
            (True, 8, 4),
            (False, 4, 4),
            (True, 4, 2),
            (False, 2, 1),
        ],
        attention_layer_position=2,
    )
    net = randomize(package.BigGAN(config))
    model = BigGANDeep(
        tuple(config.layers), width=4, num_classes=5, dim_z=6, attention=2
    )
    weights = {k: v.numpy() for k, v in net.state_dict().items()}
    return net, model, load_biggan_deep(weights, model)


@pytest.mark.parametrize("truncation", [1.0, 0.413])
def test_biggan_deep(deep, truncation):
    net, model, weights = deep
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 6)).astype(np.float32)
    labels = jnp.array([0, 4, 2])
    one_hot = torch.eye(5)[[0, 4, 2]]
    expected = torch_images(net, torch.from_numpy(z), one_hot, truncation)
    draw = jax.jit(model.clone(truncation=truncation).apply)
    assert gap(draw(weights._asdict(), z, labels), expected) < 1e-4
    other = draw(weights._asdict(), z, labels[::-1])
    assert gap(other, expected) > 1e-2
    # Another row of the tables of statistics gives another image.
    far = torch_images(net, torch.from_numpy(z), one_hot, 0.9)
    assert gap(far, expected) > 1e-2


@pytest.mark.slow
def test_biggan_deep_128_in_full():
    package = pytest.importorskip("pytorch_pretrained_biggan")
    net = randomize(package.BigGAN(package.BigGANConfig()))
    model = biggan_deep(128)
    weights = load_biggan_deep(
        {k: v.numpy() for k, v in net.state_dict().items()}, model
    )
    z = np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32)
    one_hot = torch.eye(1000)[[207]]
    expected = torch_images(net, torch.from_numpy(z), one_hot, 1.0)
    found = jax.jit(model.apply)(weights._asdict(), z, jnp.array([207]))
    assert gap(found, expected) < 1e-4
