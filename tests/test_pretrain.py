"""A backbone that was pretrained before is read back, if it is this network's."""

import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

from ftn_jax.method import Backbone
from ftn_jax.presets import RESNET
from ftn_jax.pretrain import pretrain


@pytest.fixture
def start():
    return Backbone(
        None, {"w": jnp.zeros((2, 3))}, {"stats": {"m": jnp.ones(3)}}, RESNET
    )


def read(start, path):
    transforms = {"train_transform": None, "eval_transform": None}
    return pretrain(start, None, None, None, path=path, **transforms)


def test_what_is_there_is_read_and_not_trained_again(start, tmp_path):
    path = tmp_path / "backbone.safetensors"
    w, m = jnp.arange(6.0).reshape(2, 3), jnp.full(3, 2.0)
    save_file({"params/w": w.__array__(), "stats/m": m.__array__()}, path)
    found = read(start, path)
    assert found.shared["w"].tolist() == w.tolist()
    assert found.model_state["stats"]["m"].tolist() == m.tolist()


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("params/w", (3, 2), r"params/w has shape \(3, 2\), expected \(2, 3\)"),
        ("params/v", (2,), r"params/v has shape \(2,\), expected None"),
    ],
)
def test_another_networks_is_refused(start, tmp_path, name, shape, message):
    path = tmp_path / "backbone.safetensors"
    arrays = {"params/w": jnp.zeros((2, 3)), "stats/m": jnp.ones(3)}
    arrays |= {name: jnp.zeros(shape)}
    save_file({k: x.__array__() for k, x in arrays.items()}, path)
    with pytest.raises(ValueError, match=f"backbone.*another network: {message}"):
        read(start, path)
