"""Know under which names each kind of checkpoint keeps a Vision Transformer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

PACKED = ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """Say how one kind of checkpoint names and lays out a ViT.

    Names are relative to the tower, the part of the checkpoint that is the ViT; `../`
    starts those that lie beside it. `{n}` stands for the number of a block and
    `{leaf}` for `weight` or `bias` (Flax: `kernel`, `scale` or `bias`).

    Attributes:
        title: What people call it.
        marks: Keys that it always has; the first one is in the tower.
        names: Our module or parameter, without its leaf -> the checkpoint's name. Those
            of query, key and value are the same where it keeps the three in one array.
        containers: Names that the tower may have inside a whole model.
        beside: Keys beside the tower that belong to other networks.
        inside: Keys in the tower that a ViT has no use for.
        flax: Whether kernels have Flax's axes and names instead of PyTorch's.
        untransposed: Kernels of a PyTorch layout that are (in, out) all the same.
    """

    title: str
    marks: tuple[str, ...]
    names: Mapping[str, str]
    containers: tuple[str, ...] = ()
    beside: str | None = None
    inside: str | None = None
    flax: bool = False
    untransposed: frozenset[str] = field(default_factory=frozenset)


def _blocks(prefix: str, names: Mapping[str, str], end: str) -> dict[str, str]:
    return {f"blocks/{ours}": f"{prefix}{name}{end}" for ours, name in names.items()}


_OPENAI = Layout(
    "OpenAI CLIP",
    ("ln_pre.weight", "transformer.resblocks.0.attn.in_proj_weight"),
    {
        "patch_embedding": "conv1.{leaf}",
        "class_token": "class_embedding",
        "position_embedding": "positional_embedding",
        "norm_pre": "ln_pre.{leaf}",
        **_blocks(
            "transformer.resblocks.{n}.",
            {f"attention/{part}": "attn.in_proj_" for part in PACKED}
            | {
                "norm1": "ln_1.",
                "attention/out": "attn.out_proj.",
                "norm2": "ln_2.",
                "mlp/fc1": "mlp.c_fc.",
                "mlp/fc2": "mlp.c_proj.",
            },
            "{leaf}",
        ),
        "norm": "ln_post.{leaf}",
        "projection": "proj",
    },
    containers=("visual.",),
    beside=r"(transformer|token_embedding|ln_final|text)\.|(positional_embedding|"
    r"text_projection|logit_scale|logit_bias|attn_mask|input_resolution|"
    r"context_length|vocab_size)$",
    untransposed=frozenset({"projection"}),
)

_HF_CLIP = Layout(
    "transformers CLIP",
    ("pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    {
        "patch_embedding": "embeddings.patch_embedding.{leaf}",
        "class_token": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "norm_pre": "pre_layrnorm.{leaf}",
        **_blocks(
            "encoder.layers.{n}.",
            {f"attention/{part}": f"self_attn.{part[0]}_proj" for part in PACKED}
            | {
                "norm1": "layer_norm1",
                "attention/out": "self_attn.out_proj",
                "norm2": "layer_norm2",
                "mlp/fc1": "mlp.fc1",
                "mlp/fc2": "mlp.fc2",
            },
            ".{leaf}",
        ),
        "norm": "post_layernorm.{leaf}",
        "projection": "../visual_projection.{leaf}",
    },
    containers=("vision_model.",),
    beside=r"(text_model|text_projection)\.|logit_scale$",
    inside=r"embeddings\.position_ids$",
)

_HF_VIT_OLD = Layout(
    "transformers ViT",
    ("encoder.layer.0.attention.attention.query.weight", "embeddings.cls_token"),
    {
        "patch_embedding": "embeddings.patch_embeddings.projection.{leaf}",
        "class_token": "embeddings.cls_token",
        "distillation_token": "embeddings.distillation_token",
        "position_embedding": "embeddings.position_embeddings",
        **_blocks(
            "encoder.layer.{n}.",
            {f"attention/{part}": f"attention.attention.{part}" for part in PACKED}
            | {
                "norm1": "layernorm_before",
                "attention/out": "attention.output.dense",
                "norm2": "layernorm_after",
                "mlp/fc1": "intermediate.dense",
                "mlp/fc2": "output.dense",
            },
            ".{leaf}",
        ),
        "norm": "layernorm.{leaf}",
        "head": "../classifier.{leaf}",
    },
    containers=("vit.", "deit."),
    inside=r"pooler\.dense\.",
)

# What version 5 calls the modules in memory; it saves them under their old names.
_HF_VIT = replace(
    _HF_VIT_OLD,
    marks=("layers.0.attention.q_proj.weight", "embeddings.cls_token"),
    names={
        **_HF_VIT_OLD.names,
        **_blocks(
            "layers.{n}.",
            {f"attention/{part}": f"attention.{part[0]}_proj" for part in PACKED}
            | {
                "norm1": "layernorm_before",
                "attention/out": "attention.o_proj",
                "norm2": "layernorm_after",
                "mlp/fc1": "mlp.fc1",
                "mlp/fc2": "mlp.fc2",
            },
            ".{leaf}",
        ),
    },
)


def _with_teacher(layout: Layout) -> Layout:
    heads = {
        "head": "../cls_classifier.{leaf}",
        "head_distilled": "../distillation_classifier.{leaf}",
    }
    return replace(
        layout,
        title="transformers DeiT",
        marks=(*layout.marks, "../cls_classifier.weight"),
        names={**layout.names, **heads},
    )


_TIMM = Layout(
    "timm ViT",
    ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight"),
    {
        "patch_embedding": "patch_embed.proj.{leaf}",
        "class_token": "cls_token",
        "distillation_token": "dist_token",
        "position_embedding": "pos_embed",
        "norm_pre": "norm_pre.{leaf}",
        **_blocks(
            "blocks.{n}.",
            {f"attention/{part}": "attn.qkv" for part in PACKED}
            | {
                "norm1": "norm1",
                "attention/out": "attn.proj",
                "norm2": "norm2",
                "mlp/fc1": "mlp.fc1",
                "mlp/fc2": "mlp.fc2",
            },
            ".{leaf}",
        ),
        "norm": "norm.{leaf}",
        "projection": "head.{leaf}",
        "head": "head.{leaf}",
        "head_distilled": "head_dist.{leaf}",
    },
)

_JAX = Layout(
    "original JAX ViT",
    (
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
        "embedding/kernel",
    ),
    {
        "patch_embedding": "embedding/{leaf}",
        "class_token": "cls",
        "position_embedding": "Transformer/posembed_input/pos_embedding",
        **_blocks(
            "Transformer/encoderblock_{n}/",
            {
                f"attention/{part}": f"MultiHeadDotProductAttention_1/{part}"
                for part in (*PACKED, "out")
            }
            | {
                "norm1": "LayerNorm_0",
                "norm2": "LayerNorm_2",
                "mlp/fc1": "MlpBlock_3/Dense_0",
                "mlp/fc2": "MlpBlock_3/Dense_1",
            },
            "/{leaf}",
        ),
        "norm": "Transformer/encoder_norm/{leaf}",
        "head": "head/{leaf}",
        "pre_logits": "pre_logits/{leaf}",
    },
    flax=True,
)

# A distilled DeiT is first told from the ViT that it otherwise is.
LAYOUTS = (
    _OPENAI,
    _HF_CLIP,
    _with_teacher(_HF_VIT_OLD),
    _with_teacher(_HF_VIT),
    _HF_VIT_OLD,
    _HF_VIT,
    _TIMM,
    _JAX,
)
