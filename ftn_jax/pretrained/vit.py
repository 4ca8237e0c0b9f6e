"""Bring checkpoints of Vision Transformers into `ftn_jax.models.vit.ViT`."""

import math
import os
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from ftn_jax.models.vit import ViT
from ftn_jax.models.vit_layers import stack_layers
from ftn_jax.models.vit_positions import interpolate_positions
from ftn_jax.pretrained.files import read_weights
from ftn_jax.pretrained.hub import locate
from ftn_jax.pretrained.matching import (
    CheckpointMismatch,
    Pretrained,
    variable_shapes,
)
from ftn_jax.pretrained.vit_layouts import LAYOUTS, PACKED
from ftn_jax.pretrained.vit_tower import Tower, find_towers

Path = tuple[str, ...]
Shape = tuple[int, ...]

_HEADS = ("head", "head_distilled")
_POSITIONS = ("params", "position_embedding")


def load_vit(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
    model: ViT,
    *,
    prefix: str | None = None,
    new_head: bool = False,
) -> Pretrained:
    """Load a CLIP, ViT or DeiT checkpoint for a model.

    The layout is told from the keys: OpenAI's CLIP (`visual.conv1.weight`, q, k and v
    packed), transformers' CLIP, ViT and DeiT with the names of versions 4 and 5, timm's
    ViT (`blocks.0.attn.qkv.weight`) and the `.npz` of the original JAX code. Every key
    of the ViT is used and every leaf of the model filled, but for what is named here:

    - a text tower beside the ViT, and transformers' `pooler`, are passed over;
    - a head is left out if the model has none or gets a new one, a projection if
      the model has none;
    - positions of another grid are resized by `interpolate_positions`;
    - `feature_norm`, which no checkpoint has, starts at mean 0 and variance 1.

    What the keys do not tell is the caller's care: the number of heads (the JAX code's
    files do tell it), the activation (QuickGELU for OpenAI's weights, the exact GELU
    for many later ones) and `norm_epsilon`.

    OpenAI publishes its weights as TorchScript archives, which hold code. Where they
    are trusted, `torch.jit.load(path, map_location="cpu").state_dict()` gives the
    arrays to save as safetensors.

    Args:
        source: A file (`.safetensors`, `.npz`, `.pth`, `.pt`, `.bin`), a hub name such
            as `hf://google/vit-base-patch16-224`, or the named arrays themselves.
        model: The ViT to fill; with `scan_layers` its blocks are stacked.
        prefix: What the ViT's keys start with, needed only if the checkpoint has
            several; the others are passed over.
        new_head: Start the model's head at zero instead of filling it, for other
            classes than the checkpoint's or for CLIP, which has no head.

    Returns:
        `params` and `batch_stats`, for `model.apply`.

    Raises:
        FileNotFoundError: If the file is not there, nor on the hub.
        WeightsFileError: If it cannot be read as plain arrays.
        CheckpointMismatch: If it holds no known ViT, or its keys, shapes or values do
            not fit the model.
    """
    if isinstance(source, Mapping):
        weights, origin = dict(source), "the given arrays"
    else:
        weights, origin = read_weights(locate(source)), os.fspath(source)
    tower, others = _choose_tower(weights, prefix, origin)
    weights = {k: w for k, w in weights.items() if not k.startswith(others)}
    tower, used = _leave_out(tower, weights, model, new_head=new_head)
    image = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32)
    shapes = variable_shapes(model.clone(scan_layers=False), image)
    flat = _new_leaves(shapes, new_head=new_head)
    problems = []
    for key, parts in _parts_by_key(tower, shapes, known=flat).items():
        if key is None:
            problems += [
                f"missing: {'/'.join(path[1:])}, {tower.layout.title} has none"
                for path in parts
            ]
        elif key not in used:
            problems.append(f"missing: {key}, expected {_file_shape(tower, parts)}")
        else:
            value = used.pop(key)
            problem = _misfit(key, value, tower, parts, model)
            if problem is None:
                flat |= _convert(value, tower, parts, model)
            else:
                problems.append(problem)
    problems += [f"left over: {key}, found {w.shape}" for key, w in used.items()]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointMismatch(
            f"{origin}: {len(problems)} keys do not fit the model\n  {lines}\n"
            + _hint(tower, weights, model)
        )
    tree = unflatten_dict(flat)
    params = stack_layers(tree["params"]) if model.scan_layers else tree["params"]
    return Pretrained(params, tree.get("batch_stats", {}))


def _choose_tower(
    weights: Mapping[str, np.ndarray], prefix: str | None, origin: str
) -> tuple[Tower, tuple[str, ...]]:
    """Give the one ViT that is meant, and what the keys of the others start with."""
    towers = find_towers(weights)
    chosen = [t for t in towers if prefix is None or t.prefix == prefix]
    if len(chosen) == 1:
        return chosen[0], tuple(t.root for t in towers if t not in chosen and t.root)
    if towers:
        raise CheckpointMismatch(
            f"{origin}: holds ViTs ({towers[0].layout.title}) under the prefixes "
            f"{[t.prefix for t in towers]}, asked for prefix={prefix!r}: name one"
        )
    titles = dict.fromkeys(layout.title for layout in LAYOUTS)
    some = sorted(weights)[:5]
    raise CheckpointMismatch(
        f"{origin}: no ViT of a known layout ({', '.join(titles)}) among its "
        f"{len(weights)} keys, the first of which are {some}: check that it is one, "
        "with separate blocks, and rename its keys if they are of yet another kind"
    )


def _leave_out(
    tower: Tower, weights: Mapping[str, np.ndarray], model: ViT, *, new_head: bool
) -> tuple[Tower, dict[str, np.ndarray]]:
    """Give what is to be used of a checkpoint, and the tower to look it up in."""
    used = {k: v for k, v in weights.items() if not tower.foreign(k)}
    names = tower.layout.names
    if names.get("projection") == names.get("head") and model.projection_width:
        # timm keeps CLIP's projection as a head, with a bias of zeros.
        tower = tower.without_head()
        bias = tower.key(("params", "projection", "bias"))
        used = {k: v for k, v in used.items() if k != bias or np.any(v)}
    elif not model.projection_width and "head" not in names:
        used = {k: v for k, v in used.items() if not tower.has(k, "projection")}
    if new_head or not model.num_classes:
        heads = (*_HEADS, "pre_logits")
        used = {k: v for k, v in used.items() if not tower.has(k, *heads)}
    return tower, used


def _new_leaves(shapes: Mapping[Path, Shape], *, new_head: bool) -> dict[Path, Array]:
    """Make the leaves that are not from a checkpoint: statistics, a new head."""
    return {
        path: jnp.full(shape, float(path[-1] == "var"), jnp.float32)
        for path, shape in shapes.items()
        if path[0] == "batch_stats" or (new_head and path[1] in _HEADS)
    }


def _parts_by_key(
    tower: Tower, shapes: Mapping[Path, Shape], *, known: Container[Path]
) -> dict[str | None, dict[Path, Shape]]:
    """List what each key holds: one leaf, or those of query, key and value."""
    grouped: dict[str | None, dict[Path, Shape]] = {}
    for path in sorted(shapes, key=_packing_order):
        if path not in known:
            grouped.setdefault(tower.key(path), {})[path] = shapes[path]
    return grouped


def _packing_order(path: Path) -> int:
    return PACKED.index(path[-2]) if path[-2] in PACKED else 0


def _transposed(tower: Tower, path: Path) -> bool:
    layout = tower.layout
    kernel = path[-1] == "kernel" and not layout.flax
    return kernel and path[-2] not in layout.untransposed


def _file_shape(tower: Tower, parts: Mapping[Path, Shape]) -> Shape:
    """Give the shape that a key's array should have."""
    path, shape = next(iter(parts.items()))
    if not tower.layout.flax:
        if _transposed(tower, path) and len(shape) == 4:
            shape = (shape[3], shape[2], *shape[:2])
        elif _transposed(tower, path):
            inputs = len(shape) - 1 if path[-2] == "out" else 1
            shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif path[-1] == "bias":
            shape = (math.prod(shape),)
    return (len(parts) * shape[0], *shape[1:])


def _misfit(
    key: str,
    value: np.ndarray,
    tower: Tower,
    parts: Mapping[Path, Shape],
    model: ViT,
) -> str | None:
    """Say why a key's array cannot be used, None if it can."""
    expected = _file_shape(tower, parts)
    squeezed = _squeeze(value, len(expected))
    resizable = _POSITIONS in parts and _is_square(squeezed, model)
    if squeezed.shape != expected and not resizable:
        return f"mis-shaped: {key}, found {value.shape}, expected {expected}"
    if not np.issubdtype(value.dtype, np.floating):
        return f"not floating point: {key}, found {value.dtype}"
    if not np.isfinite(_float32(value)).all():
        return f"NaN or Inf: {key}"
    return None


def _convert(
    value: np.ndarray, tower: Tower, parts: Mapping[Path, Shape], model: ViT
) -> dict[Path, Array]:
    """Turn a key's array into the leaves that it holds, as copies."""
    value = _squeeze(_float32(value), len(_file_shape(tower, parts)))
    if _POSITIONS in parts:
        positions = jnp.array(value)
        if positions.shape != parts[_POSITIONS]:
            positions = interpolate_positions(
                positions, model.grid, prefix_tokens=model.prefix_tokens
            )
        return {_POSITIONS: positions}
    leaves = {}
    for (path, shape), part in zip(
        parts.items(), np.split(value, len(parts)), strict=True
    ):
        if _transposed(tower, path):
            part = part.transpose(2, 3, 1, 0) if part.ndim == 4 else part.T
        leaves[path] = jnp.array(part.reshape(shape))
    return leaves


def _float32(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # overflow is reported as Inf
        return value.astype(np.float32)


def _squeeze(value: np.ndarray, ndim: int) -> np.ndarray:
    """Drop leading axes of one row, which some layouts give tokens and positions."""
    while value.ndim > ndim and len(value) == 1:
        value = value[0]
    return value


def _is_square(positions: np.ndarray, model: ViT) -> bool:
    """Tell whether positions are those of a square grid, for a model of this kind."""
    if positions.ndim != 2 or positions.shape[1] != model.width:
        return False
    patches = len(positions) - model.prefix_tokens
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def _hint(tower: Tower, weights: Mapping[str, np.ndarray], model: ViT) -> str:
    """Put the checkpoint's sizes beside the model's."""
    depth = 0
    while tower.key(("params", f"blocks_{depth}", "norm1", "scale")) in weights:
        depth += 1
    sizes = [f"{depth} blocks"]
    for path in (("params", "patch_embedding", "kernel"), _POSITIONS):
        key = tower.key(path) or ""
        if key in weights:
            sizes.append(f"{key} {weights[key].shape}")
    down, across = model.grid
    return (
        f"The checkpoint is of {tower.layout.title} with {', '.join(sizes)}; the model "
        f"has {model.depth} blocks of width {model.width}, patches of "
        f"{model.patch_px} px and {model.prefix_tokens} + {down} x {across} positions. "
        "Build the checkpoint's architecture; if only the classes differ, give its "
        "num_classes, num_classes=None for no head or new_head=True for one of zeros."
    )
