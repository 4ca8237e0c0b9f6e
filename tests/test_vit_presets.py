"""Every transformer preset: counted as published, trained, the same when scanned."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftn_jax import (
    Task,
    TaskState,
    count,
    make_delta,
    make_train_step,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.apply import from_linen
from ftn_jax.core import iter_nodes
from ftn_jax.method import Backbone
from ftn_jax.models import clip_vit_b32, stack_layers, unstack_layers, vit_tiny_cifar
from ftn_jax.presets.text_head import head_from_embeddings
from ftn_jax.presets.vit import VIT, VIT_METHODS

pytestmark = pytest.mark.long

OPTIONS = {
    "kadaptation_qv": {"n": 4, "scale": 1.0},
    "ftn_qv": {"std": 0.5},  # plain descent hardly moves the papers' small factors
}
# Not at the pretrained network: their authors' starts.
AWAY = {"ftn_qv", "ftn_o", "ftn_attention", "ftn_attention_mlp"}
PUBLISHED = {
    "ftn_qv": 81_024,
    "ftn_o": 40_512,
    "lora_qv": 147_456,
    "svft_all": 55_296,
    "kadaptation_qv": 50_176,
    "ssf_all": 205_824,
    "ftn_attention": 162_048,
    "ftn_attention_mlp": 530_688,
    "bias_only": 102_912,
    "linear_probe": 0,
    "layer_norm": 26 * 2 * 768,
    "fine_tuning": 87_849_216,
}


def plan(method, shared):
    make = partial(make_delta, rules=method.rules_for(shared))
    return jax.eval_shape(make, jax.random.key(0), shared)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["blocks", "scanned"])
def test_parameters_of_clip_are_counted_as_published(scan_layers):
    model = clip_vit_b32(10, scan_layers=scan_layers)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shared = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    found = {}
    for name in PUBLISHED:
        parts = count(plan(VIT_METHODS[name](VIT, classes=10), shared)).by_group
        assert parts.pop("head") == 10 * 513
        found[name] = sum(parts.values())
    assert found == PUBLISHED


MODEL = vit_tiny_cifar(2, width=12, depth=2, image_px=8, mlp_width=16)
SCANNED = MODEL.clone(scan_layers=True)


@pytest.fixture(scope="module")
def plain():
    image = jnp.zeros((1, *MODEL.image_shape))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / math.sqrt(12), x.dtype), shapes
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    labels = np.arange(16) % 2
    images = rng.normal(size=(16, 8, 8, 3)) + labels[:, None, None, None]
    image = jnp.asarray(images, jnp.float32)
    return {"image": image, "label": jnp.asarray(labels), "mask": jnp.ones(16)}


def trained(model, method, shared, batch, steps=4):
    """Train and return (shared, delta at the start, delta, losses)."""
    backbone = Backbone(lambda classes: from_linen(model), shared, {}, VIT)
    shared = (method.prepare(backbone) if method.prepare else backbone).shared
    delta = make_delta(jax.random.key(0), shared, method.rules_for(shared))
    # Plain descent: Adam would blow rounding up where a gradient is nearly zero.
    tx = optax.sgd(0.05)
    state = TaskState.create(delta, {}, tx=tx, key=jax.random.key(1))
    step = jax.jit(make_train_step(from_linen(model), tx))
    losses = []
    for _ in range(steps):
        state, sums = step(shared, state, batch)
        losses.append(float(sums["loss"]) / 16)
        if len(losses) == 1:
            after_one = state.task.delta
    return shared, delta, after_one, losses


def close(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", VIT_METHODS)
def test_a_preset_trains_and_is_the_same_on_scanned_layers(
    name, plain, batch, tmp_path
):
    method = VIT_METHODS[name](VIT, classes=2, **OPTIONS.get(name, {}))
    assert "Source:" in (VIT_METHODS[name].__doc__ or "")
    shared, start, after, losses = trained(MODEL, method, plain, batch)
    assert losses[-1] < losses[0]

    stacked, start_s, after_s, losses_s = trained(
        SCANNED, method, stack_layers(plain), batch
    )
    np.testing.assert_allclose(losses_s, losses, rtol=1e-5)
    assert count(start_s).total == count(start).total
    assert count(start_s).by_group == count(start).by_group
    before = materialize(shared, start)
    close(unstack_layers(materialize(stacked, start_s)), before, 1e-6)
    moved = materialize(shared, after)
    close(unstack_layers(materialize(stacked, after_s)), moved)
    parts = [("head",), ("norm", "weights", "factors")]
    for groups in parts:  # the negative control: a step is more than the tolerance
        paths = {p for p, n in iter_nodes(start) if n.group in groups}
        if paths:
            change = [
                np.abs(a - b).max()
                for (p, a), b in zip(named(before), jax.tree.leaves(moved), strict=True)
                if p in paths
            ]
            assert max(change) > 1e-4, groups
    head = {"kernel", "bias"}
    starts_there = all(
        np.array_equal(x, plain_leaf)
        for (p, x), plain_leaf in zip(
            named(before), jax.tree.leaves(plain), strict=True
        )
        if p.rpartition("/")[2] not in head or not p.startswith("head")
    )
    assert starts_there == (name not in AWAY)

    # One file for both forms of the network.
    save_task(tmp_path / "a", Task(after_s, {}), shared=stacked, name=name)
    on_plain = restore_task(tmp_path / "a", shared).task.delta
    assert jax.tree.structure(on_plain) == jax.tree.structure(after)
    close(on_plain, after)
    save_task(tmp_path / "b", Task(on_plain, {}), shared=shared, name=name)
    names = [sorted(f.name for f in (tmp_path / x).iterdir()) for x in "ab"]
    assert names[0] == names[1]  # tensors are named by their hash: the same bytes
    back = restore_task(tmp_path / "b", stacked).task.delta
    assert jax.tree.structure(back) == jax.tree.structure(after_s)
    jax.tree.map(np.testing.assert_array_equal, back, after_s)


def named(tree):
    from ftn_jax.paths import path_name

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(p), x) for p, x in leaves]


def test_identity_start_of_ftn(plain):
    method = VIT_METHODS["ftn_qv"](VIT, classes=2, init="identity")
    delta = make_delta(jax.random.key(0), plain, method.rules_for(plain))
    params = materialize(plain, delta)
    jax.tree.map(np.testing.assert_array_equal, params["blocks_0"], plain["blocks_0"])
    (node,) = (
        n for p, n in iter_nodes(delta) if p.startswith("blocks_1") and "que" in p
    )
    assert node.scale == 2.5 and [f.shape for f in node.factors] == [
        (12, 4),
        (3, 4),
        (4, 4),
    ]


def embeddings(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_head_starts_at_text_embeddings(plain, tmp_path):
    rows = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    head = head_from_embeddings(embeddings(tmp_path / "two.npz", x=rows), scale=10.0)
    method = VIT_METHODS["linear_probe"](VIT, classes=2, head=head)
    delta = make_delta(jax.random.key(0), plain, method.rules_for(plain))
    kernel = delta["head"]["kernel"].value
    expected = 10 * (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)
    np.testing.assert_array_equal(delta["head"]["bias"].value, np.zeros(2))
    three = VIT_METHODS["linear_probe"](VIT, classes=3, head=head)
    with pytest.raises(ValueError, match=r"two.npz: 2 classes of 12 .*\(12, 3\)"):
        make_delta(jax.random.key(0), plain, three.rules_for(plain))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones((2, 3)), "b": np.ones(2)}, r"found the arrays \['a', 'b'\]"),
        ({"x": np.ones(3)}, r"float64 of shape \(3,\), expected"),
        ({"x": np.ones((2, 3), int)}, "found int64"),
        ({"x": np.array([[1.0, 0], [0, 0]])}, r"the rows \[1\] are zero"),
        ({"x": np.array([[1.0, np.nan], [0, 1]])}, r"the rows \[0\] are zero"),
    ],
)
def test_embeddings_that_make_no_head_are_refused(arrays, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        head_from_embeddings(embeddings(tmp_path / "x.npz", **arrays))


def test_absent_embeddings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        head_from_embeddings(tmp_path / "absent.npz")


def test_a_network_without_what_a_preset_needs_is_refused(plain):
    bare = VIT._replace(norms=None)
    for name in ("layer_norm", "ssf_all"):
        with pytest.raises(ValueError, match="these layers name none"):
            VIT_METHODS[name](bare, classes=2)
    with pytest.raises(ValueError, match="rank must be an integer >= 1, found 0"):
        VIT_METHODS["ftn_qv"](VIT, classes=2, rank=0)
    headless = {k: v for k, v in plain.items() if k != "head"}
    method = VIT_METHODS["ftn_qv"](VIT, classes=2)
    with pytest.raises(ValueError, match="rules that match no leaf.*head"):
        make_delta(jax.random.key(0), headless, method.rules_for(headless))
