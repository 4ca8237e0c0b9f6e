"""Plain Flax backbones; none of them knows of deltas."""

from ftn_jax.models.resnet import ResNet
from ftn_jax.models.resnet_family import (
    RESNETS,
    cifar_resnet,
    residual_adapter_resnet26,
    resnet18,
    resnet34,
    resnet50,
)

__all__ = [
    "RESNETS",
    "ResNet",
    "cifar_resnet",
    "residual_adapter_resnet26",
    "resnet18",
    "resnet34",
    "resnet50",
]
