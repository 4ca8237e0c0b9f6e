"""Match the names and layouts of a PyTorch checkpoint with a Flax model's variables."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Namer = Callable[[tuple[str, ...]], str]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Pretrained(NamedTuple):
    """Hold what a checkpoint gives a model: nested dicts of float32 arrays."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]


class CheckpointMismatch(ValueError):
    """List every key of a checkpoint that does not fit the model."""


def torch_leaf(leaf: str) -> str:
    """Name a Flax leaf as PyTorch does: kernel and scale are "weight", and so on."""
    return _LEAVES[leaf]


def variable_shapes(
    model: nn.Module, *args: Any
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """List the shapes of a model's variables by path, without allocating them.

    Args:
        model: The Flax model.
        *args: What its call takes, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        (collection, module, ..., leaf) to shape.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables)
    return {path: leaf.shape for path, leaf in flat.items()}


def to_flax(
    weights: Mapping[str, np.ndarray],
    *,
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    name: Namer,
    source: str,
    hint: str = "",
) -> Pretrained:
    """Turn a checkpoint into the model's variables, each key used exactly once.

    Convolutions go from (o, i, kh, kw) to (kh, kw, i, o), dense weights from (o, i) to
    (i, o). `num_batches_tracked` is dropped.

    Args:
        weights: The checkpoint, name to array.
        shapes: What `variable_shapes` gives.
        name: Gives the checkpoint's name of a variable's path.
        source: Where the checkpoint comes from, for the error.
        hint: What to do if the keys do not fit, for the error.

    Raises:
        CheckpointMismatch: If keys are missing, left over or of another shape than the
            model's, listing all of them; or if values are not finite numbers.
    """
    wanted = {name(path): path for path in shapes}
    found = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    problems = [
        f"missing: {key}, expected {_torch_shape(shapes[path])}"
        for key, path in wanted.items()
        if key not in found
    ]
    problems += [
        f"left over: {key}, found {value.shape}"
        for key, value in found.items()
        if key not in wanted
    ]
    flat = {}
    for key, path in wanted.items():
        if key not in found:
            continue
        value = found[key]
        expected = _torch_shape(shapes[path])
        if value.shape != expected:
            problems.append(
                f"mis-shaped: {key}, found {value.shape}, expected {expected}"
            )
        elif not np.issubdtype(value.dtype, np.floating):
            problems.append(f"not floating point: {key}, found {value.dtype}")
        else:
            with np.errstate(over="ignore"):  # overflow is reported as Inf
                value = value.astype(np.float32)
            if not np.isfinite(value).all():
                problems.append(f"NaN or Inf: {key}")
            # jnp.array copies: the result never shares memory with the checkpoint.
            flat[path] = jnp.array(np.transpose(value, _to_flax_axes(value.ndim)))
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointMismatch(
            f"{source}: {len(problems)} keys do not fit the model\n  {lines}\n{hint}"
        )
    tree = unflatten_dict(flat)
    return Pretrained(tree["params"], tree.get("batch_stats", {}))


def to_torch(weights: Pretrained, *, name: Namer) -> dict[str, np.ndarray]:
    """Turn a model's variables into a checkpoint, the reverse of `to_flax`."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(weights._asdict())
    return {
        name(path): np.array(leaf.transpose(_to_torch_axes(leaf.ndim)), order="C")
        for path, leaf in flat.items()
    }


def _to_flax_axes(ndim: int) -> tuple[int, ...]:
    return (*range(2, ndim), *reversed(range(min(ndim, 2))))


def _to_torch_axes(ndim: int) -> tuple[int, ...]:
    return (*reversed(range(max(ndim - 2, 0), ndim)), *range(ndim - 2))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _to_torch_axes(len(shape)))
