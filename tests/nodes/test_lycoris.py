"""The same factors in LyCORIS and here give the same layer outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ftn_jax.nodes import Kronecker, LoRA

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")


def filled(module):
    """Draw every factor anew: one starts at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def numpy(tensor):
    return tensor.detach().numpy()


def assert_same(found, expected, frozen):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)
    assert np.abs(expected - frozen).max() > 1e-2 * size  # negative control


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)]
)
def test_locon_is_lora_of_a_convolution(strides, padding, dilation):
    from lycoris.modules.locon import LoConModule

    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 8, 3, strides, padding, dilation)
    # An alpha of twice the rank scales by 2.
    theirs = filled(LoConModule("conv", layer, 1.0, 4, 8.0)).eval()
    down, up = numpy(theirs.lora_down.weight), numpy(theirs.lora_up.weight)
    w = jnp.asarray(numpy(layer.weight).transpose(2, 3, 1, 0))
    node = LoRA.init(jax.random.key(0), w, rank=4, alpha=8.0).replace(
        a=jnp.asarray(down.transpose(2, 3, 1, 0).reshape(-1, 4)),
        b=jnp.asarray(up[:, :, 0, 0].T),
    )
    x = np.random.default_rng(0).normal(size=(2, 6, 9, 9)).astype(np.float32)
    merged = layer.weight + theirs.get_diff_weight()[0]
    conv = torch.nn.functional.conv2d
    options = {"stride": strides, "padding": padding, "dilation": dilation}
    expected = numpy(conv(torch.from_numpy(x), merged, **options))
    frozen = numpy(conv(torch.from_numpy(x), layer.weight, **options))
    found = lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1),
        node.merge(w),
        (strides, strides),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    assert_same(np.asarray(found).transpose(0, 3, 1, 2), expected, frozen)


def test_lokr_is_a_sum_of_one_kronecker_product():
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False)
    theirs = filled(LokrModule("dense", layer, 1.0, 100_000, 1, factor=2))
    w1, w2 = numpy(theirs.lokr_w1), numpy(theirs.lokr_w2)
    assert w1.shape == (2, 2) and w2.shape == (4, 4)
    w = jnp.asarray(numpy(layer.weight).T)
    start = Kronecker.init(jax.random.key(0), w, n=2, rank=4, factorised=False, scale=1)
    zero = np.zeros
    node = start.replace(  # the second of its two products is nothing
        slow=(jnp.asarray(np.stack([w1.T, zero((2, 2), np.float32)])),),
        u=jnp.asarray(np.stack([w2.T, zero((4, 4), np.float32)])),
        v=jnp.asarray(np.stack([np.eye(4, dtype=np.float32)] * 2)),
    )
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    expected = x @ (numpy(layer.weight) + numpy(theirs.get_weight((8, 8)))).T
    frozen = x @ numpy(layer.weight).T
    assert_same(x @ np.asarray(node.merge(w)), expected, frozen)
