"""SSF: scale and shift after the layer, ties of kernel and bias, counts, rules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from weights import weight

from ftn_jax import (
    Task,
    compact,
    count,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import complete, iter_nodes
from ftn_jax.nodes.scale import Scale, scale_rules


class Net(nn.Module):
    """A layer of each kind, each followed by SSF where `ssf` gives its arrays."""

    @nn.compact
    def __call__(self, x, ssf=None):
        def after(name, y):
            if ssf is None:
                return y
            gamma, beta = (
                a.reshape((1,) * (y.ndim - a.ndim) + a.shape) for a in ssf[name]
            )
            return gamma * y + beta

        pad = ((1, 2), (0, 1))
        x = after("conv", nn.Conv(6, (3, 3), strides=2, padding=pad, name="conv")(x))
        x = after("norm", nn.LayerNorm(name="norm")(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = after("query", nn.DenseGeneral((2, 4), name="query")(x))
        x = after("out", nn.DenseGeneral(5, axis=(-2, -1), name="out")(x))
        return after("fc", nn.Dense(3, name="fc")(nn.gelu(x)))


@pytest.fixture(scope="module")
def net():
    """Random parameters, an input, and the network compiled once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 7, 4)), jnp.float32)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    shared = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes
    )
    return (
        shared,
        x,
        jax.jit(lambda params, ssf=None: Net().apply({"params": params}, x, ssf)),
    )


@pytest.fixture(scope="module")
def delta(net):
    """One whose arrays are far from one and zero."""
    shared, _, _ = net
    rules = scale_rules(shared, "conv|norm|out|fc")
    rules |= scale_rules(shared, "query", inputs=1)
    delta = jax.eval_shape(
        lambda k, s: make_delta(k, s, rules), jax.random.key(0), shared
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def ssf_of(shared, delta):
    """The arrays of the original: gamma and beta for each layer."""
    nodes = {p: n for p, _, n in complete(shared, delta)}
    return {
        name: (nodes[f"{name}/bias"].gamma, nodes[f"{name}/bias"].beta)
        for name in shared
    }


def test_scale_and_shift_after_every_layer(net, delta):
    shared, _, run = net
    expected = run(shared, ssf_of(shared, delta))
    found, frozen = run(materialize(shared, delta)), run(shared)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * size, rtol=0)
    assert np.abs(expected - frozen).max() > 0.1 * size


def test_the_gradient_is_the_originals(net, delta):
    """Kernel and bias both pull at gamma: tied, not two copies."""
    shared, x, _ = net
    target = jnp.asarray(np.random.default_rng(2).normal(size=(2, 15, 3)), jnp.float32)

    @jax.jit
    def both(delta, ssf):
        def loss(params, ssf=None):
            return ((Net().apply({"params": params}, x, ssf) - target) ** 2).sum()

        ours = jax.grad(lambda d: loss(materialize(shared, d)))(delta)
        return ours, jax.grad(lambda s: loss(shared, s))(ssf)

    ours, theirs = both(delta, ssf_of(shared, delta))
    for name, (gamma, beta) in theirs.items():
        node = ours[name]["bias"]  # the first of its label holds gamma
        for found, expected in ((node.gamma, gamma), (node.beta, beta)):
            size = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, atol=2e-5 * size, rtol=0)
            assert size > 1e-3


def test_gamma_is_held_once_for_each_layer(net, delta):
    shared, _, _ = net
    held = {p: (n.gamma is not None, n.beta is not None) for p, n in iter_nodes(delta)}
    for name in shared:
        weight_name = "scale" if name == "norm" else "kernel"
        assert held[f"{name}/bias"] == (True, True)
        assert held[f"{name}/{weight_name}"] == (False, False)
        assert delta[name]["bias"].share == name
    assert count(delta).total == 2 * (6 + 6 + 8 + 5 + 3)
    assert delta["query"]["bias"].gamma.shape == (2, 4)


def test_task_file(net, delta, tmp_path):
    shared, _, _ = net
    save_task(tmp_path, Task(delta, {}), shared=shared, name="ssf")
    found = restore_task(tmp_path, shared).task.delta
    assert jax.tree.structure(found) == jax.tree.structure(delta)
    expected, again = materialize(shared, delta), materialize(shared, compact(found))
    for a, b, w in zip(*map(jax.tree.leaves, (expected, again, shared)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - w).max() > 0.1


def test_count_of_vit_is_the_codes(key):
    """2 * 22 d per block and 4 d outside, of ViT-B with a bias in its patch layer."""
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def dense(kernel, bias):
        return {"kernel": float32(kernel), "bias": float32(bias)}

    norm = {"scale": float32((768,)), "bias": float32((768,))}
    qkv = ("query", "key", "value")
    block = {
        "attention": {n: dense((768, 12, 64), (12, 64)) for n in qkv}
        | {"out": dense((12, 64, 768), (768,))},
        "mlp": {"fc1": dense((768, 3072), (3072,)), "fc2": dense((3072, 768), (768,))},
        "norm1": norm,
        "norm2": norm,
    }
    vit = {f"blocks_{i}": block for i in range(12)}
    vit |= {"patch": dense((16, 16, 3, 768), (768,)), "norm": norm}
    vit["class_token"] = float32((1, 1, 768))
    rules = scale_rules(vit, ".*/(query|key|value)", inputs=1)
    rules |= scale_rules(vit, ".*/(out|fc1|fc2|norm1|norm2)|patch|norm")
    delta = jax.eval_shape(lambda k, s: make_delta(k, s, rules), key, vit)
    assert count(delta).total == 205_824 == 768 * (22 * 12 + 4)
    assert delta["class_token"] is None


# Starts ---------------------------------------------------------------------------


def test_normal_start_is_the_papers(key):
    w = jax.ShapeDtypeStruct((4, 8192), jnp.float32)
    node = Scale.init(key, w, init="normal")
    assert node.gamma.shape == (8192,) and node.beta is None
    np.testing.assert_allclose([node.gamma.mean(), node.gamma.std()], [1, 0.02], 0.05)
    bias = Scale.init(key, jnp.ones(8192), shift=True, init="normal", std=0.1)
    np.testing.assert_allclose([bias.gamma.std(), bias.beta.std()], [0.1, 0.1], 0.05)
    assert abs(float(bias.beta.mean())) < 0.01
    assert np.abs(bias.beta + 1 - bias.gamma).max() > 0.1  # not the same numbers


def test_identity_start_keeps_every_bit(net):
    shared, _, _ = net
    rules = scale_rules(shared, "conv|norm|out|fc|query")
    rules["query/kernel"] = partial(Scale.init, inputs=1, share="query")
    start = jax.jit(lambda k, s: materialize(s, make_delta(k, s, rules)))
    params = start(jax.random.key(0), shared)
    for a, b in zip(*map(jax.tree.leaves, (params, shared)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_convolution_without_bias_has_gamma_alone(key):
    shared = {"conv": {"kernel": weight("conv2d")}}
    delta = make_delta(key, shared, scale_rules(shared, "conv", group="norm"))
    assert count(delta).by_group == {"norm": 5}


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 4}, r"inputs must be 0 to 3 leading axes of the shape.*found 4"),
        ({"inputs": -1}, "inputs must be 0 to 3"),
        ({"inputs": 1, "shift": True}, "a bias has no inputs, found inputs=1"),
        ({"init": "ones"}, "init must be identity or normal, found 'ones'"),
    ],
)
def test_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        Scale.init(key, weight("conv2d"), **options)


def test_what_does_not_fit_is_named(key):
    node = Scale.init(key, weight("conv2d"))
    for shape in ((3, 3, 5, 4), ()):
        with pytest.raises(ValueError, match=r"gamma has the shape \(5,\), the weight"):
            node.merge(jnp.ones(shape))
    bias = Scale(jnp.ones(5), jnp.ones(4))
    with pytest.raises(ValueError, match=r"beta has the shape \(4,\), the weight \(5,"):
        bias.merge(weight("bias"))
    shared = {"q": {"kernel": jnp.ones((6, 2, 4)), "bias": jnp.ones((2, 4))}}
    with pytest.raises(
        ValueError, match=r"q/kernel: nodes of the label 'q' share 'gam"
    ):
        make_delta(key, shared, scale_rules(shared, "q"))  # inputs=1 forgotten


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a/kernel", r"'a/kernel' matches no layer.*leaves \[a.b/bias, a.b/kernel, em"),
        (
            "embed",
            r"embed/table: a layer to scale has kernel or scale, and bias, found",
        ),
    ],
)
def test_rules_refuse(pattern, message):
    shared = {"a.b": {"kernel": 1.0, "bias": 1.0}, "embed": {"table": 1.0}}
    with pytest.raises(ValueError, match=message):
        scale_rules(shared, pattern)


def test_rules_take_a_path_by_the_letter(key):
    """A dot in a layer's name is no wildcard."""
    leaf = {"kernel": jnp.ones((2, 3))}
    shared = {"a.b": leaf, "axb": leaf}
    delta = make_delta(key, shared, scale_rules(shared, r"a\.b"))
    assert [path for path, _ in iter_nodes(delta)] == ["a.b/kernel"]
