"""Task files of masked networks: one bit a weight, and the same parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import (
    Task,
    compact,
    count,
    make_delta,
    materialize,
    restore_task,
    save_task,
)
from ftn_jax.core import trainable, with_trained
from ftn_jax.models import RESNETS
from ftn_jax.nodes.mask import AffineMask, Piggyback
from ftn_jax.nodes.switch import ChannelSwitch


@pytest.fixture(scope="module")
def resnet():
    """CIFAR ResNet-8's parameters, random."""
    model, x = RESNETS["cifar_resnet8"](num_classes=10), jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes
    )


def masked(shared, rules):
    """A delta whose masks are spread around their thresholds."""
    delta = make_delta(jax.random.key(0), shared, rules)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), trainable(delta)
    )
    return with_trained(delta, trained)


def payload(folder):
    """Bytes of the tensors in a safetensors file: the file without its header."""
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_masked_resnet_is_one_bit_a_weight(resnet, tmp_path):
    delta = masked(resnet, {".*conv.*/kernel": Piggyback.init})
    sizes = [x.size for x in jax.tree.leaves(delta)]
    assert len(sizes) == 7 and sum(sizes) == count(delta).total > 70_000
    params = materialize(resnet, delta)
    small = compact(delta)
    assert count(small).bytes == sum(-(-n // 8) for n in sizes)
    assert count(delta).bytes == 4 * sum(sizes)
    save_task(tmp_path / "real", Task(delta, {}), shared=resnet, name="real")
    save_task(tmp_path / "bits", Task(small, {}), shared=resnet, name="bits")
    assert payload(tmp_path / "real") == 4 * sum(sizes)
    bits = payload(tmp_path / "bits")
    assert sum(sizes) / 8 <= bits < sum(sizes) / 8 + len(sizes) + 8  # 8: alignment
    found = restore_task(tmp_path / "bits", resnet).task.delta
    assert jax.tree.structure(found) == jax.tree.structure(small)
    assert_equal(materialize(resnet, found), params)
    kernels = [k for k in jax.tree.leaves(params) if k.ndim == 4]
    off = sum(int((k == 0).sum()) for k in kernels) / sum(sizes)
    assert 0.45 < off < 0.55  # the network is another one


def test_every_mask_comes_back_bit_for_bit(resnet, tmp_path):
    rules = {
        "stem/.*kernel": ChannelSwitch.init,
        "layer1.*/kernel": lambda k, w: Piggyback.init(k, w, ternary=True),
        "layer2.*/kernel": AffineMask.init,
        "layer3.*/kernel": lambda k, w: ChannelSwitch.init(k, w, side="input"),
        "head/kernel": Piggyback.init,
    }
    delta = masked(resnet, rules)
    params = materialize(resnet, delta)
    folder = save_task(tmp_path, Task(compact(delta), {}), shared=resnet, name="all")
    found = restore_task(folder, resnet).task.delta
    assert_equal(materialize(resnet, found), params)
    assert payload(folder) < count(delta).bytes / 12
    for path, found in jax.tree_util.tree_leaves_with_path(params):
        if re.search("kernel", jax.tree_util.keystr(path)):
            kernel = resnet
            for entry in path:
                kernel = kernel[entry.key]
            assert np.abs(found - kernel).max() > 0.1, path
