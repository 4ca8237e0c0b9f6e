"""Each ResNet gives the numbers of an independent PyTorch implementation."""

import jax
import numpy as np
import pytest

from ftn_jax.models import (
    ResNet,
    cifar_resnet,
    residual_adapter_resnet26,
    resnet18,
    resnet34,
    resnet50,
)
from ftn_jax.pretrained import export_resnet, load_resnet

pytestmark = pytest.mark.long

torch = pytest.importorskip("torch")

from .torch_resnet import (  # noqa: E402
    BasicBlock,
    Bottleneck,
    ImageNetResNet,
    SmallResNet,
    randomize,
)

IMAGENET = {
    "resnet18": (resnet18, BasicBlock, (2, 2, 2, 2)),
    "resnet34": (resnet34, BasicBlock, (3, 4, 6, 3)),
    "resnet50": (resnet50, Bottleneck, (3, 4, 6, 3)),
}


def images(size, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, *size, 3)).astype(np.float32)


def torch_logits(net, x, train=False):
    net.train(train)
    with torch.no_grad():
        return net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()


def load(net, model, tmp_path):
    """Bring a PyTorch network's weights over through a file, as users do."""
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return load_resnet(tmp_path / "net.pth", model)


def gap(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def check_parity(net, model, tmp_path, sizes):
    weights = load(randomize(net), model, tmp_path)
    apply = jax.jit(model.apply)
    for size in sizes:
        x = images(size)
        expected = torch_logits(net, x)
        assert gap(apply(weights._asdict(), x), expected) < 1e-4, size
    weights.params["stem"]["conv"]["kernel"] *= 0
    assert gap(apply(weights._asdict(), x), expected) > 1e-2


@pytest.mark.parametrize("name", IMAGENET)
def test_full_width_imagenet_resnet(name, tmp_path):
    make, block, sizes = IMAGENET[name]
    net = ImageNetResNet(block, sizes, num_classes=10)
    check_parity(net, make(10), tmp_path, [(75, 64)])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_narrow_imagenet_resnet_on_even_and_odd_sizes(name, tmp_path):
    make, block, sizes = IMAGENET[name]
    net = ImageNetResNet(block, sizes, width=8, num_classes=10)
    check_parity(net, make(10, width=8), tmp_path, [(64, 64), (75, 75)])


@pytest.mark.parametrize(
    ("output_stride", "dilate_first_conv", "strides", "dilations"),
    [
        (16, True, (1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (2, 2))),
        (16, False, (1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (1, 2))),
        (8, True, (1, 2, 1, 1), ((1, 1), (1, 1), (2, 2), (4, 4))),
        (8, False, (1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))),
    ],
)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_output_stride_becomes_dilation(
    bottleneck, output_stride, dilate_first_conv, strides, dilations, tmp_path
):
    block = Bottleneck if bottleneck else BasicBlock
    net = ImageNetResNet(
        block,
        (1, 1, 2, 2),
        width=8,
        num_classes=10,
        strides=strides,
        dilations=dilations,
    )
    model = ResNet(
        (1, 1, 2, 2),
        10,
        width=8,
        bottleneck=bottleneck,
        output_stride=output_stride,
        dilate_first_conv=dilate_first_conv,
    )
    check_parity(net, model, tmp_path, [(75, 64)])


def test_cifar_resnet(tmp_path):
    net = SmallResNet(3, width=16, num_classes=10)
    check_parity(net, cifar_resnet(20), tmp_path, [(32, 32), (33, 27)])


def test_residual_adapter_resnet26(tmp_path):
    net = SmallResNet(4, width=64, num_classes=10, adapter=True)
    check_parity(net, residual_adapter_resnet26(10), tmp_path, [(64, 64), (72, 56)])


@pytest.mark.parametrize("family", ["resnet18", "resnet50", "resnet26"])
def test_training_mode_normalizes_and_updates_statistics(family, tmp_path):
    if family == "resnet26":
        net = SmallResNet(4, width=8, num_classes=10, adapter=True)
        model = residual_adapter_resnet26(10, width=8)
    else:
        make, block, sizes = IMAGENET[family]
        net = ImageNetResNet(block, sizes, width=8, num_classes=10)
        model = make(10, width=8)
    before = load(randomize(net), model, tmp_path)
    counts = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, args, __, name=name: counts.update(
                    {name: args[0].numel() // args[0].shape[1]}
                )
            )
    x = images((64, 64), batch=8)
    expected = torch_logits(net, x, train=True)
    found, state = jax.jit(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    )(before._asdict(), x)
    assert gap(found, expected) < 1e-4
    assert gap(found, torch_logits(net, x)) > 1e-2

    old = export_resnet(before.params, before.batch_stats, model)
    new = export_resnet(before.params, state["batch_stats"], model)
    for name, n in counts.items():
        module = net.get_submodule(name)
        mean, var = module.running_mean.numpy(), module.running_var.numpy()
        np.testing.assert_allclose(new[f"{name}.running_mean"], mean, atol=1e-4)
        # PyTorch keeps the unbiased variance: take its n / (n - 1) back.
        kept = 0.9 * old[f"{name}.running_var"]
        biased = kept + (var - kept) * (n - 1) / n
        np.testing.assert_allclose(
            new[f"{name}.running_var"], biased, rtol=1e-4, atol=1e-5
        )
        assert np.abs(new[f"{name}.running_var"] - kept / 0.9).max() > 1e-2


def test_export_loads_into_pytorch(tmp_path):
    """Strict loading, but for the counters that Flax does not keep."""
    model = resnet50(10, width=8)
    net = randomize(ImageNetResNet(Bottleneck, (3, 4, 6, 3), width=8, num_classes=10))
    weights = load(net, model, tmp_path)
    exported = export_resnet(weights.params, weights.batch_stats, model)
    state = {name: torch.from_numpy(w) for name, w in exported.items()}
    again = ImageNetResNet(Bottleneck, (3, 4, 6, 3), width=8, num_classes=10)
    keys = again.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in keys.missing_keys)
    x = images((64, 48))
    np.testing.assert_array_equal(torch_logits(again, x), torch_logits(net, x))
