"""ViT checkpoints: the same weights under every layout's names, and every misfit.

The parity tests compare the layouts of transformers and OpenAI with the networks they
belong to; here the others are held against these.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ftn_jax.models.vit_layers import unstack_layers
from ftn_jax.pretrained.matching import CheckpointMismatch
from ftn_jax.pretrained.vit import load_vit

from .vit_checkpoints import (
    CLIP,
    HEADS,
    PLAIN,
    WIDTH,
    hf_clip,
    hf_vit,
    hf_vit_5,
    jax_vit,
    openai_clip,
    timm_clip,
    timm_vit,
)

LAYOUTS = {
    "timm": (timm_vit, hf_vit, PLAIN),
    "transformers 5": (hf_vit_5, hf_vit, PLAIN),
    "jax": (jax_vit, hf_vit, PLAIN),
    "timm clip": (timm_clip, hf_clip, CLIP),
    "openai": (openai_clip, hf_clip, CLIP),
}


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_leaves(name, tmp_path):
    convert, make, model = LAYOUTS[name]
    converted, expected = convert(make()), load_vit(make(), model)
    assert len(converted.keys() - make().keys()) > 16
    equal(load_vit(converted, model), expected)
    # From files, as users do: safetensors takes no views.
    whole = {k: np.ascontiguousarray(w) for k, w in converted.items()}
    save_file(whole, tmp_path / "vit.safetensors")
    np.savez(tmp_path / "vit.npz", **converted)
    stacked = load_vit(tmp_path / "vit.npz", model.clone(scan_layers=True))
    equal(unstack_layers(stacked.params), expected.params)
    equal(load_vit(tmp_path / "vit.safetensors", model), expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_heads_are_blocks_of_rows(scan_layers):
    """Row `4 h + e` of a query weight is entry (h, e) of the kernel's last axes."""
    weights = hf_vit()
    params = load_vit(weights, PLAIN.clone(scan_layers=scan_layers)).params
    if scan_layers:
        params = unstack_layers(params)
    block = "vit.encoder.layer.1.attention"
    attention = params["blocks_1"]["attention"]
    query, out = attention["query"]["kernel"], attention["out"]["kernel"]
    assert query.shape == (WIDTH, HEADS, 4) and out.shape == (HEADS, 4, WIDTH)
    row = weights[f"{block}.attention.query.weight"][4 * 2 + 1]
    np.testing.assert_array_equal(query[:, 2, 1], row)
    column = weights[f"{block}.output.dense.weight"][:, 4 * 2 + 1]
    np.testing.assert_array_equal(out[2, 1], column)
    bias = weights[f"{block}.attention.query.bias"]
    np.testing.assert_array_equal(attention["query"]["bias"][2], bias[8:])


def test_by_hub_name(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, repo = "0" * 40, tmp_path / "models--some--vit"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    save_file(hf_vit(), repo / "snapshots" / commit / "model.safetensors")
    equal(load_vit("hf://some/vit", PLAIN), load_vit(hf_vit(), PLAIN))


def test_loaded_arrays_are_copies():
    weights = openai_clip(hf_clip())
    found = load_vit(weights, CLIP)
    for array in weights.values():
        array[...] = 0
    for path, leaf in flatten_dict(found.params, sep="/").items():
        assert np.any(leaf), path
        assert leaf.dtype == jnp.float32, path


def test_without_classes_the_head_is_left_out():
    expected = load_vit(hf_vit(), PLAIN)
    expected.params.pop("head")
    headless = PLAIN.clone(num_classes=None)
    equal(load_vit(hf_vit(), headless), expected)
    older = jax_vit(hf_vit()) | {"pre_logits/kernel": np.ones((WIDTH, WIDTH))}
    equal(load_vit(older, headless), expected)
    with pytest.raises(CheckpointMismatch, match="left over: pre_logits/kernel"):
        load_vit(older, PLAIN)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_new_head_starts_at_zero(name):
    convert, make, model = LAYOUTS[name]
    model = model.clone(num_classes=9, feature_norm=True)
    found = load_vit(convert(make()), model, new_head=True)
    expected = load_vit(make(), model.clone(num_classes=None, feature_norm=False))
    head = found.params.pop("head")
    equal(found.params, expected.params)
    inputs = model.projection_width or WIDTH
    equal(head, {"kernel": jnp.zeros((inputs, 9)), "bias": jnp.zeros(9)})
    stats = {"mean": jnp.zeros(inputs), "var": jnp.ones(inputs)}
    equal(found.batch_stats, {"feature_bn": stats})
    with pytest.raises(CheckpointMismatch, match="num_classes=None"):
        load_vit(convert(make()), model)
