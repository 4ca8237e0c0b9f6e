from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ftn_jax.models import (
    RESNETS,
    ResNet,
    cifar_resnet,
    residual_adapter_resnet26,
    resnet18,
    resnet34,
    resnet50,
)
from ftn_jax.models.resnet_block import free_shortcut

pytestmark = pytest.mark.long


def images(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def shapes(model, size=64):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def variables_of(model, seed=0):
    """Fill a model with random numbers (quicker than compiling its init)."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(
                size=leaf.shape, scale=(2 / leaf.size * leaf.shape[-1]) ** 0.5
            )
        return rng.uniform(0.5, 1.0, leaf.shape)

    filled = jax.tree_util.tree_map_with_path(fill, shapes(model))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled)


@partial(jax.jit, static_argnames=("model", "train", "features"))
def run(model, variables, x, *, train=False, features=False):
    mutable = ["batch_stats"] if train else False
    return model.apply(variables, x, train, features=features, mutable=mutable)


def size_of(tree, keep):
    flat = flatten_dict(tree, sep="/")
    sizes = [leaf.size for path, leaf in flat.items() if keep(path)]
    return len(sizes), sum(sizes)


def is_conv(path):
    return path.endswith("kernel") and not path.startswith("head")


def is_norm(path):
    return "bn" in path


@pytest.mark.parametrize(
    ("name", "convs", "conv_weights", "norm_affine", "total"),
    [
        ("resnet18", 20, 11_166_912, 9_600, 11_689_512),
        ("resnet34", 36, 21_267_648, 17_024, 21_797_672),
        ("resnet50", 53, 23_454_912, 53_120, 25_557_032),
        ("resnet26", 25, 5_806_944, 7_744, 5_806_944 + 7_744 + 257_000),
        ("cifar_resnet20", 19, 267_696, 1_376, 269_722),
        ("cifar_resnet56", 55, 848_304, 4_064, 853_018),
    ],
)
def test_golden_parameter_counts(name, convs, conv_weights, norm_affine, total):
    variables = shapes(RESNETS[name]())
    assert size_of(variables["params"], is_conv) == (convs, conv_weights)
    assert size_of(variables["params"], is_norm)[1] == norm_affine
    assert size_of(variables["batch_stats"], is_norm)[1] == norm_affine
    assert size_of(variables["params"], lambda path: True)[1] == total


@pytest.mark.parametrize("name", RESNETS)
def test_every_named_resnet_counts_its_classes(name):
    model = RESNETS[name](num_classes=7)
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    logits = jax.eval_shape(model.apply, shapes(model), x)
    assert logits.shape == (2, 7)


BN = {"scale", "bias"}


@pytest.mark.parametrize("remat", [False, True])
def test_parameter_paths_are_fixed(remat):
    params = shapes(resnet50(width=8, remat=remat))["params"]
    assert set(params) == {"stem", "head"} | {
        f"layer{s}_{i}" for s, n in enumerate((3, 4, 6, 3), 1) for i in range(n)
    }
    assert set(params["stem"]) == {"conv", "bn"}
    assert set(params["stem"]["bn"]) == BN
    names = {f"{kind}{k}" for kind in ("conv", "bn") for k in (1, 2, 3)}
    assert set(params["layer2_0"]) == names | {"shortcut"}
    assert set(params["layer2_0"]["shortcut"]) == {"conv", "bn"}
    assert set(params["layer2_1"]) == names
    assert set(params["layer2_1"]["conv3"]) == {"kernel"}
    assert set(params["layer2_1"]["bn3"]) == BN
    assert params["layer2_0"]["conv2"]["kernel"].shape == (3, 3, 16, 16)
    assert set(params["head"]) == {"kernel", "bias"}


def test_resnet26_has_a_final_norm_and_no_shortcut_weights():
    variables = shapes(residual_adapter_resnet26(10))
    assert set(variables["params"]["final"]["bn"]) == BN
    assert set(variables["batch_stats"]["final"]["bn"]) == {"mean", "var"}
    assert not any("shortcut" in block for block in variables["params"].values())


def test_remat_changes_neither_outputs_nor_gradients():
    x = images(2, 32, 32, 3)
    plain, remat = (cifar_resnet(8, remat=remat) for remat in (False, True))
    variables = variables_of(plain)

    def loss(params, model):
        tree = {**variables, "params": params}
        y, state = model.apply(tree, x, True, mutable=["batch_stats"])
        return jnp.sum(y**2), state

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    found, expected = grad(variables["params"], remat), grad(variables["params"], plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )
    text = [
        str(jax.make_jaxpr(loss, 1)(variables["params"], m)) for m in (plain, remat)
    ]
    assert ["checkpoint" in t or "remat" in t for t in text] == [False, True]


def test_features_name_every_stage_and_end_in_the_head():
    model = resnet18(5, width=8)
    x = images(2, 75, 64, 3)
    variables = variables_of(model)
    found = run(model, variables, x, features=True)
    assert {name: f.shape for name, f in found.items()} == {
        "stem": (2, 38, 32, 8),
        "layer1": (2, 19, 16, 8),
        "layer2": (2, 10, 8, 16),
        "layer3": (2, 5, 4, 32),
        "layer4": (2, 3, 2, 64),
        "pooled": (2, 64),
    }
    head = variables["params"]["head"]
    logits = found["pooled"] @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(run(model, variables, x), logits, rtol=1e-4, atol=1e-5)

    headless = model.clone(num_classes=None)
    assert "head" not in shapes(headless)["params"]
    np.testing.assert_allclose(run(headless, variables, x), found["pooled"], rtol=1e-6)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_gives_the_strided_features_at_more_places(bottleneck, output_stride):
    """Holds exactly when the unstrided convolution keeps its dilation, not else."""
    make = partial(ResNet, (1, 1, 2, 2), None, width=4, bottleneck=bottleneck)
    x = images(1, 64, 96, 3)
    strided = make()
    variables = variables_of(strided)
    expected = run(strided, variables, x, features=True)["layer4"]
    step = 32 // output_stride
    for dilate_first_conv in (False, True):
        model = make(output_stride=output_stride, dilate_first_conv=dilate_first_conv)
        found = run(model, variables, x, features=True)["layer4"]
        assert found.shape[1:3] == (64 // output_stride, 96 // output_stride)
        gap = jnp.abs(found[:, ::step, ::step] - expected).max() / expected.max()
        assert (gap < 1e-5) == (not dilate_first_conv)
        assert gap < 1e-5 or gap > 1e-2


def convolutions(model, size):
    """List every nn.Conv that a call meets, as (kernel, stride, dilation, padding)."""
    met = []

    def note(call, args, kwargs, context):
        conv = context.module
        if isinstance(conv, nn.Conv) and context.method_name == "__call__":
            met.append(
                (conv.kernel_size, conv.strides, conv.kernel_dilation, conv.padding)
            )
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(model, size)
    return met


@pytest.mark.parametrize("dilate_first_conv", [True, False])
def test_default_dilation_covers_both_convolutions_of_all_blocks(dilate_first_conv):
    model = resnet34(10, width=4, output_stride=16, dilate_first_conv=dilate_first_conv)
    threes = [c for c in convolutions(model, 64) if c[0] == (3, 3)]
    first = 2 if dilate_first_conv else 1
    assert [c[2][0] for c in threes[-6:]] == [first, 2, 2, 2, 2, 2]
    assert {c[2] for c in threes[:-6]} == {(1, 1)}


@pytest.mark.parametrize("size", [32, 33])
def test_same_differs_at_stride_2_on_even_sizes(size):
    """The padding trap: "SAME" hides on odd sizes, so the models pad explicitly."""
    x = images(1, size, size, 3)
    ours = nn.Conv(4, (3, 3), strides=2, padding=((1, 1), (1, 1)))
    same = nn.Conv(4, (3, 3), strides=2, padding="SAME")
    variables = ours.init(jax.random.key(0), x)
    gap = jnp.abs(ours.apply(variables, x) - same.apply(variables, x)).max()
    assert gap > 0.1 if size % 2 == 0 else gap < 1e-6


@pytest.mark.parametrize("name", RESNETS)
def test_every_convolution_pads_explicitly_as_pytorch(name):
    met = convolutions(RESNETS[name](10, width=4), 64)
    assert len(met) >= 7
    for kernel, _, dilation, padding in met:
        pad = dilation[0] * (kernel[0] - 1) // 2
        assert padding == ((pad, pad), (pad, pad))


def test_option_a_and_pooling_shortcuts_place_the_zero_channels():
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1).repeat(2, axis=3)
    y = free_shortcut(x, 4, stride=2, kind="subsample")
    np.testing.assert_array_equal(y[0, :, :, 1], [[1, 3], [9, 11]])
    assert not y[..., [0, 3]].any()
    assert y[..., [1, 2]].all()
    y = free_shortcut(x, 4, stride=2, kind="pool")
    np.testing.assert_array_equal(y[0, :, :, 0], [[3.5, 5.5], [11.5, 13.5]])
    assert y[..., :2].all()
    assert not y[..., 2:].any()


def test_bfloat16_computes_low_and_keeps_float32_parameters():
    x = images(2, 32, 32, 3)
    full, low = cifar_resnet(8), cifar_resnet(8, dtype=jnp.bfloat16)
    variables = variables_of(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    found, expected = run(low, variables, x), run(full, variables, x)
    assert found.dtype == jnp.bfloat16
    gap = jnp.abs(found.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
    assert 1e-5 < gap < 4e-2


def test_norm_axis_name_shares_statistics_across_devices():
    x = images(4, 16, 16, 3)
    alone = cifar_resnet(8, width=4)
    variables = variables_of(alone)

    expected, state = run(alone, variables, x, train=True)
    halves = x.reshape(2, 2, 16, 16, 3)
    found = {}
    for name in ("batch", None):
        model = cifar_resnet(8, width=4, norm_axis_name=name)
        train = partial(run, model, variables, train=True)
        y, stats = jax.vmap(train, axis_name="batch")(halves)
        found[name] = jnp.abs(y.reshape(4, 10) - expected).max()
        if name:
            np.testing.assert_allclose(
                stats["batch_stats"]["layer3_0"]["bn2"]["var"][1],
                state["batch_stats"]["layer3_0"]["bn2"]["var"],
                rtol=1e-4,
            )
    assert found["batch"] < 1e-4 < 1e-2 < found[None]


def test_evaluation_neither_needs_nor_changes_statistics():
    x = images(2, 16, 16, 3)
    model = cifar_resnet(8, width=4)
    variables = variables_of(model)
    both = run(model, variables, x)
    np.testing.assert_allclose(run(model, variables, x[:1]), both[:1], rtol=1e-5)
    _, state = model.apply(variables, x, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, state, {"batch_stats": variables["batch_stats"]}
    )


def test_initial_weights_follow_torchvision():
    model = ResNet((1,), 1000, stem="3x3")
    params = jax.jit(model.init)(jax.random.key(0), images(1, 8, 8, 3))["params"]
    kernel = params["layer1_0"]["conv1"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    for leaf in params["head"].values():
        assert float(jnp.abs(leaf).max()) == pytest.approx(64**-0.5, rel=0.02)
        assert float(leaf.std()) == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    assert (params["layer1_0"]["bn2"]["scale"] == 1).all()
    assert (params["layer1_0"]["bn2"]["bias"] == 0).all()


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_wrong_cifar_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* found {depth}"):
        cifar_resnet(depth)


def test_wrong_output_stride_is_refused():
    with pytest.raises(ValueError, match="8, 16 or 32, found 4"):
        resnet18(output_stride=4)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 32, 32, 1), (32, 32, 3)])
def test_wrong_input_shape_is_refused(shape):
    # The runtime shape checker, where it is on, refuses with its own error first.
    with pytest.raises(Exception, match=r"b, h, w, 3|b h w 3"):
        cifar_resnet(8).init(jax.random.key(0), np.zeros(shape, np.float32))


def test_resnet26_refuses_sizes_that_do_not_halve():
    with pytest.raises(ValueError, match="multiples of"):
        shapes(residual_adapter_resnet26(10), size=60)
