"""Whole checkpoints: a backbone by name or file, and a task merged into it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ftn_jax.atomic import write_atomic
from ftn_jax.core import materialize
from ftn_jax.digest import whole
from ftn_jax.paths import path_name
from ftn_jax.train import Task

Naming = Literal["flax", "safetensors", "torchvision"]


class Variables(NamedTuple):
    """A network's variables, and the model that they belong to, where it is known."""

    params: Any
    batch_stats: Any
    model: Any = None


def load_backbone(
    weights: str | os.PathLike[str], *, name: str | None = None, classes: int | None
) -> Variables:
    """Read a backbone.

    Args:
        weights: a file or hub name. Without `name`, a `.safetensors` file whose tensors
            are called `params/...` and `batch_stats/...`, as `write_checkpoint` writes
            it for any network.
        name: of `ftn_jax.models.RESNETS` or `VITS`, whose published checkpoints are
            read.
        classes: of the checkpoint's head, where that is not the name's default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name is unknown, or the file is damaged or does not fit.
    """
    from ftn_jax.models import RESNETS, VITS
    from ftn_jax.pretrained import load_resnet, load_vit, read_weights

    if name is None:
        flat = read_weights(weights)
        tree = _nested(Path(weights), flat)
        return Variables(tree["params"], tree.get("batch_stats", {}))
    if name not in {*RESNETS, *VITS}:
        raise ValueError(
            f"backbone {name!r}: unknown, known are {sorted({*RESNETS, *VITS})}; leave "
            "the name out for a file with tensors params/..., batch_stats/..."
        )
    options = {"num_classes": classes} if classes else {}
    if name in RESNETS:
        model = RESNETS[name](**options)
        return Variables(*load_resnet(weights, model), model)
    model = VITS[name](**options)
    return Variables(*load_vit(weights, model), model)


def merge_task(backbone: Variables, shared: Any, task: Task) -> Variables:
    """Make the network that a task runs with, heads and running statistics included.

    Args:
        backbone: the variables; their model is passed on.
        shared: their parameters, with what the task reads beside them.
        task: what to merge.
    """
    state = task.model_state or {}
    stats = state.get("batch_stats", backbone.batch_stats)
    return Variables(materialize(shared, task.delta), stats, backbone.model)


def write_checkpoint(
    path: str | os.PathLike[str], variables: Variables, *, naming: Naming
) -> None:
    """Write all of a network's variables to one file.

    Args:
        path: of the file, replaced in one step.
        variables: what to write.
        naming: `"flax"` is the msgpack of `flax.serialization`; `"safetensors"` has
            tensors `params/...` and `batch_stats/...`, as the Flax tree has them;
            `"torchvision"` is safetensors with the names and layouts of PyTorch.

    Raises:
        OSError: if it cannot be written; an older file is untouched.
        ValueError: if the network has no names in torchvision.
    """
    tree = {"params": variables.params}
    if variables.batch_stats:
        tree["batch_stats"] = variables.batch_stats
    if naming == "flax":
        from flax.serialization import to_bytes

        write_atomic(Path(path), to_bytes(jax.tree.map(whole, tree)))
        return
    from safetensors.numpy import save

    if naming == "torchvision":
        flat = _torchvision(variables)
    else:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        flat = {path_name(p): whole(x) for p, x in leaves}
    write_atomic(Path(path), save(flat))


def _torchvision(variables: Variables) -> dict[str, np.ndarray]:
    from ftn_jax.models import ResNet
    from ftn_jax.pretrained import export_resnet

    if not isinstance(variables.model, ResNet):
        raise ValueError(
            "only a ResNet that is given by its name has names in torchvision; "
            "choose the naming flax or safetensors"
        )
    return export_resnet(variables.params, variables.batch_stats, variables.model)


def _nested(path: Path, flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = jax.numpy.asarray(value)
    if "params" not in tree:
        raise ValueError(
            f"{path} has no tensors params/..., found {sorted(flat)[:3]}; name the "
            "backbone that it is a checkpoint of"
        )
    return tree
