"""Each ViT gives the numbers of transformers, or of a PyTorch transcription of CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.models.vit import ViT
from ftn_jax.models.vit_family import clip_vit_b32
from ftn_jax.pretrained.matching import CheckpointMismatch
from ftn_jax.pretrained.vit import load_vit

torch = pytest.importorskip("torch")

from .torch_clip import ResidualBlock, Visual  # noqa: E402

SIZES = {"width": 48, "depth": 2, "heads": 3, "mlp_width": 80, "image_px": 32}
CLIP = SIZES | {
    "num_classes": None,
    "patch_px": 8,
    "activation": "quick_gelu",
    "patch_bias": False,
    "stem_norm": True,
    "projection_width": 20,
    "norm_epsilon": 1e-5,
}
PLAIN = SIZES | {"num_classes": 5, "patch_px": 8, "norm_epsilon": 1e-12}


def config_of(kind, settings):
    """Say a model's settings in transformers' words."""
    transformers = pytest.importorskip("transformers")
    options = {
        "hidden_size": settings["width"],
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "intermediate_size": settings["mlp_width"],
        "image_size": settings["image_px"],
        "patch_size": settings["patch_px"],
    }
    if kind == "CLIPVisionConfig":
        return transformers.CLIPVisionConfig(
            **options, projection_dim=settings["projection_width"]
        )
    return getattr(transformers, kind)(**options, num_labels=settings["num_classes"])


def make(name, config):
    """Make a transformers network with weights as strong as trained ones."""
    transformers = pytest.importorskip("transformers")
    return randomize(getattr(transformers, name)(config))


def randomize(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                p.copy_(0.3 * noise + name.endswith("weight"))
            elif p.ndim in (2, 4) and "position" not in name:
                p.copy_(1.5 * noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.5 * noise)
    return net.eval()


def arrays(net):
    return {name: w.numpy() for name, w in net.state_dict().items()}


def images(px, batch=2, seed=0):
    height, width = (px, px) if isinstance(px, int) else px
    x = np.random.default_rng(seed).normal(size=(batch, height, width, 3))
    return x.astype(np.float32)


def outputs(net, x, **options):
    with torch.no_grad():
        return net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), **options)


def gap(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def run(model, weights, x, **options):
    call = jax.jit(lambda v, x: model.apply(v, x, **options))
    return call({k: v for k, v in weights._asdict().items() if v}, x)


def test_clip_tower_with_projection(tmp_path):
    net = make("CLIPVisionModelWithProjection", config_of("CLIPVisionConfig", CLIP))
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    model, x = ViT(**CLIP), images(32)
    weights = load_vit(tmp_path / "clip.pt", model)
    expected = outputs(net, x)
    found = run(model, weights, x, features=True)
    assert gap(found["pooled"], expected.image_embeds) < 1e-4
    # The patches' tokens leave CLIP before the last LayerNorm.
    tokens = net.vision_model.post_layernorm(expected.last_hidden_state)
    assert gap(found["tokens"], tokens.detach()) < 1e-4
    wrong = {"heads": 4, "activation": "gelu", "norm_epsilon": 1e-2}
    for option, least in zip(wrong.items(), (1e-2, 1e-3, 1e-3), strict=True):
        other = model.clone(**dict([option]))
        weights = load_vit(arrays(net), other)
        assert gap(run(other, weights, x), expected.image_embeds) > least, option


@pytest.mark.parametrize("px", [48, (40, 24)])
def test_clip_tower_at_another_resolution(px):
    net = make("CLIPVisionModelWithProjection", config_of("CLIPVisionConfig", CLIP))
    model, x = ViT(**CLIP | {"image_px": px, "scan_layers": True}), images(px)
    weights = load_vit(arrays(net), model)
    expected = outputs(net, x, interpolate_pos_encoding=True).image_embeds
    assert gap(run(model, weights, x), expected) < 1e-4
    weights.params["position_embedding"] = jnp.roll(
        weights.params["position_embedding"], 1, axis=0
    )
    assert gap(run(model, weights, x), expected) > 1e-2


def test_clip_tower_without_projection():
    """`CLIPVisionModel` has none; version 5 has no prefix either."""
    settings = CLIP | {"projection_width": None}
    net = make("CLIPVisionModel", config_of("CLIPVisionConfig", CLIP))
    model, x = ViT(**settings), images(32)
    expected = outputs(net, x).pooler_output
    weights = arrays(net)
    bare = {k.removeprefix("vision_model."): w for k, w in weights.items()}
    prefixed = {f"vision_model.{k}": w for k, w in bare.items()}
    trees = [load_vit(w, model) for w in (weights, bare, prefixed)]
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])
    assert gap(run(model, trees[0], x), expected) < 1e-4
    with pytest.raises(CheckpointMismatch, match="missing: visual_projection.weight"):
        load_vit(weights, ViT(**CLIP))


def test_whole_clip_model_passes_over_the_text_tower():
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 9}
    text |= {"bos_token_id": 7, "eos_token_id": 8}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=config_of("CLIPVisionConfig", CLIP).to_dict(),
        projection_dim=20,
    )
    net = make("CLIPModel", config)
    x = images(32)
    pooled = outputs(net.vision_model, x).pooler_output
    with torch.no_grad():
        expected = net.visual_projection(pooled)
    model = ViT(**CLIP)
    weights = load_vit(arrays(net), model)
    assert gap(run(model, weights, x), expected) < 1e-4
    towers = load_vit(arrays(net), model.clone(projection_width=None))
    assert set(weights.params) - set(towers.params) == {"projection"}


def test_full_width_clip_b32():
    """At 224 px, two of the twelve blocks."""
    settings = {"width": 768, "depth": 2, "heads": 12, "mlp_width": 3072}
    settings |= {"image_px": 224, "patch_px": 32, "projection_width": 512}
    net = make("CLIPVisionModelWithProjection", config_of("CLIPVisionConfig", settings))
    model, x = clip_vit_b32(depth=2), images(224)
    weights = load_vit(arrays(net), model)
    expected = outputs(net, x).image_embeds
    assert gap(run(model, weights, x), expected) < 1e-4
    wrong = model.clone(heads=8)
    assert gap(run(wrong, load_vit(arrays(net), wrong), x), expected) > 1e-2


@pytest.mark.parametrize("px", [32, 48])
def test_vit_classifier(px):
    net = make("ViTForImageClassification", config_of("ViTConfig", PLAIN))
    model, x = ViT(**PLAIN | {"image_px": px}), images(px)
    expected = outputs(net, x, interpolate_pos_encoding=True).logits
    weights = load_vit(arrays(net), model)
    assert gap(run(model, weights, x), expected) < 1e-4
    wrong = model.clone(heads=4)
    assert gap(run(wrong, load_vit(arrays(net), wrong), x), expected) > 1e-2


def test_vit_features_leave_the_pooler_out():
    net = make("ViTModel", config_of("ViTConfig", PLAIN))
    model, x = ViT(**PLAIN | {"num_classes": None}), images(32)
    found = run(model, load_vit(arrays(net), model), x, features=True)
    assert gap(found["tokens"], outputs(net, x).last_hidden_state) < 1e-4
    assert gap(found["pooled"], outputs(net, x).pooler_output) > 1e-2


def test_distilled_deit():
    net = make("DeiTForImageClassificationWithTeacher", config_of("DeiTConfig", PLAIN))
    model, x = ViT(**PLAIN, distilled=True), images(32)
    weights = load_vit(arrays(net), model)
    found, expected = run(model, weights, x), outputs(net, x)
    assert gap(found, expected.logits) < 1e-4
    assert gap(found, expected.cls_logits) > 1e-2


def test_saved_by_transformers(tmp_path):
    """Version 5 saves ViTs under the names of version 4."""
    net = make("ViTForImageClassification", config_of("ViTConfig", PLAIN))
    net.save_pretrained(tmp_path)
    model = ViT(**PLAIN)
    saved = load_vit(tmp_path / "model.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, saved, load_vit(arrays(net), model))


def test_openai_clip():
    keys = ("width", "depth", "heads", "mlp_width", "image_px", "patch_px")
    net = torch.nn.Module()
    net.visual = Visual(*(CLIP[key] for key in keys), out=20)
    # Names of the text tower, which repeat those of the image tower.
    net.transformer = torch.nn.Module()
    net.transformer.resblocks = torch.nn.Sequential(ResidualBlock(8, 2, 8))
    net.positional_embedding = torch.nn.Parameter(torch.empty(77, 8))
    net.text_projection = torch.nn.Parameter(torch.empty(8, 20))
    net.logit_scale = torch.nn.Parameter(torch.empty(()))
    randomize(net)
    model, x = ViT(**CLIP), images(32)
    weights = load_vit(arrays(net), model)
    expected = outputs(net.visual, x)
    assert gap(run(model, weights, x), expected) < 1e-4
    attention = weights.params["blocks_1"]["attention"]
    attention["query"], attention["value"] = attention["value"], attention["query"]
    assert gap(run(model, weights, x), expected) > 1e-2
    # The tower alone, in half precision, as OpenAI keeps it.
    half = {name: w.astype(np.float16) for name, w in arrays(net.visual).items()}
    found = load_vit(half, model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        found.params["blocks_0"],
        weights.params["blocks_0"],
    )
