"""ResNet checkpoints: real CIFAR weights, round trips, and every kind of misfit."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ftn_jax.models import (
    RESNETS,
    cifar_resnet,
    residual_adapter_resnet26,
    resnet18,
    resnet50,
)
from ftn_jax.pretrained import (
    CheckpointMismatch,
    Pretrained,
    export_resnet,
    load_resnet,
    read_weights,
)

pytestmark = pytest.mark.long

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def random_weights(model, seed=0):
    """Give a model random variables, as a checkpoint of it would."""
    rng = np.random.default_rng(seed)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    filled = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables
    )
    return Pretrained(**filled)


def checkpoint(model):
    weights = random_weights(model)
    return export_resnet(weights.params, weights.batch_stats, model)


def normalize(images):
    return (images.astype(np.float32) / 255 - MEAN) / STD


@pytest.mark.data
@pytest.mark.parametrize("kind", [".th", ".npz", ".safetensors"])
def test_cifar_resnet20_gives_the_golden_logits(kind, data_dir, tmp_path):
    folder = data_dir / "weights" / "cifar_resnet"
    path = folder / "resnet20_cifar10_oihw.npz"
    if kind == ".th":
        pytest.importorskip("torch")
        path = folder / "resnet20-12fca82f.th"
    elif kind == ".safetensors":
        save_file(read_weights(path), tmp_path / "net.safetensors")
        path = tmp_path / "net.safetensors"
    model = cifar_resnet(20)
    weights = load_resnet(path, model)
    golden = np.load(folder / "resnet20_golden.npz")
    apply = jax.jit(model.apply)
    logits = apply(weights._asdict(), normalize(golden["x"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    swapped = apply(weights._asdict(), normalize(golden["x"][..., ::-1]))
    assert np.abs(swapped - golden["logits"]).max() > 1


@pytest.mark.data
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 81.05), (56, 83.05)])
def test_cifar_resnets_classify_the_test_images(depth, accuracy, data_dir):
    folder = data_dir / "weights" / "cifar_resnet"
    model = cifar_resnet(depth)
    weights = load_resnet(folder / f"resnet{depth}_cifar10_oihw.npz", model)
    data = np.load(data_dir / "domains" / "cifar10_jpeg.npz")
    x, y = normalize(data["x_test"]), data["y_test"]
    predict = jax.jit(lambda x: model.apply(weights._asdict(), x).argmax(-1))
    found = np.concatenate([predict(x[i : i + 250]) for i in range(0, len(x), 250)])
    assert 100 * (found == y).mean() == pytest.approx(accuracy, abs=0.1)


@pytest.mark.data
def test_cifar_export_gives_the_file_back(data_dir):
    path = data_dir / "weights" / "cifar_resnet" / "resnet20_cifar10_oihw.npz"
    model = cifar_resnet(20)
    weights = load_resnet(path, model)
    found = export_resnet(weights.params, weights.batch_stats, model)
    expected = read_weights(path)
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w)


@pytest.mark.parametrize("name", [*RESNETS])
def test_export_and_load_are_inverse(name):
    model = RESNETS[name](10, width=4)
    weights = random_weights(model)
    exported = export_resnet(weights.params, weights.batch_stats, model)
    found = load_resnet(exported, model)
    jax.tree.map(np.testing.assert_array_equal, found, weights)
    assert len(exported) == len(jax.tree.leaves(weights))


def test_names_and_layouts_are_torchvisions():
    weights = checkpoint(resnet50(10, width=4))
    expected = {
        "conv1.weight": (4, 3, 7, 7),
        "bn1.running_var": (4,),
        "layer1.0.downsample.0.weight": (16, 4, 1, 1),
        "layer2.0.downsample.1.bias": (32,),
        "layer2.3.conv2.weight": (8, 8, 3, 3),
        "layer4.2.bn3.running_mean": (128,),
        "fc.weight": (10, 128),
        "fc.bias": (10,),
    }
    assert {name: weights[name].shape for name in expected} == expected
    # 53 convolutions, 53 norms of four arrays, the head's two
    assert len(weights) == 53 + 4 * 53 + 2


def test_num_batches_tracked_and_the_other_head_name_are_taken():
    model = resnet18(10, width=4)
    weights = checkpoint(model)
    for leaf in ("weight", "bias"):
        weights[f"linear.{leaf}"] = weights.pop(f"fc.{leaf}")
    weights["bn1.num_batches_tracked"] = np.array(7)
    found = load_resnet(weights, model)
    jax.tree.map(np.testing.assert_array_equal, found, random_weights(model))


def test_without_classes_the_head_is_left_out():
    model = residual_adapter_resnet26(10, width=4)
    found = load_resnet(checkpoint(model), model.clone(num_classes=None))
    expected = random_weights(model)
    expected.params.pop("head")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_loaded_arrays_are_copies():
    model = cifar_resnet(8)
    weights = checkpoint(model)
    found = load_resnet(weights, model)
    for array in weights.values():
        array[...] = 0
    for path, leaf in flatten_dict(found._asdict(), sep="/").items():
        assert np.any(leaf), path


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (drop("conv1.weight"), "missing: conv1.weight, expected (4, 3, 7, 7)"),
        (drop("bn1.running_var"), "missing: bn1.running_var, expected (4,)"),
        (drop("fc.bias"), "missing: fc.bias, expected (10,)"),
        (put("layer5.x", np.zeros((2, 3))), "left over: layer5.x, found (2, 3)"),
        (put("linear.bias", np.zeros(10)), "left over: linear.bias, found (10,)"),
        (
            put("layer2.0.conv1.weight", np.zeros((3, 3, 4, 8))),
            "mis-shaped: layer2.0.conv1.weight, "
            "found (3, 3, 4, 8), expected (8, 4, 3, 3)",
        ),
        (put("bn1.bias", np.full(4, np.nan)), "NaN or Inf: bn1.bias"),
        (put("fc.bias", np.full(10, np.inf)), "NaN or Inf: fc.bias"),
        (put("fc.bias", np.full(10, 1e300)), "NaN or Inf: fc.bias"),
        (
            put("bn1.bias", np.zeros(4, int)),
            "not floating point: bn1.bias, found int64",
        ),
    ],
)
def test_each_misfit_is_named(change, line):
    model = resnet18(10, width=4)
    weights = checkpoint(model)
    change(weights)
    with pytest.raises(CheckpointMismatch) as error:
        load_resnet(weights, model)
    assert f"1 keys do not fit the model\n  {line}\n" in str(error.value)


def test_all_misfits_are_listed_at_once():
    model = resnet18(10, width=4)
    weights = checkpoint(model)
    del weights["bn1.weight"], weights["layer3.1.bn2.bias"]
    weights["extra"] = np.zeros(1)
    weights["conv1.weight"] = weights["conv1.weight"][..., :3]
    with pytest.raises(CheckpointMismatch, match="4 keys do not fit") as error:
        load_resnet(weights, model)
    for key in ("bn1.weight", "layer3.1.bn2.bias", "extra", "conv1.weight"):
        assert f": {key}, " in str(error.value)


def test_another_number_of_classes_gives_a_hint():
    weights = checkpoint(resnet18(10, width=4))
    with pytest.raises(CheckpointMismatch) as error:
        load_resnet(weights, resnet18(7, width=4))
    message = str(error.value)
    assert "mis-shaped: fc.weight, found (10, 32), expected (7, 32)" in message
    assert "num_classes" in message


def test_another_architecture_is_refused_with_the_files_name(tmp_path):
    save_file(checkpoint(resnet18(10, width=4)), tmp_path / "r18.safetensors")
    with pytest.raises(CheckpointMismatch) as error:
        load_resnet(tmp_path / "r18.safetensors", resnet50(10, width=4))
    message = str(error.value)
    assert "r18.safetensors" in message
    assert "missing: layer3.5.conv3.weight, expected (64, 16, 1, 1)" in message
    assert "mis-shaped: fc.weight, found (10, 32), expected (10, 128)" in message
