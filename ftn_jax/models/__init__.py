"""Plain Flax backbones; none of them knows of deltas."""

from ftn_jax.models.biggan import BigGAN
from ftn_jax.models.biggan_deep import BigGANDeep
from ftn_jax.models.biggan_discriminator import BigGANDiscriminator
from ftn_jax.models.biggan_family import BIGGANS, biggan, biggan_deep
from ftn_jax.models.deeplab import DeepLab
from ftn_jax.models.resnet import ResNet
from ftn_jax.models.resnet_family import (
    RESNETS,
    cifar_resnet,
    residual_adapter_resnet26,
    resnet18,
    resnet34,
    resnet50,
)
from ftn_jax.models.vit import ViT
from ftn_jax.models.vit_family import (
    VITS,
    clip_vit,
    clip_vit_b16,
    clip_vit_b32,
    clip_vit_l14,
    vit,
    vit_b16,
    vit_b32,
    vit_s16,
    vit_ti16,
    vit_tiny_cifar,
)
from ftn_jax.models.vit_layers import stack_layers, unstack_layers
from ftn_jax.models.vit_positions import interpolate_positions

__all__ = [
    "BIGGANS",
    "RESNETS",
    "VITS",
    "BigGAN",
    "BigGANDeep",
    "BigGANDiscriminator",
    "DeepLab",
    "ResNet",
    "ViT",
    "biggan",
    "biggan_deep",
    "cifar_resnet",
    "clip_vit",
    "clip_vit_b16",
    "clip_vit_b32",
    "clip_vit_l14",
    "interpolate_positions",
    "residual_adapter_resnet26",
    "resnet18",
    "resnet34",
    "resnet50",
    "stack_layers",
    "unstack_layers",
    "vit",
    "vit_b16",
    "vit_b32",
    "vit_s16",
    "vit_ti16",
    "vit_tiny_cifar",
]
