from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ftn_jax.models.vit_block import ACTIVATIONS
from ftn_jax.models.vit_family import VITS, clip_vit, vit_tiny_cifar
from ftn_jax.models.vit_layers import stack_layers, unstack_layers

pytestmark = pytest.mark.long

SMALL = partial(vit_tiny_cifar, width=24, depth=2, image_px=16)
FLAT = partial(SMALL, depth=1)


def images(model, batch=3, seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, *model.image_shape))
    return jnp.asarray(x, jnp.float32)


def shapes(model):
    x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def variables_of(model, seed=0):
    """Fill a model with random numbers, as large as those of a trained one."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        x = rng.normal(size=leaf.shape)
        if name == "kernel":
            x *= 2 * leaf.size**-0.25
        elif name in ("scale", "var"):
            x = 1 + 0.3 * np.abs(x)
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(model))


@partial(jax.jit, static_argnames=("model", "train", "features"))
def run(model, variables, x, key=None, *, train=False, features=False):
    return model.apply(
        variables,
        x,
        train=train,
        features=features,
        rngs=None if key is None else {"dropout": key},
        mutable=["batch_stats"] if train else False,
    )


def gap(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("clip_vit_b32", 87_849_216),
        ("clip_vit_b16", 86_192_640),
        ("clip_vit_l14", 303_966_208),
        ("vit_b32", 88_224_232),
        ("vit_b16", 86_567_656),
        ("vit_s16", 22_050_664),
        ("vit_ti16", 5_717_416),
        ("deit_ti16", 5_717_416),
        ("deit_ti16_distilled", 5_910_800),
        ("deit_s16_distilled", 22_436_432),
        ("deit_b16_distilled", 87_338_192),
        ("vit_tiny_cifar", 2_693_578),
    ],
)
def test_golden_parameter_counts(name, total):
    model = VITS[name]()
    for form in (model, model.clone(scan_layers=True)):
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes(form))) == total


def test_paths_and_shapes_of_clip():
    flat = flatten_dict(shapes(VITS["clip_vit_b32"](5))["params"], sep="/")
    block = "blocks_11/attention"
    expected = {
        "patch_embedding/kernel": (32, 32, 3, 768),
        "class_token": (768,),
        "position_embedding": (50, 768),
        "norm_pre/scale": (768,),
        f"{block}/query/kernel": (768, 12, 64),
        f"{block}/value/bias": (12, 64),
        f"{block}/out/kernel": (12, 64, 768),
        f"{block}/out/bias": (768,),
        "blocks_0/norm2/bias": (768,),
        "blocks_0/mlp/fc1/kernel": (768, 3072),
        "norm/scale": (768,),
        "projection/kernel": (768, 512),
        "head/kernel": (512, 5),
    }
    assert {path: flat[path].shape for path in expected} == expected
    # four tokens and norms before and after, 16 leaves a block, projection and head
    assert len(flat) == 3 + 2 + 12 * 16 + 2 + 1 + 2
    assert "distillation_token" in shapes(VITS["deit_s16_distilled"]())["params"]


def test_scan_and_remat_change_nothing():
    """Neither the output nor the gradients; shuffled layers do."""
    plain = SMALL(num_classes=5)
    params = variables_of(plain)["params"]
    x = images(plain)

    @partial(jax.jit, static_argnames="model")
    def value_and_grad(model, params):
        def loss(params):
            logits = model.apply({"params": params}, x, train=True)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, expected), grads = value_and_grad(plain, params)
    for scan_layers, remat in ((False, True), (True, True)):
        model = plain.clone(scan_layers=scan_layers, remat=remat)
        given = stack_layers(params) if scan_layers else params
        (_, found), found_grads = value_and_grad(model, given)
        assert gap(found, expected) < 1e-5
        if scan_layers:
            found_grads = unstack_layers(found_grads)
        assert jax.tree.structure(found_grads) == jax.tree.structure(grads)
        for a, b in zip(*map(jax.tree.leaves, (found_grads, grads)), strict=True):
            assert np.abs(a - b).max() < 1e-4 * max(np.abs(b).max(), 1)
    given = stack_layers(params)
    given["blocks"] = jax.tree.map(lambda leaf: leaf[::-1], given["blocks"])
    (_, found), _ = value_and_grad(model, given)
    assert gap(found, expected) > 1e-2


def test_scanned_layers_start_different():
    model = SMALL(scan_layers=True)
    params = jax.jit(model.init)(jax.random.key(0), images(model, 1))["params"]
    kernels = params["blocks"]["attention"]["out"]["kernel"]
    assert kernels.shape == (2, 3, 8, 24)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_only_in_training(scan_layers):
    model = SMALL(dropout=0.2, scan_layers=scan_layers)
    variables, x = variables_of(model), images(SMALL())
    calm = run(model, variables, x)
    one, two, again = (
        run(model, variables, x, jax.random.key(seed), train=True)[0]
        for seed in (1, 2, 1)
    )
    assert min(gap(one, calm), gap(two, calm), gap(one, two)) > 1e-2
    np.testing.assert_array_equal(one, again)
    still, _ = run(model.clone(dropout=0.0), variables, x, train=True)
    np.testing.assert_allclose(still, calm, rtol=1e-5, atol=1e-5)


def test_dropout_follows_positions_and_every_dense_layer_but_three():
    model = SMALL(num_classes=5, dropout=0.5)
    called = []

    def watch(call, args, kwargs, context):
        called.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes(model)
    places = [name.rpartition("/")[0] for name in called if "Dropout" in name]
    blocks = [f"blocks_{i}{part}" for i in (0, 1) for part in ("", "/mlp", "/mlp")]
    assert sorted(places) == sorted(["", *blocks])


def test_features_are_what_the_head_receives():
    model = FLAT(num_classes=5, projection_width=7, stem_norm=True)
    variables, x = variables_of(model), images(SMALL())
    found = run(model, variables, x, features=True)
    assert found["tokens"].shape == (3, 1 + 16, 24)
    params = variables["params"]
    projected = found["tokens"][:, 0] @ params["projection"]["kernel"]
    assert gap(found["pooled"], projected) < 1e-5
    logits = projected @ params["head"]["kernel"] + params["head"]["bias"][None]
    assert gap(run(model, variables, x), logits) < 1e-5
    params.pop("head")
    headless = model.clone(num_classes=None)
    np.testing.assert_array_equal(run(headless, variables, x), found["pooled"])
    for form in (headless, model.clone(num_classes=0)):
        assert jax.tree.structure(shapes(form)) == jax.tree.structure(variables)


def test_mean_pool_has_no_class_token():
    model = FLAT(num_classes=None, pool="mean")
    variables, x = variables_of(model), images(SMALL())
    found = run(model, variables, x, features=True)
    assert found["tokens"].shape == (3, 16, 24)
    assert "class_token" not in variables["params"]
    assert gap(found["pooled"], found["tokens"].mean(1)) < 1e-6
    assert gap(found["pooled"], found["tokens"][:, 0]) > 1e-2


def test_distilled_averages_its_two_heads():
    model = FLAT(num_classes=5, distilled=True)
    variables, x = variables_of(model), images(SMALL())
    found = run(model, variables, x, features=True)
    tokens = found["tokens"]
    assert tokens.shape == (3, 2 + 16, 24)
    heads = [variables["params"][name] for name in ("head", "head_distilled")]
    logits = [tokens[:, i] @ h["kernel"] + h["bias"][None] for i, h in enumerate(heads)]
    assert gap(run(model, variables, x), sum(logits) / 2) < 1e-5
    assert min(gap(one, sum(logits) / 2) for one in logits) > 1e-2
    assert gap(found["pooled"], (tokens[:, 0] + tokens[:, 1]) / 2) < 1e-6


def test_feature_norm_normalizes_without_parameters():
    model = FLAT(num_classes=None, feature_norm=True)
    variables, x = variables_of(model), images(SMALL(), batch=8)
    plain = model.clone(feature_norm=False)
    raw = run(plain, {"params": variables["params"]}, x)
    stats = variables["batch_stats"]["feature_bn"]
    mean, var = raw.mean(0, keepdims=True), raw.var(0, keepdims=True)
    assert jax.tree.structure(shapes(plain)["params"]) == jax.tree.structure(
        variables["params"]
    )
    found, state = run(model, variables, x, train=True)
    assert gap(found, (raw - mean) / jnp.sqrt(var + 1e-5)) < 1e-4
    new = state["batch_stats"]["feature_bn"]
    assert gap(new["mean"], 0.9 * stats["mean"] + 0.1 * mean[0]) < 1e-5
    assert gap(new["var"], 0.9 * stats["var"] + 0.1 * var[0]) < 1e-5
    calm = run(model, variables, x)
    assert gap(calm, (raw - stats["mean"][None]) / np.sqrt(stats["var"][None])) < 1e-4
    assert gap(calm, found) > 1e-2


def test_bfloat16_arithmetic_stays_near():
    model = FLAT(num_classes=5)
    variables, x = variables_of(model), images(model)
    found = run(model.clone(dtype=jnp.bfloat16), variables, x)
    assert found.dtype == jnp.bfloat16
    difference = gap(found.astype(jnp.float32), run(model, variables, x))
    assert 1e-6 < difference < 5e-2


def test_images_need_not_be_square():
    model = FLAT(num_classes=5, image_px=(8, 20))
    assert model.grid == (2, 5)
    variables = variables_of(model)
    assert variables["params"]["position_embedding"].shape == (11, 24)
    assert run(model, variables, images(model)).shape == (3, 5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (SMALL(image_px=18), "multiple of patch_px"),
        (SMALL(heads=5), "5 heads do not share a width of 24"),
        (SMALL(pool="max"), "'max'"),
        (SMALL(activation="relu"), "'relu'"),
        (SMALL(distilled=True, pool="mean"), "pool='mean'"),
        (SMALL(distilled=True, projection_width=4), "projection_width=4"),
        (SMALL(distilled=True, feature_norm=True), "feature_norm=True"),
    ],
)
def test_attributes_that_do_not_fit(model, words):
    with pytest.raises(ValueError, match=words):
        shapes(model)


@pytest.mark.parametrize("shape", [(1, 20, 16, 3), (1, 16, 16, 1), (16, 16, 3)])
def test_images_that_do_not_fit(shape):
    model = SMALL()
    with pytest.raises(ValueError, match=r"takes images of shape \(b, 16, 16, 3\)"):
        jax.eval_shape(model.apply, variables_of(model), jnp.zeros(shape))


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match=r"one of \['b', 'l'\], found 's'"):
        clip_vit("s", 16)


def test_activations():
    x = np.linspace(-3, 3, 601, dtype=np.float32)
    quick = ACTIVATIONS["quick_gelu"](x)
    np.testing.assert_allclose(quick, x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    apart = np.abs(quick - ACTIVATIONS["gelu"](x)).max()
    assert 0.015 < apart < 0.021
    assert 1e-5 < np.abs(ACTIVATIONS["gelu_tanh"](x) - ACTIVATIONS["gelu"](x)).max()
