"""KAdaptation: slow weights in common, its forward, count, dropout, dead starts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas.lowrank import kronecker_formula
from weights import randomized, weight

from ftn_jax import (
    Task,
    compact,
    count,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import complete, iter_nodes, perturb
from ftn_jax.nodes.kronecker import Kronecker
from ftn_jax.nodes.replace import Replace

SMALL = partial(Kronecker.init, n=2, inputs=1, slow_bound=0.5, scale=2.0)


# One program for each shape, where eager merges would compile every operation.
merge = jax.jit(lambda node, w: node.merge(w))


def drawn(init, w, **options):
    """A node with all arrays random, none zero."""
    start = partial(init, **options)
    return randomized(jax.eval_shape(start, jax.random.key(0), w))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attention(layers=3):
    """Query and value kernels (6, 2, 4), one (8, 10) of another shape."""
    shared = {
        f"blocks_{i}": {
            name: {"kernel": jnp.asarray(draw(6, 2, 4, seed=2 * i + n))}
            for n, name in enumerate(("query", "value"))
        }
        for i in range(layers)
    }
    return {**shared, "wide": {"kernel": jnp.asarray(draw(8, 10))}}


RULES = {
    "(blocks_.*/query|wide)/kernel": partial(SMALL, share="query"),
    ".*/value/kernel": partial(SMALL, share="value"),
}


def every(shared, rules):
    """A delta with every array random, none zero."""
    rng = np.random.default_rng(0)
    delta = jax.eval_shape(
        lambda k, s: make_delta(k, s, rules), jax.random.key(0), shared
    )
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


@pytest.fixture(scope="module")
def shared():
    return attention()


@pytest.fixture(scope="module")
def delta(shared):
    return every(shared, RULES)


# The update -----------------------------------------------------------------------


def test_forward_term_by_term():
    """Mix blocks of x by A_i, and what is inside a block by u_i v_i."""
    w, x = weight("attention"), draw(3, 6)
    node = drawn(SMALL, w, rank=2)
    (a, b), u, v = (np.array(n) for n in node.slow), *map(np.array, (node.u, node.v))
    blocks = x.reshape(3, 2, 3)
    branch = sum(
        np.einsum("zk,c->zck", blocks.transpose(0, 2, 1) @ a[i], b[i]) @ (u[i] @ v[i])
        for i in range(2)
    )
    frozen = np.einsum("zd,dhe->zhe", x, w)
    expected = frozen + 2.0 * branch.reshape(3, 2, 4)
    found = np.einsum("zd,dhe->zhe", x, merge(node, w))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - frozen).max() > 0.1


def test_the_slow_factor_is_the_outer_one():
    w = np.zeros((4, 6), np.float32)
    a, b = np.float32([[0, 1], [0, 0]]), np.float32([[1, 0], [0, 0]])
    u = np.float32([[[1], [0]], [[0], [0]]])
    v = np.float32([[[0, 0, 1]], [[0, 0, 0]]])
    found = np.asarray(merge(Kronecker((a, b), u, v, scale=1.0), w))
    assert found[2, 2] == 1 and found.sum() == 1


def test_full_slow_weights_raise_the_rank_of_the_update():
    """Factorised terms have rank one each, full ones n."""
    w = np.zeros((16, 16), np.float32)
    for factorised, shapes, rank in (
        (True, [(4, 4), (4, 4)], 4),
        (False, [(4, 4, 4)], 16),
    ):
        node = drawn(Kronecker.init, w, n=4, factorised=factorised)
        assert [x.shape for x in node.slow] == shapes
        assert np.linalg.matrix_rank(merge(node, w)) == rank


# Slow weights in common -----------------------------------------------------------


def test_slow_weights_are_held_once_for_each_label(shared, delta):
    owners = [path for path, node in iter_nodes(delta) if jax.tree.leaves(node.slow)]
    assert owners == ["blocks_0/query/kernel", "blocks_0/value/kernel"]
    nodes = {p: n for p, _, n in complete(shared, delta)}
    for name in ("query", "value"):
        first, *rest = (nodes[f"blocks_{i}/{name}/kernel"] for i in range(3))
        assert all(n.slow is first.slow for n in rest)
    query, value = (nodes[f"blocks_0/{n}/kernel"].slow for n in ("query", "value"))
    assert nodes["wide/kernel"].slow is query
    assert np.abs(query[0] - value[0]).max() > 0.1


def test_materialize_hands_them_round_and_a_label_gets_every_gradient(shared, delta):
    merged = jax.tree.leaves(materialize(shared, delta))
    for (_, w, node), found in zip(complete(shared, delta), merged, strict=True):
        expected = kronecker_formula(w, node)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.abs(expected - w).max() > 0.1

    def loss(delta, skipped=None):
        merged = materialize(shared, delta)
        kept = {k: v for k, v in merged.items() if k != skipped}
        return sum((x**2).sum() for x in jax.tree.leaves(kept))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, less = gradient(delta, None), gradient(delta, "wide")
    first = lambda g, name: g["blocks_0"][name]["kernel"].slow[0]  # noqa: E731
    assert np.abs(first(whole, "query") - first(less, "query")).max() > 0.1
    np.testing.assert_allclose(first(whole, "value"), first(less, "value"), rtol=1e-5)


def test_another_n_under_one_label_is_refused(key, shared):
    rules = {
        "blocks_.*/query/kernel": partial(SMALL, share="one"),
        "wide/kernel": partial(SMALL, share="one", n=1),
    }
    with pytest.raises(
        ValueError, match=r"wide/kernel: nodes of the label 'one' share"
    ):
        make_delta(key, shared, rules)
    w = weight("attention")
    node = drawn(SMALL, w)
    with pytest.raises(ValueError, match=r"n = 2 fast factors; give nodes of another"):
        node.replace(slow=(jnp.ones((4, 4)),) * 2).merge(w)


def test_task_file_holds_them_once(shared, delta, tmp_path):
    save_task(tmp_path, Task(delta, {}), shared=shared, name="tied")
    found = restore_task(tmp_path, shared).task.delta
    assert jax.tree.structure(found) == jax.tree.structure(delta)
    same = jax.tree.map(np.array_equal, found, delta)
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(
        materialize(shared, compact(found))["wide"]["kernel"],
        materialize(shared, delta)["wide"]["kernel"],
    )
    other = jax.tree.map(lambda x: x + 1, delta)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, found, other)))


def test_count_of_vit_is_pevits_and_not_the_papers(key):
    """PEViT's README less its head; the bias of 768 per layer is a Replace."""
    kernel = jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)
    bias = jax.ShapeDtypeStruct((12, 64), jnp.float32)
    layer = {n: {"kernel": kernel, "bias": bias} for n in ("query", "key", "value")}
    vit = {f"blocks_{i}": {"attention": layer} for i in range(12)}
    rules = {
        f".*/{name}/kernel": partial(Kronecker.init, share=name, inputs=1)
        for name in ("query", "value")
    } | {".*/value/bias": partial(Replace.init, group="norm")}
    found = count(jax.eval_shape(lambda k, s: make_delta(k, s, rules), key, vit))
    factors, slow = 12 * 4 * 768, 4 * 32 * 32
    assert found.by_group == {"factors": factors + slow, "norm": 12 * 768}
    assert found.total == 50_176 == 79_699 - 29_523
    assert round(found.total / 1000, 1) != 80.7  # printed; nothing tried gives it


# Starts ---------------------------------------------------------------------------


def gradients(node, w):
    target = jnp.asarray(draw(*w.shape, seed=3))
    gradient = jax.jit(jax.grad(lambda n: ((n.merge(w) - target) ** 2).sum()))
    first = gradient(node)
    return first, gradient(jax.tree.map(lambda x, g: x - 0.1 * g, node, first))


def test_trap_both_fast_factors_zero_never_learn(key):
    """The released start: u, v and the slow weights have no gradient, ever."""
    w = weight("dense")
    dead, alive = (Kronecker.init(key, w, n=2, init=i) for i in ("zeros", "identity"))
    for node in (dead, alive):
        np.testing.assert_array_equal(node.merge(w), w)
    for grads in gradients(dead, w):
        assert not any(np.any(g) for g in jax.tree.leaves(grads))
    first, second = gradients(alive, w)
    assert np.any(first.v) and not np.any(first.u) and not np.any(first.slow[0])
    assert all(np.any(g) for g in jax.tree.leaves(second))


def test_starts_are_the_codes(key):
    w = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    node = Kronecker.init(key, w)
    assert (node.scale, node.dropout, node.u.shape) == (160.0, 0.0, (32, 24, 1))
    for x in node.slow:
        assert x.shape == (32, 32) and 0.0095 < np.abs(x).max() <= 0.01
        assert abs(float(np.mean(x))) < 0.001
    assert np.abs(node.slow[0] - node.slow[1]).max() > 0.001
    bound = np.sqrt(12 / 25)  # gain sqrt 2, fans 24 and 1
    assert 0.99 * bound < np.abs(node.u).max() <= bound and not np.any(node.v)
    both = Kronecker.init(key, w, init="glorot", slow_bound=0.1)
    assert 0.99 * bound < np.abs(both.v).max() <= bound
    assert 0.095 < np.abs(both.slow[0]).max() <= 0.1
    np.testing.assert_array_equal(both.u, node.u)


# Dropout --------------------------------------------------------------------------


def test_dropout_of_the_update_in_a_training_step(key):
    shared = {n: jnp.asarray(draw(6, 2, 4, seed=ord(n))) for n in "ab"}
    delta = every(shared, {".": partial(SMALL, share="one", dropout=0.5)})
    step = jax.jit(lambda delta, key: materialize(shared, perturb(delta, key)))
    trees = shared, materialize(shared, delta), step(delta, key), step(delta, key)
    kept = {}
    for name in shared:
        w, whole, half, again = (np.asarray(tree[name]) for tree in trees)
        np.testing.assert_array_equal(half, again)
        kept[name] = half != w
        update = np.where(kept[name], 2 * (whole - w), 0)
        np.testing.assert_allclose(half - w, update, atol=1e-5)
    assert 0.3 < np.mean([*kept.values()]) < 0.7
    assert (kept["a"] != kept["b"]).any()  # each path draws for itself
    other = np.asarray(step(delta, jax.random.key(7))["b"])
    assert ((other != w) != kept["b"]).any()


def test_without_dropout_a_step_runs_with_the_node_itself(key):
    node = drawn(SMALL, weight("attention"))
    assert node.perturb(key) is node
    half = drawn(SMALL, weight("attention"), dropout=0.5)
    assert half.perturb(key) is not half and half.dropout_key is None


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4}, r"n must divide 36 inputs and 5 outputs, found 4; .* \[1\]"),
        ({"n": 0}, "n must divide"),
        ({"n": True}, "n must divide"),
        ({"n": 4, "inputs": 2}, r"9 inputs and 20 outputs, found 4; choose one of \[1"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"init": "xavier"}, "identity, glorot or zeros, found 'xavier'"),
        ({"inputs": 0}, "inputs must be 1 to 3"),
    ],
)
def test_init_refuses(key, options, message):
    with pytest.raises(ValueError, match=message):
        Kronecker.init(key, weight("conv2d"), **{"n": 1, **options})


def test_what_does_not_fit_is_named(key):
    with pytest.raises(ValueError, match="needs a weight with inputs and outputs"):
        Kronecker.init(key, weight("bias"), n=1)
    with pytest.raises(ValueError, match=r"choose one of \[1, 2\]"):
        Kronecker.init(key, weight("dense"))
    node = Kronecker.init(key, weight("dense"), n=2)
    with pytest.raises(ValueError, match=r"Kronecker's arrays make a matrix \(4, 6\)"):
        node.merge(jnp.ones((6, 4)))
