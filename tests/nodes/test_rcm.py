"""RCM: bank and modulator one after the other, its bases, starts and refusals."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import Task, extend, make_delta, materialize, restore_task, save_task
from ftn_jax.nodes.adapter_series import SeriesAdapter
from ftn_jax.nodes.rcm import RCM, pca_bases, weight_bases

from .convolution import ONES, conv, draw, gap


def orthogonal(n, seed=0):
    return jnp.asarray(np.linalg.qr(draw(n, n, seed=seed))[0])


def start(w, *, n=None, **options):
    u = orthogonal(n or w.shape[-1])
    node = RCM.init(jax.random.key(0), w, extra={"pca": {"u": u}}, **options)
    return node.replace(u=u)


def modulator(node):
    """Wt of the paper, row by row."""
    rows = [
        v if node.g is None else node.g[o] * v / np.linalg.norm(v)
        for o, v in enumerate(np.asarray(node.v))
    ]
    return np.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": ONES},
        {"padding": ONES, "stride": 2},
        {"padding": ((2, 2), (2, 2)), "dilation": 2},
    ],
    ids=["plain", "stride", "dilation"],
)
def test_bank_then_modulator_is_one_convolution(options, normalize):
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 7, 4, seed=1)
    node = randomized(start(w, normalize=normalize))
    bank = np.asarray(w) @ np.asarray(node.u)  # U^T W, in HWIO
    expected = conv(conv(x, bank, **options), modulator(node).T[None, None])
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(conv(x, w, **options), expected) > 1e-1


@pytest.mark.parametrize("stride", [1, 2])
def test_parity_with_pytorch_modules(stride):
    torch = pytest.importorskip("torch")
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 7, 4, seed=1)
    node = randomized(start(w))
    bank = torch.nn.Conv2d(4, 8, 3, stride=stride, padding=1, bias=False)
    mix = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Conv2d(8, 8, 1, bias=False), dim=0
    )
    filters = np.einsum("hwio,of->fihw", np.asarray(w), np.asarray(node.u))
    with torch.no_grad():
        bank.weight.copy_(torch.from_numpy(filters))
        norm = mix.parametrizations.weight
        norm.original0.copy_(torch.from_numpy(np.array(node.g))[:, None, None, None])
        norm.original1.copy_(torch.from_numpy(np.array(node.v))[:, :, None, None])
        y = mix(bank(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())))
    options = {"padding": ONES, "stride": stride}
    found = conv(x, node.merge(w), **options)
    assert gap(found, y.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert gap(found, conv(x, w, **options)) > 1e-1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [5, 131])
def test_start_is_bit_equal_compiled_or_not(n, normalize):
    """W U U^T itself is W to rounding only, and norms differ by how they are summed."""
    w = jnp.asarray(draw(3, 3, 4, n))
    node = start(w, normalize=normalize)
    np.testing.assert_array_equal(node.merge(w), w)
    np.testing.assert_array_equal(jax.jit(lambda n, w: n.merge(w))(node, w), w)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    mapped = jax.jit(jax.vmap(lambda n: n.merge(w)))(stack)
    np.testing.assert_array_equal(mapped[1], w)
    rounded = jnp.matmul(jnp.matmul(w, node.u, precision="highest"), node.u.T)
    assert 0 < gap(rounded, w) < 1e-5


def test_rows_have_their_norms_apart_from_their_directions():
    w = weight("conv2d")
    node = randomized(start(w))
    longer = node.replace(v=7 * node.v)
    assert gap(longer.merge(w), node.merge(w)) < 1e-5
    double = node.replace(g=2 * node.g)
    assert gap(double.merge(w), 2 * node.merge(w)) < 1e-5
    plain = randomized(start(w, normalize=False))
    assert plain.g is None
    assert gap(plain.replace(v=7 * plain.v).merge(w), plain.merge(w)) > 1


def test_it_is_a_series_adapter_of_another_basis(key):
    """W' = W (I + alpha) with I + alpha = U Wt^T."""
    w = weight("conv2d")
    node = randomized(start(w))
    alpha = np.asarray(node.u) @ modulator(node).T - np.eye(5)
    series = SeriesAdapter.init(key, w).replace(alpha=jnp.asarray(alpha))
    assert gap(series.merge(w), node.merge(w)) < 1e-5
    assert gap(w, node.merge(w)) > 1e-2


@pytest.mark.parametrize(("inputs", "n"), [(1, 8), (2, 4), (None, 4)])
def test_outputs_of_an_attention_kernel(inputs, n):
    w = weight("attention")
    node = randomized(start(w, n=n, inputs=inputs))
    expected = np.asarray(w).reshape(-1, n) @ np.asarray(node.u) @ modulator(node).T
    assert gap(node.merge(w), expected.reshape(w.shape)) < 1e-5
    assert gap(w, expected.reshape(w.shape)) > 1e-2


# Bases ----------------------------------------------------------------------------


def test_weight_bases_are_left_singular_vectors():
    shapes = {"a": (3, 3, 4, 8), "b": (1, 1, 2, 8)}  # b has fewer inputs than outputs
    shared = {n: {"kernel": jnp.asarray(draw(*s))} for n, s in shapes.items()}
    bases = weight_bases(shared, ".*/kernel")
    assert set(bases) == {"a/kernel", "b/kernel"}
    for name in shapes:
        u = np.asarray(bases[f"{name}/kernel"]["u"], np.float64)
        assert u.dtype == np.float64 and u.shape == (8, 8)
        np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-6)
        matrix = np.asarray(shared[name]["kernel"], np.float64).reshape(-1, 8).T
        left, s, _ = np.linalg.svd(matrix, full_matrices=False)
        signs = np.sign((left * u[:, : len(s)]).sum(axis=0))
        np.testing.assert_allclose(u[:, : len(s)], left * signs, atol=1e-5)
    wide = weight_bases({"q": weight("attention")}, "q", inputs=1)
    assert wide["q"]["u"].shape == (8, 8)


def test_pca_bases_are_the_principal_directions():
    rng = np.random.default_rng(0)
    mixing = np.diag([4.0, 2.0, 1.0, 0.5]) @ np.asarray(orthogonal(4)).T
    y = rng.normal(size=(5000, 4)) @ mixing + 10.0  # a mean that is no direction
    whole = pca_bases({"conv/kernel": y})["conv/kernel"]["u"]
    parts = pca_bases({"conv/kernel": iter(np.array_split(y, 7))})["conv/kernel"]["u"]
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    spread = np.cov((y @ np.asarray(whole)).T)
    np.testing.assert_allclose(np.sqrt(np.diag(spread)), [4, 2, 1, 0.5], rtol=0.05)
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-4
    np.testing.assert_allclose(np.abs(whole.T @ orthogonal(4)), np.eye(4), atol=0.1)
    peaks = np.abs(whole).argmax(axis=0)
    assert (np.asarray(whole)[peaks, range(4)] > 0).all()
    mean = y.mean(axis=0) / np.linalg.norm(y.mean(axis=0))
    assert np.abs(mean @ np.asarray(whole)).max() < 0.99


def test_pca_of_fewer_responses_than_channels_is_still_a_basis():
    u = pca_bases({"k": draw(3, 16)})["k"]["u"]
    np.testing.assert_allclose(u.T @ u, np.eye(16), atol=1e-6)


@pytest.mark.parametrize("make", [weight_bases, None], ids=["weight", "responses"])
def test_from_basis_to_task_file(make, key, tmp_path):
    shared = {"a": {"kernel": weight("conv2d")}, "b": {"kernel": weight("dense")}}
    if make is None:
        bases = pca_bases({"a/kernel": draw(9, 5), "b/kernel": draw(9, 6)})
    else:
        bases = make(shared, ".*/kernel")
    extended = extend(shared, pca=bases)
    delta = make_delta(key, extended, {".*/kernel": RCM.init})
    chex.assert_trees_all_equal(materialize(extended, delta), shared)
    delta["a"]["kernel"] = randomized(delta["a"]["kernel"])
    assert gap(materialize(extended, delta)["a"]["kernel"], weight("conv2d")) > 1e-1
    save_task(tmp_path, Task(delta, {}), shared=extended, name="one")
    found = restore_task(tmp_path, extended).task.delta
    chex.assert_trees_all_equal(found, delta)
    turned = {p: {"u": -b["u"]} for p, b in bases.items()}
    with pytest.raises(ValueError, match="beside the backbone differs"):
        restore_task(tmp_path, extend(shared, pca=turned))


# Refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {}, "no 'pca' beside the backbone.*pca_bases"),
        ({"pca": {"u": jnp.eye(4)}}, {}, r"shape \(4, 4\).*needs \(5, 5\)"),
        ({"pca": {"u": jnp.ones((5, 3))}}, {}, r"shape \(5, 3\).*needs \(5, 5\)"),
        ({"pca": {"u": jnp.eye(5)}}, {"inputs": 4}, "inputs must be"),
    ],
)
def test_init_refuses(key, extra, options, message):
    with pytest.raises(ValueError, match=message):
        RCM.init(key, weight("conv2d"), extra=extra, **options)


def test_other_refusals(key):
    w = weight("conv2d")
    with pytest.raises(ValueError, match="found the shape"):
        RCM.init(key, jnp.ones(5), extra={"pca": {"u": jnp.eye(5)}})
    with pytest.raises(ValueError, match="not filled in; merge through"):
        start(w).replace(u=None).merge(w)
    with pytest.raises(ValueError, match=r"modulator has .*\(5, 5\).*needs \(4, 4\)"):
        start(w).merge(jnp.ones((3, 3, 5, 4)))
    with pytest.raises(ValueError, match=r"'kernal' matches no path.*\[a/kernel\]"):
        weight_bases({"a": {"kernel": w}}, "kernal")
    with pytest.raises(ValueError, match=r"^bias: .*found the shape \(3,\)"):
        weight_bases({"bias": jnp.ones(3)}, "bias")
    refused = partial(pytest.raises, ValueError)
    with refused(match=r"^k: responses need the shape \(n, C_out\), found \(2, 3, 4\)"):
        pca_bases({"k": np.ones((2, 3, 4))})
    with refused(match=r"^k: .*found \(2, 3\) after C_out = 4"):
        pca_bases({"k": [np.ones((2, 4)), np.ones((2, 3))]})
    with refused(match="^k: no responses, found 0 rows"):
        pca_bases({"k": []})
    with refused(match="^k: the responses have NaN or infinity"):
        pca_bases({"k": np.full((2, 3), np.nan)})
