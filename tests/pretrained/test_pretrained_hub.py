"""Hub names: found in a cache laid out as the hub's own, or explained."""

import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ftn_jax.models import cifar_resnet, resnet18
from ftn_jax.pretrained import HubFileNotFound, export_resnet, load_resnet, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def place(cache, file, *, repo="timm/resnet18.tv_in1k", revision="main"):
    """Make room for a repository's file where the hub client would put it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    path = root / "snapshots" / COMMIT / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_loads_a_cached_resnet_by_its_hub_name(cache):
    model = cifar_resnet(8, width=4)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5), shapes)
    weights = export_resnet(variables["params"], variables["batch_stats"], model)
    save_file(weights, place(cache, "model.safetensors"))
    found = load_resnet("hf://timm/resnet18.tv_in1k", model)
    jax.tree.map(np.testing.assert_array_equal, found._asdict(), variables)


@pytest.mark.parametrize(
    ("name", "file", "revision"),
    [
        ("hf://timm/resnet18.tv_in1k", "model.safetensors", "main"),
        ("hf://timm/resnet18.tv_in1k/pytorch_model.bin", "pytorch_model.bin", "main"),
        ("hf://timm/resnet18.tv_in1k@v1/deep/net.npz", "deep/net.npz", "v1"),
    ],
)
def test_finds_files_and_revisions(name, file, revision, cache):
    path = place(cache, file, revision=revision)
    path.write_bytes(b"weights")
    assert locate(name) == path


def test_local_paths_pass_unchanged(tmp_path):
    assert locate(tmp_path / "net.npz") == tmp_path / "net.npz"
    assert str(locate("folder/net.npz")) == "folder/net.npz"


def test_offline_says_which_file_to_place_where(cache):
    with pytest.raises(HubFileNotFound) as error:
        load_resnet("hf://timm/resnet50.tv_in1k", resnet18())
    message = str(error.value)
    assert (
        "hf://timm/resnet50.tv_in1k: model.safetensors is not in the cache" in message
    )
    assert str(cache) in message
    url = "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors"
    assert url in message
    assert "give its local path" in message


@pytest.mark.parametrize("name", ["hf://timm", "hf://", "hf://a b/c", "hf://a/b@/c"])
def test_refuses_malformed_names(name):
    with pytest.raises(ValueError, match="write hf://owner/repo"):
        locate(name)


def test_says_which_extra_brings_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'ftn_jax\[hub\]'"):
        locate("hf://timm/resnet18.tv_in1k")
