"""Residual adapters: the branches of the papers are the merged kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax import make_delta, materialize
from ftn_jax.nodes import Replace
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter, fold_inner_bn

from .convolution import ONES, conv, draw, gap

# Parallel -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=["even", "odd"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": ONES}),
        ((3, 3), {"padding": ONES, "stride": 2}),
        ((3, 3), {"padding": ((2, 2), (2, 2)), "stride": 2, "dilation": 2}),
        ((5, 5), {"padding": ((2, 2), (2, 2))}),
        ((1, 3), {"padding": ((0, 0), (1, 1)), "stride": 2}),
        ((1, 1), {"stride": 2}),
        ((3, 3), {"padding": ONES, "stride": 2, "groups": 2}),
        ((3, 3), {"padding": ONES, "groups": 4}),
    ],
    ids="plain stride dilation 5x5 1x3 1x1 groups depthwise".split(),
)
def test_parallel_branch_is_one_convolution(kernel, options, size, key):
    groups = options.get("groups", 1)
    w, x = jnp.asarray(draw(*kernel, 4 // groups, 8)), draw(2, *size, 4, seed=1)
    node = randomized(ParallelAdapter.init(key, w))
    branch = {k: v for k, v in options.items() if k in ("stride", "groups")}
    trunk = conv(x, w, **options)
    expected = trunk + conv(x, np.asarray(node.alpha)[None, None], **branch)
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(trunk, expected) > 1e-2


def test_parallel_branch_beside_reflected_pixels(key):
    """The case that peft 0.21's adapters get wrong: the centre sees real pixels."""
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 6, 4, seed=1)
    node = randomized(ParallelAdapter.init(key, w))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = conv(padded, w) + conv(x, np.asarray(node.alpha)[None, None])
    assert gap(conv(padded, node.merge(w)), expected) < 1e-5
    assert gap(conv(padded, w), expected) > 1e-2


@pytest.mark.parametrize(("size", "tap"), [((8, 8), (0, 0)), ((9, 7), (1, 1))])
def test_trap_4_same_padding_at_stride_2_moves_the_tap(size, tap, key):
    """On even sides Flax pads (0, 1), and a 1x1 convolution is not the centre tap."""
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, *size, 4, seed=1)
    same = {"stride": 2, "padding": "SAME"}
    given = randomized(ParallelAdapter.init(key, w, tap=tap))
    other = randomized(ParallelAdapter.init(key, w, tap=(1 - tap[0], 1 - tap[1])))
    branch = np.asarray(given.alpha)[None, None]
    expected = conv(x, w, **same) + conv(x, branch, **same)
    assert gap(conv(x, given.merge(w), **same), expected) < 1e-5
    assert gap(conv(x, other.merge(w), **same), expected) > 1e-1
    assert ParallelAdapter.init(key, w).tap == (1, 1)


@pytest.mark.parametrize(
    ("shape", "tap"),
    [
        ((4, 6), ()),
        ((5, 4, 6), (2,)),
        ((3, 1, 4, 6), (1, 0)),
        ((7, 7, 3, 64), (3, 3)),
        ((1, 3, 5, 2, 2), (0, 1, 2)),
    ],
)
def test_parallel_takes_the_centre(key, shape, tap):
    node = ParallelAdapter.init(key, jnp.zeros(shape))
    assert node.tap == tap and node.alpha.shape == shape[-2:]
    merged = randomized(node).merge(jnp.zeros(shape))
    assert (merged[tap] == randomized(node).alpha).all()
    assert (merged != 0).sum() == shape[-1] * shape[-2]


def test_parallel_leaves_other_taps_bit_equal(key):
    w = weight("conv2d", jnp.bfloat16)
    merged = randomized(ParallelAdapter.init(key, w)).merge(w)
    others = jnp.ones((3, 3), bool).at[1, 1].set(False)
    np.testing.assert_array_equal(merged[others], w[others])
    assert (merged[1, 1] != w[1, 1]).any()


# Series ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": ONES, "stride": 2},
        {"padding": "SAME", "dilation": 2},
    ],
    ids=["plain", "stride", "dilation"],
)
def test_series_branch_is_one_convolution(options, key):
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 7, 4, seed=1)
    node = randomized(SeriesAdapter.init(key, w))
    z = conv(x, w, **options)
    expected = z + conv(z, np.asarray(node.alpha)[None, None])
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(z, expected) > 1e-2


def test_series_fits_a_grouped_kernel_only_within_groups(key):
    """What the docstring warns of: a full alpha is no convolution after groups."""
    w, x = jnp.asarray(draw(3, 3, 2, 8)), draw(2, 8, 7, 4, seed=1)
    node = randomized(SeriesAdapter.init(key, w))
    within = np.kron(np.eye(2), np.ones((4, 4)))
    z = conv(x, w, groups=2)
    for mask, fits in ((within, True), (np.ones((8, 8)), False)):
        masked = node.replace(alpha=node.alpha * jnp.asarray(mask, jnp.float32))
        expected = z + conv(z, np.asarray(masked.alpha)[None, None])
        assert (gap(conv(x, masked.merge(w), groups=2), expected) < 1e-5) == fits
        assert gap(z, expected) > 1e-2


@pytest.mark.parametrize(("inputs", "n"), [(None, 4), (2, 4), (1, 8)])
def test_series_over_the_outputs_of_attention(key, inputs, n):
    w = weight("attention")  # (d_model, heads, head_dim)
    node = randomized(SeriesAdapter.init(key, w, inputs=inputs))
    assert node.alpha.shape == (n, n)
    x = draw(3, 6)
    q = np.tensordot(x, w, axes=1)
    mixed = (q.reshape(-1, n) @ np.asarray(node.alpha)).reshape(q.shape)
    assert gap(np.tensordot(x, node.merge(w), axes=1), q + mixed) < 1e-5
    assert gap(q, q + mixed) > 1e-2


def test_series_after_a_bias_needs_the_bias_replaced(key):
    w, b, x = weight("dense"), jnp.asarray(draw(6, seed=2)), draw(3, 4)
    shared = {"kernel": w, "bias": b}
    rules = {"kernel": SeriesAdapter.init, "bias": Replace.init}
    delta = make_delta(key, shared, rules)
    delta["kernel"] = randomized(delta["kernel"])
    z = x @ np.asarray(w) + np.asarray(b)
    expected = z + z @ np.asarray(delta["kernel"].alpha)

    def run(delta):
        kernel, bias = (np.asarray(materialize(shared, delta)[n]) for n in shared)
        return x @ kernel + bias

    assert gap(run(delta), expected) > 1e-2
    shift = b @ delta["kernel"].alpha
    delta["bias"] = delta["bias"].replace(value=b + shift)
    assert gap(run(delta), expected) < 1e-5


def inner_bn(seed=3):
    rng = np.random.default_rng(seed)
    arrays = {n: rng.normal(size=8) for n in ("scale", "bias", "mean")}
    arrays["var"] = rng.uniform(0.5, 2, size=8)
    return {n: np.float32(x) for n, x in arrays.items()}


def normalize(z, bn, epsilon=1e-5):
    sd = np.sqrt(bn["var"] + epsilon)
    return (z - bn["mean"]) / sd * bn["scale"] + bn["bias"]


def test_inner_batch_norm_folds_in_evaluation(key):
    w, x = jnp.asarray(draw(3, 3, 4, 8)), draw(2, 8, 7, 4, seed=1)
    node = randomized(SeriesAdapter.init(key, w))
    bn, outer = inner_bn(), inner_bn(seed=4)
    z = conv(x, w, stride=2, padding=ONES)
    branch = normalize(z, bn) @ np.asarray(node.alpha)
    folded = fold_inner_bn(node, **bn)
    shift = np.asarray(folded.shift)
    y = conv(x, folded.node.merge(w), stride=2, padding=ONES)
    assert gap(y + shift, z + branch) < 1e-5
    assert gap(y, z + branch) > 1e-2  # the shift counts
    # As the running mean of the norm that follows.
    after = normalize(y, outer | {"mean": outer["mean"] - shift})
    assert gap(after, normalize(z + branch, outer)) < 1e-5
    # In training the statistics are the batch's: no fold does that.
    batch = bn | {"mean": z.mean((0, 1, 2)), "var": z.var((0, 1, 2))}
    trained = normalize(z, batch) @ np.asarray(node.alpha)
    assert gap(y + shift, z + trained) > 1e-2
    assert folded.node.group == node.group and folded.node.inputs is None


def test_fold_refuses_arrays_of_another_size(key):
    node = SeriesAdapter.init(key, jnp.ones((3, 3, 4, 8)))
    bn = inner_bn() | {"mean": np.zeros(4)}
    with pytest.raises(ValueError, match=r"mean has the shape \(4,\), alpha .*\(8,\)"):
        fold_inner_bn(node, **bn)


# Parity with the modules as PyTorch runs them ---------------------------------------


@pytest.mark.parametrize("kind", ["parallel", "series"])
def test_parity_with_pytorch_modules(kind, key):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    trunk = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 10, 8)
    bn = torch.nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        for p in (bn.weight, bn.bias, bn.running_mean):
            p.normal_()
        bn.running_var.uniform_(0.5, 2)
        z = trunk(x)
        if kind == "parallel":
            adapter = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False)
            expected = z + adapter(x)
        else:
            adapter = torch.nn.Conv2d(8, 8, 1, bias=False)
            expected = z + adapter(bn(z))
    w, alpha = (
        jnp.asarray(c.weight.detach().numpy().transpose(2, 3, 1, 0))
        for c in (trunk, adapter)
    )
    shift = 0.0
    if kind == "parallel":
        node = ParallelAdapter.init(key, w).replace(alpha=alpha[0, 0])
    else:
        node = SeriesAdapter.init(key, w).replace(alpha=alpha[0, 0])
        names = {"scale": "weight", "bias": "bias"}
        names |= {"mean": "running_mean", "var": "running_var"}
        given = {n: getattr(bn, t).detach().numpy() for n, t in names.items()}
        node, shift = fold_inner_bn(node, **given)
    nhwc = lambda t: t.numpy().transpose(0, 2, 3, 1)  # noqa: E731
    found = conv(nhwc(x), node.merge(w), stride=2, padding=ONES) + np.asarray(shift)
    assert gap(found, nhwc(expected)) < 1e-5
    assert gap(nhwc(z), nhwc(expected)) > 1e-2
