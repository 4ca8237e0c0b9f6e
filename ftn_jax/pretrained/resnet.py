"""Bring PyTorch checkpoints of ResNets into `ftn_jax.models.ResNet`, and back."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from ftn_jax.models import ResNet
from ftn_jax.pretrained.files import read_weights
from ftn_jax.pretrained.hub import locate
from ftn_jax.pretrained.matching import (
    Pretrained,
    to_flax,
    to_torch,
    torch_leaf,
    variable_shapes,
)

_HEADS = ("fc", "linear")
_HINT = (
    "Check that the model is the checkpoint's architecture; if only the head (fc or "
    "linear) differs, build it with the checkpoint's num_classes, or num_classes=None "
    "to leave the head out."
)


def load_resnet(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray], model: ResNet
) -> Pretrained:
    """Load a torchvision, timm or CIFAR ResNet checkpoint for a model.

    Args:
        source: A file (`.safetensors`, `.npz`, `.pth`, `.th`, `.pt`), a hub name such
            as `hf://timm/resnet18.tv_in1k`, or the named arrays themselves.
        model: The ResNet to fill. With `num_classes=None` the checkpoint's head
            (`fc.*`, `linear.*`) is left out on purpose; nothing else ever is, but for
            `num_batches_tracked`.

    Returns:
        `params` and `batch_stats`, for `model.apply`.

    Raises:
        FileNotFoundError: If the file is not there, nor on the hub.
        WeightsFileError: If it cannot be read as plain arrays.
        CheckpointMismatch: If its keys, shapes or values do not fit the model.
    """
    if isinstance(source, Mapping):
        weights, origin = dict(source), "the given arrays"
    else:
        weights, origin = read_weights(locate(source)), os.fspath(source)
    if model.num_classes is None:
        weights = {k: v for k, v in weights.items() if k.split(".")[0] not in _HEADS}
    head = "linear" if "linear.weight" in weights else "fc"
    return to_flax(
        weights,
        shapes=_shapes(model),
        name=partial(_torch_name, head=head),
        source=origin,
        hint=_HINT,
    )


def export_resnet(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], model: ResNet
) -> dict[str, np.ndarray]:
    """Give a ResNet's weights the names and layouts of its PyTorch counterpart.

    Those of torchvision; for option A shortcuts those of the CIFAR code, whose head is
    `linear`. `num_batches_tracked` is not made up: load with `strict=False`, or add it.
    """
    head = "linear" if model.shortcut == "subsample" else "fc"
    weights = Pretrained(dict(params), dict(batch_stats))
    return to_torch(weights, name=partial(_torch_name, head=head))


def _shapes(model: ResNet) -> dict[tuple[str, ...], tuple[int, ...]]:
    return variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))


def _torch_name(path: tuple[str, ...], *, head: str) -> str:
    """Translate (collection, module, ..., leaf) to the checkpoint's key."""
    _, *modules, leaf = path
    name = ".".join(modules)
    for pattern, replacement in (
        (r"^stem\.(conv|bn)$", r"\g<1>1"),
        (r"^layer(\d+)_(\d+)", r"layer\1.\2"),
        (r"shortcut\.conv$", "downsample.0"),
        (r"shortcut\.bn$", "downsample.1"),
        (r"^final\.bn$", "final_bn"),
        (r"^head$", head),
    ):
        name = re.sub(pattern, replacement, name)
    return f"{name}.{torch_leaf(leaf)}"
