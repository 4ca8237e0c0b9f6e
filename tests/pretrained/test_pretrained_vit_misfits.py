"""What does not fit a ViT is refused, and every key of it named."""

import numpy as np
import pytest

from ftn_jax.pretrained.matching import CheckpointMismatch
from ftn_jax.pretrained.vit import load_vit

from .vit_checkpoints import (
    CLIP,
    PLAIN,
    hf_clip,
    hf_vit,
    hf_vit_5,
    jax_vit,
    openai_clip,
    timm_clip,
    timm_vit,
)


def refusal(weights, model, **options):
    with pytest.raises(CheckpointMismatch) as error:
        load_vit(weights, model, **options)
    return str(error.value)


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


QKV = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (drop(QKV), f"missing: {QKV}, expected (36, 12)"),
        (drop("cls_token"), "missing: cls_token, expected (12,)"),
        (drop("pos_embed"), "missing: pos_embed, expected (10, 12)"),
        (drop("head.bias"), "missing: head.bias, expected (5,)"),
        (
            drop("patch_embed.proj.bias"),
            "missing: patch_embed.proj.bias, expected (12,)",
        ),
        (
            put("blocks.0.ls1.gamma", np.ones(12)),
            "left over: blocks.0.ls1.gamma, found (12,)",
        ),
        (
            put("norm_pre.weight", np.ones(12)),
            "left over: norm_pre.weight, found (12,)",
        ),
        (
            put("dist_token", np.ones((1, 1, 12))),
            "left over: dist_token, found (1, 1, 12)",
        ),
        (
            put(QKV, np.ones((12, 36))),
            f"mis-shaped: {QKV}, found (12, 36), expected (36, 12)",
        ),
        (
            put("patch_embed.proj.weight", np.ones((12, 3, 2, 2))),
            "mis-shaped: patch_embed.proj.weight, found (12, 3, 2, 2), "
            "expected (12, 3, 4, 4)",
        ),
        (
            put("pos_embed", np.ones((1, 9, 12))),
            "mis-shaped: pos_embed, found (1, 9, 12), expected (10, 12)",
        ),
        (
            put("pos_embed", np.ones((1, 10, 16))),
            "mis-shaped: pos_embed, found (1, 10, 16), expected (10, 12)",
        ),
        (
            put("cls_token", np.ones((2, 1, 12))),
            "mis-shaped: cls_token, found (2, 1, 12), expected (12,)",
        ),
        (put("norm.bias", np.full(12, np.nan)), "NaN or Inf: norm.bias"),
        (put("norm.bias", np.full(12, 1e300)), "NaN or Inf: norm.bias"),
        (
            put("norm.bias", np.ones(12, int)),
            "not floating point: norm.bias, found int64",
        ),
    ],
)
def test_each_misfit_is_named(change, line):
    weights = timm_vit(hf_vit())
    load_vit(weights, PLAIN)
    change(weights)
    message = refusal(weights, PLAIN)
    assert f"the given arrays: 1 keys do not fit the model\n  {line}\n" in message


def test_the_sizes_of_both_are_told():
    message = refusal(openai_clip(hf_clip()), CLIP.clone(depth=3, image_px=24))
    assert (
        "The checkpoint is of OpenAI CLIP with 2 blocks, visual.conv1.weight "
        "(12, 3, 4, 4), visual.positional_embedding (10, 12); the model has 3 blocks "
        "of width 12, patches of 4 px and 1 + 6 x 6 positions." in message
    )
    name = "visual.transformer.resblocks.2.attn.in_proj_weight"
    assert f"missing: {name}, expected (36, 12)" in message
    # Six of the attention's eight leaves share two keys.
    assert "12 keys do not fit" in message


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_blocks_left_over_are_not_taken_for_a_text_tower(prefix):
    weights = {
        prefix + name.removeprefix("visual."): w
        for name, w in openai_clip(hf_clip()).items()
    }
    text = {} if prefix == "" else {"transformer.resblocks.0.ln_1.bias": np.ones(3)}
    load_vit(weights | text, CLIP)
    message = refusal(weights | text, CLIP.clone(depth=1))
    assert f"left over: {prefix}transformer.resblocks.1.ln_1.bias" in message
    assert "12 keys do not fit" in message


@pytest.mark.parametrize("convert", [timm_vit, jax_vit, hf_vit_5])
def test_a_clip_model_is_not_filled_from_a_plain_vit(convert):
    message = refusal(convert(hf_vit()), CLIP.clone(projection_width=None))
    assert "norm_pre" in message
    assert "left over: " in message  # the patch embedding's bias
    message = refusal(convert(hf_vit()), PLAIN.clone(distilled=True))
    assert "dist" in message and "token" in message


@pytest.mark.parametrize("convert", [timm_clip, openai_clip, dict])
def test_a_plain_model_is_not_filled_from_clip(convert):
    message = refusal(convert(hf_clip()), PLAIN)
    assert "missing: " in message and "left over: " in message


def test_a_head_that_the_layout_never_has():
    message = refusal(hf_clip(), CLIP.clone(num_classes=5))
    assert "2 keys do not fit" in message
    assert "missing: head/kernel, transformers CLIP has none" in message
    assert "new_head=True" in message


def test_timms_projection_has_no_bias():
    weights = timm_clip(hf_clip())
    weights["head.bias"] = np.ones(7, np.float32)
    assert "left over: head.bias, found (7,)" in refusal(weights, CLIP)
    # Without a projection the same array is a classifier's.
    classifier = CLIP.clone(projection_width=None, num_classes=7)
    head = load_vit(weights, classifier).params["head"]
    np.testing.assert_array_equal(head["bias"], 1)
    np.testing.assert_array_equal(head["kernel"].T, weights["head.weight"])


def test_the_number_of_heads_shows_in_the_jax_layout_alone():
    other = PLAIN.clone(heads=2)
    load_vit(timm_vit(hf_vit()), other)
    message = refusal(jax_vit(hf_vit()), other)
    assert "query/kernel, found (12, 3, 4), expected (12, 2, 6)" in message


def test_several_towers_need_a_prefix():
    one, two = timm_vit(hf_vit()), timm_vit(hf_vit())
    two["norm.bias"] = two["norm.bias"] + 1
    weights = {f"a.{k}": w for k, w in one.items()}
    expected = load_vit(one, PLAIN).params["norm"]["bias"]
    np.testing.assert_array_equal(
        load_vit(weights, PLAIN).params["norm"]["bias"], expected
    )
    weights |= {f"b.{k}": w for k, w in two.items()}
    for prefix in (None, "c."):
        message = refusal(weights, PLAIN, prefix=prefix)
        assert "(timm ViT) under the prefixes ['a.', 'b.']" in message
        assert f"prefix={prefix!r}" in message
    for prefix, more in (("a.", 0), ("b.", 1)):
        found = load_vit(weights, PLAIN, prefix=prefix).params["norm"]["bias"]
        np.testing.assert_array_equal(found, expected + more)
    weights["c.norm.bias"] = two["norm.bias"]
    message = refusal(weights, PLAIN, prefix="a.")
    assert "1 keys do not fit the model\n  left over: c.norm.bias" in message


def test_no_vit_at_all():
    message = refusal({"conv1.weight": np.ones((4, 3, 7, 7))}, PLAIN)
    assert "no ViT of a known layout (OpenAI CLIP, transformers CLIP," in message
    assert "['conv1.weight']" in message
