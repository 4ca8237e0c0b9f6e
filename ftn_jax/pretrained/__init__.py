"""Published checkpoints to Flax trees; nothing in a file is ever executed."""

from ftn_jax.pretrained.biggan import biggan_of, export_biggan, load_biggan
from ftn_jax.pretrained.biggan_deep import load_biggan_deep
from ftn_jax.pretrained.files import WeightsFileError, read_weights
from ftn_jax.pretrained.hub import HubFileNotFound, locate
from ftn_jax.pretrained.matching import CheckpointMismatch, Pretrained
from ftn_jax.pretrained.resnet import export_resnet, load_resnet
from ftn_jax.pretrained.vit import load_vit

__all__ = [
    "CheckpointMismatch",
    "HubFileNotFound",
    "Pretrained",
    "WeightsFileError",
    "biggan_of",
    "export_biggan",
    "export_resnet",
    "load_biggan",
    "load_biggan_deep",
    "load_resnet",
    "load_vit",
    "locate",
    "read_weights",
]
