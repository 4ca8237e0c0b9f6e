"""Trained adapters compressed by SVD, one task's or several tasks' together."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import weight

from ftn_jax import (
    Extended,
    Task,
    count,
    extend,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.compress import (
    compress_jointly,
    factor_adapters,
    joint_bases,
    share_adapters,
)
from ftn_jax.nodes import Replace
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_svd import SharedBasisAdapter, resolve_rank

from .convolution import draw, gap

SHAPES = {"stem": (3, 3, 3, 16), "wide": (3, 3, 8, 16), "square": (1, 1, 8, 8)}
RULES = {
    ".*/kernel": partial(ParallelAdapter.init, init="normal"),
    ".*/bias": Replace.init,
}


@pytest.fixture(scope="module")
def shared():
    tree = {n: {"kernel": jnp.asarray(draw(*s))} for n, s in SHAPES.items()}
    tree["square"]["bias"] = jnp.ones(8)
    return tree


@pytest.fixture(scope="module")
def deltas(shared):
    return [make_delta(jax.random.key(t), shared, RULES) for t in range(3)]


def alphas(shared, delta):
    """What the adapters add, read off the merged centre taps."""
    params = materialize(shared, delta)
    base = shared.params if isinstance(shared, Extended) else shared
    return {
        n: np.asarray(params[n]["kernel"] - base[n]["kernel"], np.float64)[
            s[0] // 2, s[1] // 2
        ]
        for n, s in SHAPES.items()
    }


# One task by itself ---------------------------------------------------------------


def test_factoring_at_full_rank_changes_nothing(shared, deltas):
    found = factor_adapters(deltas[0], rank=1.0)
    assert set(found.errors) == {f"{n}/kernel" for n in SHAPES}
    assert max(found.errors.values()) < 1e-6
    before, after = (alphas(shared, d) for d in (deltas[0], found.delta))
    for name in SHAPES:
        assert gap(after[name], before[name]) < 1e-5
    assert found.delta["square"]["bias"] is deltas[0]["square"]["bias"]


@pytest.mark.parametrize("rank", [1, 4, 0.5])
def test_factoring_keeps_the_largest_singular_values(shared, deltas, rank):
    found = factor_adapters(deltas[0], rank=rank)
    after = alphas(shared, found.delta)
    for name, (*_, c_in, c_out) in SHAPES.items():
        k = resolve_rank(rank, min(c_in, c_out))
        node = found.delta[name]["kernel"]
        assert node.beta.shape == (c_in, k) and node.gamma.shape == (k, c_out)
        alpha = np.asarray(deltas[0][name]["kernel"].alpha, np.float64)
        u, s, vt = np.linalg.svd(alpha, full_matrices=False)
        best = (u[:, :k] * s[:k]) @ vt[:k]
        np.testing.assert_allclose(after[name], best, atol=1e-5)
        lost = np.sqrt((s[k:] ** 2).sum() / (s**2).sum())
        assert abs(found.errors[f"{name}/kernel"] - lost) < 1e-6
        norms = [np.linalg.norm(np.asarray(x)) for x in (node.beta, node.gamma)]
        assert abs(norms[0] / norms[1] - 1) < 1e-4
    assert found.errors["square/kernel"] > 1e-2


def test_factoring_keeps_tap_and_group(key):
    w = weight("conv2d")
    node = ParallelAdapter.init(key, w, init="normal", tap=(0, 2), group="slow")
    (found,) = factor_adapters([node], rank=2).delta
    assert (found.tap, found.group) == ((0, 2), "slow")
    assert factor_adapters([node.replace(alpha=0 * node.alpha)], rank=1).errors == {
        "0": 0.0
    }


# Several tasks together -----------------------------------------------------------


def test_joint_compression_at_full_rank_changes_nothing(shared, deltas):
    found = compress_jointly(shared, deltas, rank=1.0)
    assert found.shared.extras["adapter_basis"]["wide/kernel"]["beta"].shape == (8, 8)
    for old, new, errors in zip(deltas, found.deltas, found.errors, strict=True):
        assert max(errors.values()) < 1e-6
        before, after = alphas(shared, old), alphas(found.shared, new)
        for name in SHAPES:
            assert gap(after[name], before[name]) < 1e-5
    tasks = [alphas(found.shared, d)["wide"] for d in found.deltas]
    assert gap(tasks[0], tasks[1]) > 1e-1


def test_joint_compression_is_the_svd_of_all_tasks_side_by_side(shared, deltas):
    found = compress_jointly(shared, deltas, rank=0.5)
    for name, (*_, c_in, _) in SHAPES.items():
        k = max(c_in // 2, 1)
        stack = np.concatenate([d[name]["kernel"].alpha for d in deltas], axis=1)
        u, s, vt = np.linalg.svd(np.float64(stack), full_matrices=False)
        beta = found.shared.extras["adapter_basis"][f"{name}/kernel"]["beta"]
        assert beta.shape == (c_in, k)
        np.testing.assert_allclose(np.abs(beta), np.abs(u[:, :k] * s[:k]), atol=1e-4)
        best = (u[:, :k] * s[:k]) @ vt[:k]
        merged = [alphas(found.shared, d)[name] for d in found.deltas]
        np.testing.assert_allclose(np.concatenate(merged, axis=1), best, atol=1e-4)
        lost = [
            np.linalg.norm(m - a) / np.linalg.norm(a)
            for m, a in zip(merged, np.split(stack, 3, axis=1), strict=True)
        ]
        given = [e[f"{name}/kernel"] for e in found.errors]
        np.testing.assert_allclose(given, lost, atol=1e-4)
        assert min(given) > 1e-2


def test_integer_ranks_reach_beyond_the_outputs(key):
    """C_in > C_out: all K there are is min(C_in, T C_out)."""
    shared = {"w": jnp.zeros((12, 4))}
    rules = {"w": partial(ParallelAdapter.init, init="normal")}
    deltas = [make_delta(jax.random.key(t), shared, rules) for t in range(2)]
    whole, cut = (compress_jointly(shared, deltas, rank=k) for k in (12, 1.0))
    assert whole.shared.extras["adapter_basis"]["w"]["beta"].shape == (12, 8)
    assert cut.shared.extras["adapter_basis"]["w"]["beta"].shape == (12, 4)
    assert max(e["w"] for e in whole.errors) < 1e-6 < 1e-2 < cut.errors[0]["w"]


def test_a_new_task_reuses_the_basis(shared, deltas):
    found = compress_jointly(shared, deltas[:2], rank=0.5)
    late = share_adapters(found.shared, deltas[2])
    merged = alphas(found.shared, late.delta)
    for name in SHAPES:
        alpha = np.asarray(deltas[2][name]["kernel"].alpha, np.float64)
        beta = found.shared.extras["adapter_basis"][f"{name}/kernel"]["beta"]
        q, _ = np.linalg.qr(np.asarray(beta, np.float64))
        projected = q @ (q.T @ alpha)  # the nearest matrix with these columns
        np.testing.assert_allclose(merged[name], projected, atol=1e-5)
        error = late.errors[f"{name}/kernel"]
        expected = np.linalg.norm(projected - alpha) / np.linalg.norm(alpha)
        assert abs(error - expected) < 1e-5 and error > 1e-2
    rules = {".*/kernel": SharedBasisAdapter.init}
    fresh = make_delta(jax.random.key(9), found.shared, rules)
    chex.assert_trees_all_equal_structs(
        fresh["wide"]["kernel"], late.delta["wide"]["kernel"]
    )
    chex.assert_trees_all_equal(materialize(found.shared, fresh), shared)


def test_factored_adapters_compress_further(shared, deltas):
    thin = [factor_adapters(d, rank=2).delta for d in deltas]
    found = compress_jointly(shared, thin, rank=6)
    assert all(max(e.values()) < 1e-6 for e in found.errors)
    assert found.shared.extras["adapter_basis"]["wide/kernel"]["beta"].shape[1] == 6
    again = factor_adapters(thin[0], rank=1)
    assert again.errors["wide/kernel"] > 1e-2


def test_directions_below_rounding_are_not_reached_for(shared):
    """Tasks of one common direction: a new task's gamma must not explode."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(8, 1))
    node = ParallelAdapter(jnp.zeros((8, 16)), tap=(1, 1))
    tasks = [
        {"wide": node.replace(alpha=jnp.asarray(line @ rng.normal(size=(1, 16))))}
        for _ in range(3)
    ]
    base = {"wide": shared["wide"]["kernel"]}
    found = compress_jointly(base, tasks, rank=1.0)
    assert max(e["wide"] for e in found.errors) < 1e-6
    late = share_adapters(found.shared, {"wide": node.replace(alpha=jnp.ones((8, 16)))})
    assert np.abs(late.delta["wide"].gamma).max() < 10


def test_saved_with_the_basis_and_refused_with_another(shared, deltas, tmp_path):
    found = compress_jointly(shared, deltas, rank=0.5)
    delta = found.deltas[1]
    save_task(tmp_path, Task(delta, {}), shared=found.shared, name="one")
    chex.assert_trees_all_equal(restore_task(tmp_path, found.shared).task.delta, delta)
    other = compress_jointly(shared, deltas[:2], rank=0.5).shared
    with pytest.raises(ValueError, match="beside the backbone differs"):
        restore_task(tmp_path, other)


def test_counts_of_a_compressed_task(shared, deltas):
    full, thin = deltas[0], compress_jointly(shared, deltas, rank=0.5).deltas[0]
    assert count(full).by_group["adapters"] == 3 * 16 + 8 * 16 + 8 * 8
    assert count(thin).by_group["adapters"] == 1 * 16 + 4 * 16 + 4 * 8


def test_compression_refuses(shared, deltas):
    bare = make_delta(jax.random.key(0), shared, {".*/bias": Replace.init})
    with pytest.raises(ValueError, match="no ParallelAdapter or FactoredAdapter"):
        factor_adapters(bare, rank=1)
    with pytest.raises(ValueError, match="none of the 2 deltas has a ParallelAdapter"):
        joint_bases([bare, bare], rank=1)
    with pytest.raises(ValueError, match="rank must be"):
        joint_bases(deltas, rank=0)
    other = {"stem": {"kernel": ParallelAdapter(jnp.ones((3, 8)), tap=(1, 1))}}
    with pytest.raises(
        ValueError, match=r"stem/kernel: .*one shape, found \[\(3, 16\)"
    ):
        joint_bases([deltas[0], other], rank=1)
    few = extend(shared, adapter_basis={"stem/kernel": {"beta": jnp.ones((3, 1))}})
    with pytest.raises(
        ValueError, match=r"square/kernel: .*found None .*\[stem/kernel"
    ):
        share_adapters(few, deltas[0])
    with pytest.raises(ValueError, match="already has .'adapter_basis'. beside it"):
        compress_jointly(few, deltas, rank=1)
