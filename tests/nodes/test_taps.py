"""TAPS: its score, its penalty, and what is left of it in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from ftn_jax.models import RESNETS
from ftn_jax.nodes.replace import Replace
from ftn_jax.nodes.taps import TAPS, active, sparsity

CONVS = {
    "stride 1": (1, "SAME"),
    "stride 2, torch's padding": (2, [(1, 1), (1, 1)]),
    "explicit": (1, [(0, 2), (1, 0)]),
}


def conv(x, w, stride, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers
    )


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def node(shape, score, seed=0):
    return TAPS(draw(shape, seed), jnp.float32(score))


@pytest.mark.parametrize("how", CONVS)
def test_an_active_layer_adds_a_second_convolution(how):
    w, x = weight("conv2d"), draw((2, 7, 6, 4))
    own = node(w.shape, 0.1, 1)  # the threshold itself is active
    frozen = conv(x, w, *CONVS[how])
    expected = frozen + conv(x, own.change, *CONVS[how])
    size = np.abs(expected).max()
    found = conv(x, own.merge(w), *CONVS[how])
    np.testing.assert_allclose(found, expected, atol=1e-5 * size, rtol=0)
    assert np.abs(expected - frozen).max() > 1e-2 * size
    off = own.replace(score=jnp.float32(np.nextafter(np.float32(0.1), 0)))
    np.testing.assert_array_equal(off.merge(w), w)


@pytest.mark.parametrize("score", [0.15, 0.05])
def test_gradients_go_straight_through_the_threshold(score):
    w, pull = weight("conv2d"), draw((3, 3, 4, 5), 2)
    own = node(w.shape, score, 1)
    found = jax.jit(jax.grad(lambda n: (n.merge(w) * pull).sum()))(own)
    expected = (np.asarray(pull) * np.asarray(own.change)).sum()
    np.testing.assert_allclose(found.score, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.change, np.asarray(pull) * (score > 0.1))


def test_the_score_has_no_gradient_while_the_change_is_zero(key):
    w = weight("dense")
    start = TAPS.init(key, w)
    assert start.score == np.float32(0.15) and (start.change == 0).all()
    loss = jax.jit(jax.grad(lambda n: (n.merge(w) ** 2).sum()))
    first = loss(start)
    assert first.score == 0 and (first.change != 0).all()
    assert loss(start.replace(change=start.change - 0.1 * first.change)).score != 0


def test_a_layer_that_falls_asleep_keeps_its_change_and_comes_back():
    w = weight("dense")
    awake = node(w.shape, 0.11)
    asleep = awake.replace(score=awake.score - 0.05)
    np.testing.assert_array_equal(asleep.merge(w), w)
    again = asleep.replace(score=asleep.score + 0.05)
    np.testing.assert_array_equal(again.merge(w), awake.merge(w))
    assert np.abs(again.merge(w) - w).max() > 0.1


def some(*scores):
    """A delta of one layer for each score, and nodes of another type."""
    layers = {f"conv{n}": node((2, 3), s, n) for n, s in enumerate(scores)}
    return {"head": Replace(jnp.ones(3)), "layers": layers, "none": None}


def test_sparsity_is_the_mean_of_the_scores_sizes():
    delta = some(0.15, 0.05, -0.4)
    found, pull = jax.jit(jax.value_and_grad(sparsity))(delta, 0.3)
    np.testing.assert_allclose(found, 0.3 * (0.15 + 0.05 + 0.4) / 3, rtol=1e-6)
    pulls = [n.score for n in pull["layers"].values()]
    np.testing.assert_allclose(pulls, [0.1, 0.1, -0.1], rtol=1e-6)
    assert all((n.change == 0).all() for n in pull["layers"].values())


def test_active_lists_the_layers_of_the_tasks_own():
    delta = some(0.15, 0.05, 0.1, -0.4)
    assert active(delta) == ["layers/conv0", "layers/conv2"]
    assert active(compact(delta)) == ["layers/conv0", "layers/conv2"]
    assert active({"a": None}) == []


def test_sparsity_refuses_a_delta_without_scores():
    for delta in ({"a": Replace(jnp.ones(2))}, compact(some(0.15))):
        with pytest.raises(ValueError, match="no TAPS node with a score"):
            sparsity(delta, 1.0)


@pytest.mark.parametrize("score", [0.05, float("nan")])
def test_init_refuses_a_start_that_never_learns(key, score):
    with pytest.raises(ValueError, match="score >= threshold, found score="):
        TAPS.init(key, weight("dense"), score=score)


def test_merge_names_both_shapes_of_a_misfit():
    for own in (node((4, 6), 0.15), node((4, 6), 0.15).compact()):
        with pytest.raises(ValueError, match=r"shape \(4, 6\), the weight \(6,\)"):
            own.merge(jnp.ones(6))


def test_compact_drops_sleeping_layers_and_merges_alike(tmp_path):
    scores = {"a": 0.2, "b": 0.0, "c": 0.1}
    shared = {n: draw((3, 3, 4, 5), ord(n)) for n in scores}
    delta = {n: node((3, 3, 4, 5), s) for n, s in scores.items()}
    small = compact(delta)
    assert small["b"] is None and small["a"].score is None
    assert count(delta).bytes == 3 * (720 + 4) and count(small).bytes == 2 * 720
    params = materialize(shared, delta)
    save_task(tmp_path, Task(small, {}), shared=shared, name="small")
    found = restore_task(tmp_path, shared).task.delta
    assert compact(found)["a"] is found["a"]
    jax.tree.map(np.testing.assert_array_equal, materialize(shared, found), params)
    assert np.abs(params["a"] - shared["a"]).max() > 0.1
    np.testing.assert_array_equal(params["b"], shared["b"])


@pytest.mark.parametrize(
    ("name", "scores", "weights"),
    [("resnet50", 53, 23_454_912), ("resnet34", 36, 21_267_648)],
)
def test_counts_of_resnets_and_the_52_of_the_released_penalty(
    key, name, scores, weights
):
    """The papers' 4.12x and 4.90x are outcomes of training; these are the parts."""
    model = RESNETS[name](num_classes=None)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shared = jax.eval_shape(model.init, key, x)["params"]
    delta = jax.eval_shape(
        lambda k: make_delta(k, shared, {".*/kernel": TAPS.init}), key
    )
    found = count(delta)
    assert len(found.by_path) == scores and found.total == weights + scores
    start = [TAPS(jnp.zeros(1), jnp.float32(0.15))] * scores
    ours = float(sparsity(start, 1.0))
    theirs = scores * 0.15 / 52
    np.testing.assert_allclose(ours, 0.15, rtol=1e-6)
    np.testing.assert_allclose(ours * scores / 52, theirs, rtol=1e-6)
    assert abs(ours - theirs) > 1e-3
