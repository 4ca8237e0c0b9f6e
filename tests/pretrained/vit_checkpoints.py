"""Random checkpoints of small ViTs, under the names and layouts of each kind.

Written out from what the publishers' own code saves, apart from the tables of the
package.
"""

import re

import numpy as np

from ftn_jax.models.vit import ViT

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, CLASSES = 12, 3, 2, 20, 4, 5
PLAIN = ViT(
    CLASSES,
    image_px=12,
    patch_px=PATCH,
    width=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    mlp_width=HIDDEN,
)
CLIP = PLAIN.clone(
    num_classes=None, patch_bias=False, stem_norm=True, projection_width=7
)


def fill(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def hf_vit(rows=10):
    """Random weights of a `ViTForImageClassification` as transformers saves them."""
    shapes = {
        "vit.embeddings.cls_token": (1, 1, WIDTH),
        "vit.embeddings.position_embeddings": (1, rows, WIDTH),
        "vit.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "vit.embeddings.patch_embeddings.projection.bias": (WIDTH,),
        **norm("vit.layernorm"),
        **linear("classifier", CLASSES, WIDTH),
    }
    for n in range(DEPTH):
        block = f"vit.encoder.layer.{n}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{block}.attention.attention.{part}", WIDTH, WIDTH)
        shapes |= linear(f"{block}.attention.output.dense", WIDTH, WIDTH)
        shapes |= linear(f"{block}.intermediate.dense", HIDDEN, WIDTH)
        shapes |= linear(f"{block}.output.dense", WIDTH, HIDDEN)
        shapes |= norm(f"{block}.layernorm_before") | norm(f"{block}.layernorm_after")
    return fill(shapes)


def hf_clip():
    """Random weights of a `CLIPVisionModelWithProjection`."""
    shapes = {
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": (10, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        **norm("vision_model.pre_layrnorm"),
        **norm("vision_model.post_layernorm"),
        "visual_projection.weight": (7, WIDTH),
    }
    for n in range(DEPTH):
        block = f"vision_model.encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{part}", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", HIDDEN, WIDTH)
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, HIDDEN)
        shapes |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
    return fill(shapes)


def rename(weights, *pairs):
    """Replace parts of names; q, k and v of equal names are stacked in that order."""
    found = {}
    for part in ("", "query", "key", "value", "q_proj", "k_proj", "v_proj"):
        for name, w in weights.items():
            hit = re.search(r"\.(query|key|value|[qkv]_proj)\.", name)
            if part != (hit[1] if hit else ""):
                continue
            for old, new in pairs:
                name = re.sub(old, new, name)
            found[name] = np.concatenate([found[name], w]) if name in found else w
    return found


def hf_vit_5(weights):
    """The names that version 5 has in memory."""
    return rename(
        weights,
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.(q|k|v)[a-z]+", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    )


def timm_vit(weights):
    return rename(
        weights,
        (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^vit\.embeddings\.cls_token", "cls_token"),
        (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"^vit\.encoder\.layer", "blocks"),
        (r"attention\.attention\.[a-z]+", "attn.qkv"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
        (r"^vit\.layernorm", "norm"),
        (r"^classifier", "head"),
    )


def timm_clip(weights):
    return rename(
        weights,
        (r"^vision_model\.embeddings\.patch_embedding", "patch_embed.proj"),
        (r"^vision_model\.embeddings\.class_embedding", "cls_token"),
        (r"^vision_model\.embeddings\.position_embedding\.weight", "pos_embed"),
        (r"^vision_model\.pre_layrnorm", "norm_pre"),
        (r"^vision_model\.encoder\.layers", "blocks"),
        (r"self_attn\.[qkv]_proj", "attn.qkv"),
        (r"self_attn\.out_proj", "attn.proj"),
        (r"layer_norm", "norm"),
        (r"^vision_model\.post_layernorm", "norm"),
        (r"^visual_projection", "head"),
    ) | {"head.bias": np.zeros(7, np.float32)}


def openai_clip(weights):
    found = rename(
        weights,
        (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
        (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
        (r"^vision_model\.embed.*_embedding\.weight", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
        (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
        (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
        (r"self_attn\.out_proj", "attn.out_proj"),
        (r"layer_norm", "ln_"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"^vision_model\.post_layernorm", "visual.ln_post"),
        (r"^visual_projection\.weight", "visual.proj"),
    )
    return found | {"visual.proj": found["visual.proj"].T}


def jax_vit(weights):
    """The arrays of the original JAX release, which have Flax's axes."""
    found = {
        "cls": weights["vit.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": weights[
            "vit.embeddings.position_embeddings"
        ],
        "embedding/kernel": weights[
            "vit.embeddings.patch_embeddings.projection.weight"
        ].transpose(2, 3, 1, 0),
        "embedding/bias": weights["vit.embeddings.patch_embeddings.projection.bias"],
        "Transformer/encoder_norm/scale": weights["vit.layernorm.weight"],
        "Transformer/encoder_norm/bias": weights["vit.layernorm.bias"],
        "head/kernel": weights["classifier.weight"].T,
        "head/bias": weights["classifier.bias"],
    }
    each = WIDTH // HEADS
    for n in range(DEPTH):
        old, new = f"vit.encoder.layer.{n}", f"Transformer/encoderblock_{n}"
        attention = f"{new}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            name = f"{old}.attention.attention.{part}"
            kernel = np.zeros((WIDTH, HEADS, each), np.float32)
            for h in range(HEADS):
                rows = weights[f"{name}.weight"][h * each : (h + 1) * each]
                kernel[:, h, :] = rows.T
            found[f"{attention}/{part}/kernel"] = kernel
            bias = weights[f"{name}.bias"].reshape(HEADS, each)
            found[f"{attention}/{part}/bias"] = bias
        out = weights[f"{old}.attention.output.dense.weight"]
        columns = [out[:, h * each : (h + 1) * each].T for h in range(HEADS)]
        found[f"{attention}/out/kernel"] = np.stack(columns)
        found[f"{attention}/out/bias"] = weights[f"{old}.attention.output.dense.bias"]
        for theirs, ours in (
            ("intermediate", "MlpBlock_3/Dense_0"),
            ("output", "MlpBlock_3/Dense_1"),
        ):
            dense = f"{old}.{theirs}.dense"
            found[f"{new}/{ours}/kernel"] = weights[f"{dense}.weight"].T
            found[f"{new}/{ours}/bias"] = weights[f"{dense}.bias"]
        for theirs, ours in (("before", "LayerNorm_0"), ("after", "LayerNorm_2")):
            found[f"{new}/{ours}/scale"] = weights[f"{old}.layernorm_{theirs}.weight"]
            found[f"{new}/{ours}/bias"] = weights[f"{old}.layernorm_{theirs}.bias"]
    return found
