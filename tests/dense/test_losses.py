"""Losses of dense tasks against plain arithmetic, and where truth is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.dense import cross_entropy, depth_l1, edge_cross_entropy, normals_l1

LOSSES = {
    "semseg": (cross_entropy, 5),
    "depth": (depth_l1, 1),
    "normals": (normals_l1, 3),
    "edge": (edge_cross_entropy, 1),
}


def batch(shape=(2, 3, 4), seed=0):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(*shape, 3))
    return {
        "image": np.zeros((*shape, 3), np.float32),
        "semseg": rng.integers(0, 5, shape),
        "depth": rng.uniform(1, 5, shape).astype(np.float32),
        "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(
            np.float32
        ),
        "edge": rng.integers(0, 2, shape).astype(np.float32),
    }


def outputs(channels, shape=(2, 3, 4), seed=1):
    return np.random.default_rng(seed).normal(size=(*shape, channels))


def mean(sums):
    return float(sums["loss"] / sums["count"])


def test_cross_entropy_by_hand():
    b, out = batch(), outputs(5)
    b["semseg"][0, 0] = 255
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    valid = b["semseg"] != 255
    picked = np.take_along_axis(log_p, np.where(valid, b["semseg"], 0)[..., None], -1)
    expected = -picked[..., 0][valid].mean()
    assert mean(cross_entropy(out, b)) == pytest.approx(expected, rel=1e-5)
    assert mean(cross_entropy(out, b, weight=3)) == pytest.approx(
        3 * expected, rel=1e-5
    )


def test_forty_classes_ignore_the_background():
    b, out = batch(), outputs(40)
    b["semseg"] = np.asarray(b["semseg"]) * 10  # 0, 10, ..., 40
    shifted = b | {"semseg": np.where(b["semseg"] == 0, 255, b["semseg"] - 1)}
    wide = np.concatenate([out, np.full((*out.shape[:-1], 1), -1e9)], axis=-1)
    assert mean(cross_entropy(out, b)) == pytest.approx(
        mean(cross_entropy(wide, shifted)), rel=1e-5
    )
    assert float(cross_entropy(out, b)["count"]) == (b["semseg"] != 0).sum()


def test_depth_by_hand_without_zeros_and_nan():
    b, out = batch(), outputs(1)
    b["depth"][0, 0, :2] = (0, np.nan)
    valid = np.nan_to_num(b["depth"]) != 0
    expected = np.abs(out[..., 0] - b["depth"])[valid].mean()
    assert mean(depth_l1(out, b)) == pytest.approx(expected, rel=1e-5)


def test_normals_by_hand():
    b, out = batch(), outputs(3)
    b["normals"][0, 1] = 0
    b["normals"][0, 2, 0] = np.nan
    valid = np.isfinite(b["normals"]).all(-1) & (b["normals"] != 0).any(-1)
    unit = out / np.linalg.norm(out, axis=-1, keepdims=True)
    expected = 10 * np.abs(unit - b["normals"])[valid].mean()
    assert mean(normals_l1(out, b)) == pytest.approx(expected, rel=1e-5)


def test_edges_by_hand():
    b, out = batch(), outputs(1)
    b["edge"][1, 0] = 255
    b["edge"][1, 1] = (0.5, 0.49, 1.0, 1.2)
    x, y = out[..., 0], b["edge"] >= 0.5
    losses = np.where(y, 0.95, 0.05) * np.log1p(np.exp(np.where(y, -x, x)))
    expected = 50 * losses[b["edge"] <= 1.1].mean()
    assert mean(edge_cross_entropy(out, b)) == pytest.approx(expected, rel=1e-5)
    other = mean(edge_cross_entropy(out, b, positive=0.8))
    assert abs(other - expected) > 0.1


@pytest.mark.parametrize("task", LOSSES)
def test_masked_examples_do_not_count(task):
    loss, channels = LOSSES[task]
    b, out = batch(), outputs(channels)
    first = {name: array[:1] for name, array in b.items()}
    masked = loss(out, b | {"mask": np.asarray([1.0, 0.0])})
    assert mean(masked) == pytest.approx(mean(loss(out[:1], first)), rel=1e-5)
    assert abs(mean(masked) - mean(loss(out, b))) > 1e-3


@pytest.mark.parametrize("task", LOSSES)
def test_without_any_truth_loss_and_gradient_are_zero(task):
    loss, channels = LOSSES[task]
    b = batch()
    nothing = {"semseg": 255, "edge": 255.0, "depth": np.nan, "normals": 0.0}[task]
    empty = b | {task: np.full_like(b[task], nothing)}
    out = jnp.asarray(outputs(channels), jnp.float32).at[0].set(0)

    def value(x, b):
        return loss(x, b)["loss"]

    assert float(loss(out, empty)["count"]) == 0
    assert float(value(out, empty)) == 0
    assert not np.any(jax.grad(value)(out, empty))
    gradient = jax.grad(value)(out, b)
    assert np.isfinite(gradient).all() and np.any(gradient)
