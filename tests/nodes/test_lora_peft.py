"""LoRA and DoRA beside peft: the same factors make the same layer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized

from ftn_jax.nodes.lora import DoRA, LoRA

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

CONVS = {
    "plain": {},
    "stride 2": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (1, 0), "kernel_size": (3, 2)},
    "1x1": {"kernel_size": 1},
}


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5)


def conv2d(**options):
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 5, **{"kernel_size": 3, **options})


def to_flax(weight):
    """(out, in, ...) to (..., in, out)."""
    w = weight.detach().numpy()
    return jnp.asarray(np.moveaxis(w, (0, 1), (-1, -2)))


merge = jax.jit(lambda node, w: node.merge(w))


def layers(kind, base, *, rank=2, alpha=3):
    """Our node with random arrays, and peft's layer with the same."""
    w = to_flax(base.weight)
    node = randomized(
        jax.eval_shape(
            lambda k: kind.init(k, w, rank=rank, alpha=alpha), jax.random.key(0)
        )
    )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], use_dora=kind is DoRA
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    a, b = np.array(node.a), np.array(node.b)
    a = np.moveaxis(a.reshape(*w.shape[:-1], rank), (-1, -2), (0, 1))
    b = b.T.reshape(len(b.T), rank, *(1,) * (w.ndim - 2))
    pairs = [(layer.lora_A, a), (layer.lora_B, b)]
    if kind is DoRA:
        norm = np.sqrt((np.asarray(w) ** 2).sum(axis=tuple(range(w.ndim - 1))))
        own = layer.lora_magnitude_vector["default"].weight
        magnitude = (norm + np.asarray(node.magnitude)).reshape(own.shape)
        pairs.append((layer.lora_magnitude_vector, magnitude))
    for module, value in pairs:
        module["default"].weight.data = torch.from_numpy(np.ascontiguousarray(value))
    return node, w, layer


def check(node, w, base, found, x):
    """peft's output is that of our merged kernel in the plain layer."""
    with torch.no_grad():
        frozen = base(x).numpy()
        kernel = np.moveaxis(np.array(merge(node, w)), (-1, -2), (0, 1))
        base.weight.data = torch.from_numpy(np.ascontiguousarray(kernel))
        ours = base(x).numpy()
    found = found.detach().numpy()
    size = np.abs(found).max()
    np.testing.assert_allclose(ours, found, atol=1e-5 * size, rtol=0)
    assert np.abs(found - frozen).max() > 1e-2 * size


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_linear(kind):
    base, x = linear(), torch.randn(3, 6, generator=torch.manual_seed(1))
    node, w, layer = layers(kind, base)
    check(node, w, layer.base_layer, layer(x), x)


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_conv2d(kind, options):
    base = conv2d(**options)
    x = torch.randn(2, 4, 8, 7, generator=torch.manual_seed(1))
    node, w, layer = layers(kind, base)
    check(node, w, layer.base_layer, layer(x), x)


def test_conv2d_with_dilation_of_peft_3697():
    """peft's branch forgets the dilation; what it merges is right, and is ours."""
    base = conv2d(dilation=2, padding=2)
    x = torch.randn(2, 4, 8, 7, generator=torch.manual_seed(1))
    node, w, layer = layers(LoRA, base)
    update = to_flax(layer.get_delta_weight("default"))
    np.testing.assert_allclose(merge(node, w), w + update, atol=1e-5)
    assert np.abs(update).max() > 0.1
    kernel = base.weight + layer.get_delta_weight("default")
    expected = torch.nn.functional.conv2d(x, kernel, base.bias, dilation=2, padding=2)
    check(node, w, layer.base_layer, expected, x)


def test_detached_norm_gives_pefts_gradient():
    """peft takes |v| for a constant; the exact gradient is another."""
    base, x = linear(), torch.randn(3, 6, generator=torch.manual_seed(1))
    node, w, layer = layers(DoRA, base)
    (layer(x) ** 2).sum().backward()
    theirs = layer.lora_A["default"].weight.grad.numpy().T
    bias = jnp.asarray(base.bias.detach().numpy())
    x = jnp.asarray(x.numpy())

    @jax.jit
    def gradient(node):
        return jax.grad(lambda n: ((x @ n.merge(w) + bias[None]) ** 2).sum())(node).a

    size = np.abs(theirs).max()
    detached = DoRA(node.a, node.b, node.magnitude, scale=node.scale, detach_norm=True)
    np.testing.assert_allclose(gradient(detached), theirs, atol=1e-5 * size)
    assert np.abs(gradient(node) - theirs).max() > 1e-2 * size
