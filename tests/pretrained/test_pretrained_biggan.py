"""Checkpoints of generators: every key used once, the wrong variant named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ftn_jax.models import BigGAN, biggan_deep
from ftn_jax.pretrained import (
    CheckpointMismatch,
    biggan_of,
    export_biggan,
    load_biggan,
    load_biggan_deep,
)

MODEL = BigGAN((8, 8, 16), num_classes=3, chunk=2, shared_dim=4, attention=(16,))
DEEP = biggan_deep(128, width=8, num_classes=3, dim_z=4)


@pytest.fixture(scope="module")
def variables():
    z, y = jnp.zeros((1, MODEL.dim_z)), jnp.zeros((1,), jnp.int32)
    return jax.jit(MODEL.init)(jax.random.key(0), z, y)


@pytest.fixture(scope="module")
def weights(variables):
    return export_biggan(variables["params"], variables["batch_stats"], MODEL)


def test_export_and_load_give_the_same_bytes(variables, weights, tmp_path):
    save_file(weights, tmp_path / "generator.safetensors")
    model, found = load_biggan(tmp_path / "generator.safetensors")
    assert model == MODEL
    expected = flatten_dict(variables, sep="/")
    again = flatten_dict(found._asdict(), sep="/")
    assert again.keys() == expected.keys()
    for path, leaf in again.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_spectral_norm_is_folded(weights):
    rng = np.random.default_rng(0)
    key = "blocks.0.0.conv1"
    w = weights[f"{key}.weight"]
    # A rank-one kernel's power iteration is exact after one step.
    o, i = rng.normal(size=len(w)), rng.normal(size=w[0].size)
    w = np.outer(o, i).reshape(w.shape).astype(np.float32)
    changed = weights | {
        f"{key}.weight": w,
        f"{key}.u0": rng.normal(size=(1, len(w))).astype(np.float32),
        f"{key}.sv0": np.ones(1, np.float32),
    }
    _, found = load_biggan(changed, MODEL)
    kernel = found.params["block0"]["conv1"]["kernel"]
    sigma = np.linalg.norm(o) * np.linalg.norm(i)
    np.testing.assert_allclose(
        kernel, w.transpose(2, 3, 1, 0) / sigma, rtol=1e-5, atol=1e-7
    )


def test_every_misfit_is_listed(weights):
    odd = {k: v for k, v in weights.items() if k != "linear.bias"}
    odd |= {
        "blocks.0.0.conv9.u0": np.ones((1, 8), np.float32),
        "output_layer.2.bias": np.zeros(4, np.float32),
        "blocks.1.0.bn1.stored_mean": np.full(8, np.nan, np.float32),
    }
    with pytest.raises(CheckpointMismatch) as error:
        load_biggan(odd, MODEL)
    text = str(error.value)
    assert "4 keys do not fit" in text and "missing: linear.bias" in text
    assert "left over: blocks.0.0.conv9.u0" in text
    assert "output_layer.2.bias, found (4,), expected (3,)" in text
    assert "NaN or Inf: blocks.1.0.bn1.stored_mean" in text


def test_another_width_is_refused(weights):
    with pytest.raises(CheckpointMismatch, match="do not fit.*(?s:.*)resolution"):
        load_biggan(weights, MODEL.clone(channels=(8, 8, 8)))


@pytest.mark.parametrize(
    "key, shape",
    [
        ("blocks.0.0.conv1.u0", (1, 3)),
        ("blocks.0.0.conv1.weight", (8,)),
        ("shared.weight", (3,)),
    ],
)
def test_an_array_of_another_form_is_named(weights, key, shape):
    changed = weights | {key: np.ones(shape, np.float32)}
    with pytest.raises(CheckpointMismatch, match=f"{key} has shape .{shape[0]}"):
        load_biggan(changed)


def test_the_other_variant_is_named(weights):
    with pytest.raises(CheckpointMismatch, match="load it with load_biggan$"):
        load_biggan_deep(weights, DEEP)
    deep = {"generator.gen_z.weight_orig": np.zeros((4, 4), np.float32)}
    with pytest.raises(CheckpointMismatch, match="load it with load_biggan_deep"):
        load_biggan(deep)
    with pytest.raises(CheckpointMismatch, match="not the generator of a BigGAN"):
        biggan_of({"conv1.weight": np.zeros((1, 1, 1, 1), np.float32)})


def test_a_deep_checkpoint_of_another_size_is_refused():
    name = "embeddings.weight"
    with pytest.raises(CheckpointMismatch, match="missing: generator.gen_z"):
        load_biggan_deep({name: np.zeros((4, 3), np.float32)}, DEEP)


def test_export_refuses_another_models_arrays(variables):
    with pytest.raises(ValueError, match=r"embedding has shape \(3, 4\), the model"):
        export_biggan(
            variables["params"],
            variables["batch_stats"],
            MODEL.clone(num_classes=5),
        )
