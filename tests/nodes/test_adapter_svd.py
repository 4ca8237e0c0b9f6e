"""Adapters as thin products: their branches, ranks, starts, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import randomized, weight

from ftn_jax.nodes.adapter_svd import FactoredAdapter, SharedBasisAdapter, resolve_rank

from .convolution import ONES, conv, draw, gap


@pytest.mark.parametrize("stride", [1, 2])
def test_thin_branch_is_one_convolution(stride, key):
    w, x = weight("conv2d"), draw(2, 8, 7, 4)
    node = randomized(FactoredAdapter.init(key, w, rank=2))
    options = {"stride": stride, "padding": ONES}
    inner = conv(x, node.beta[None, None], stride=stride)
    expected = conv(x, w, **options) + conv(inner, node.gamma[None, None])
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(conv(x, w, **options), expected) > 1e-2


def test_shared_basis_is_the_factored_adapter_with_that_beta(key):
    w = weight("conv2d")
    beta = jnp.asarray(draw(4, 2))
    node = SharedBasisAdapter.init(key, w, extra={"adapter_basis": {"beta": beta}})
    assert node.gamma.shape == (2, 5) and node.beta is None and not node.gamma.any()
    full = randomized(node).replace(beta=beta)
    same = FactoredAdapter(beta, full.gamma, tap=(1, 1))
    np.testing.assert_array_equal(full.merge(w), same.merge(w))
    assert gap(full.merge(w), w) > 1e-2


def test_zeroing_both_factors_would_kill_the_gradient(key):
    w = weight("conv2d")
    node = FactoredAdapter.init(key, w, rank=2)
    assert node.beta.any() and not node.gamma.any()
    loss = jax.grad(lambda n: (n.merge(w) ** 2).sum())
    assert np.abs(loss(node).gamma).max() > 1e-3
    dead = loss(jax.tree.map(jnp.zeros_like, node))
    assert not any(x.any() for x in jax.tree.leaves(dead))


@pytest.mark.parametrize(
    ("rank", "limit", "k"),
    [(1, 8, 1), (8, 8, 8), (9, 8, 8), (np.int64(3), 8, 3)]
    + [(0.5, 8, 4), (0.5, 3, 1), (0.1, 3, 1), (1.0, 3, 3), (np.float32(0.5), 8, 4)],
)
def test_rank_as_a_number_or_a_share(rank, limit, k):
    assert resolve_rank(rank, limit) == k


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "2", None, float("nan")])
def test_bad_ranks(rank, key):
    message = "integer >= 1 or a share in .0, 1., found"
    with pytest.raises(ValueError, match=message):
        FactoredAdapter.init(key, weight("conv2d"), rank=rank)


def test_a_depthwise_kernel_takes_any_rank(key):
    """peft issue 2202: there, the rank must divide by the groups."""
    w, x = weight("depthwise"), draw(2, 6, 6, 6)
    node = randomized(FactoredAdapter.init(key, w, rank=4))
    assert node.beta.shape == (1, 1)
    branch = (node.beta @ node.gamma)[None, None]
    options = {"padding": ONES, "groups": 6}
    expected = conv(x, w, **options) + conv(x, branch, groups=6)
    assert gap(conv(x, node.merge(w), **options), expected) < 1e-5
    assert gap(conv(x, w, **options), expected) > 1e-2


def test_shared_basis_refuses_a_missing_or_misfit_basis(key):
    init = partial(SharedBasisAdapter.init, key, weight("conv2d"))
    with pytest.raises(ValueError, match="no 'adapter_basis' beside the backbone"):
        init(extra={})
    misfit = {"adapter_basis": {"beta": jnp.ones((5, 2))}}
    with pytest.raises(ValueError, match=r"\(5, 2\).*needs \(4, K\)"):
        init(extra=misfit)
    node = init(extra={"adapter_basis": {"beta": jnp.ones((4, 2))}})
    with pytest.raises(ValueError, match="not filled in; merge through"):
        node.merge(weight("conv2d"))
