"""Collect what a network's layers put out for some images."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ftn_jax.paths import path_name, some


def conv_responses(
    model: Any,
    variables: Mapping[str, Any],
    images: Float[Array, "n h w c"],
    pattern: str,
    *,
    key: Key[Array, ""],
    positions: int | None = 16,
    batch_size: int = 64,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Float[np.ndarray, "m c_out"]]:
    """Run a Flax Linen network and return convolutions' outputs, pixels as rows.

    For `pca_bases`: RCM's response initialization takes the principal directions of
    each layer's outputs before its norm. Of each output some pixels are drawn, the
    same number for every image, so that large maps do not fill the memory.

    Source: Kanakis et al. (arXiv 2007.12540), response initialization.

    Args:
        model: the module.
        variables: `{"params": ..., "batch_stats": ...}`.
        images: preprocessed as in training.
        pattern: regular expression of whole paths of kernels, as in rules:
            `".*conv\\d*/kernel"`.
        key: draws the pixels.
        positions: pixels kept of each image and layer, all where a layer has fewer;
            None for all.
        batch_size: images that run at once.
        options: keyword arguments of the module's call, default `train=False`.

    Returns:
        For each kernel's path its outputs (n * pixels, C_out), in float32.

    Raises:
        ValueError: if there are no images, if no kernel matches, or if a matching one
            is not used once or gives out anything but its last axis (names the path).
    """
    if len(images) == 0 or batch_size < 1 or (positions is not None and positions < 1):
        raise ValueError(
            f"need images, batch_size >= 1 and positions >= 1 (or None), found "
            f"{len(images)} images, {batch_size} and {positions}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    sizes = {path_name(path): w.shape[-1] for path, w in leaves if w.ndim > 1}
    wanted = {path for path in sizes if re.fullmatch(pattern, path)}
    if not wanted:
        raise ValueError(
            f"pattern {pattern!r} matches no kernel (a pattern must match the whole "
            f"path); the network has {some([*sizes])}"
        )
    settings = {"train": False} if options is None else dict(options)

    def is_wanted(module: Any, method: str) -> bool:
        return method == "__call__" and _kernel_path(module.path) in wanted

    def run(variables: Any, x: Any, key: Any) -> dict[str, Array]:
        # Not by nn.intercept_methods: values that leave a rematerialized block by the
        # side are lost, collections are not.
        _, state = model.apply(
            variables,
            x,
            capture_intermediates=is_wanted,
            mutable=["intermediates"],
            **settings,
        )
        found = _outputs(state.get("intermediates", {}))
        if set(found) != wanted:
            raise ValueError(
                f"{sorted(wanted - set(found))}: a matching kernel that no module's "
                "call uses; leave it out of the pattern"
            )
        keys = jax.random.split(key, len(found))
        return {
            path: _draw(path, k, found[path], sizes[path], positions)
            for k, path in zip(keys, sorted(found), strict=True)
        }

    jitted = jax.jit(run)
    collected: dict[str, list[np.ndarray]] = {path: [] for path in wanted}
    for start in range(0, len(images), batch_size):
        x = jnp.asarray(images[start : start + batch_size])
        found = jitted(dict(variables), x, jax.random.fold_in(key, start))
        for path, y in found.items():
            collected[path].append(np.asarray(y))
    return {path: np.concatenate(collected[path]) for path in sorted(collected)}


def _kernel_path(path: tuple[str, ...]) -> str:
    return "/".join((*path, "kernel"))


def _outputs(tree: Any) -> dict[str, list[Any]]:
    """List the captured outputs of every module by its kernel's path."""
    found: dict[str, list[Any]] = {}
    for path, y in jax.tree_util.tree_leaves_with_path(tree):
        *module, method, _ = path_name(path).split("/")  # and the number of the call
        if method == "__call__":  # the network may keep intermediates of its own
            found.setdefault(_kernel_path(tuple(module)), []).append(y)
    return found


def _draw(
    path: str, key: Any, outputs: list[Any], size: int, positions: int | None
) -> Float[Array, "m c_out"]:
    """Take the same number of pixels of each image of a layer's output."""
    (y, *others) = outputs
    if others or y.ndim < 2 or y.shape[-1] != size:
        raise ValueError(
            f"{path}: expected one output of {size} channels on its last axis, found "
            f"{[x.shape for x in outputs]}; leave it out of the pattern"
        )
    y = y.reshape(y.shape[0], -1, size).astype(jnp.float32)
    n, pixels, _ = y.shape
    if positions is not None and positions < pixels:
        _, pick = jax.lax.top_k(jax.random.uniform(key, (n, pixels)), positions)
        y = jnp.take_along_axis(y, pick[:, :, None], axis=1)
    return y.reshape(-1, size)
