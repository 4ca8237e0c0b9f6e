"""Look at task files and change them without their backbone."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ftn_jax.core import count
from ftn_jax.digest import digest
from ftn_jax.node import Node
from ftn_jax.paths import some
from ftn_jax.task_parts import BareTask


def summary(task: BareTask) -> dict[str, Any]:
    """Say in JSON values what a task file holds."""
    manifest = task.manifest
    counted = count(task.nodes)
    return {
        "name": manifest["name"],
        "format_version": manifest["format_version"],
        "class_names": manifest["class_names"],
        "preprocessing": manifest["preprocessing"],
        "metadata": manifest["metadata"],
        "parameters": counted.total,
        "by_group": counted.by_group,
        "bytes": counted.bytes,
        "nodes": [
            {
                "path": path,
                "type": type(node).__name__,
                "group": node.group,
                "parameters": counted.by_path[path],
                "arrays": [list(x.shape) for x in jax.tree.leaves(node)],
            }
            for path, node in task.nodes.items()
        ],
        "model_state": {path: list(x.shape) for path, x in task.model_state.items()},
        "backbone_leaves": len(manifest["shared"]),
        "reads_beside": sorted(manifest["beside"]),
    }


def differences(one: BareTask, two: BareTask) -> list[str]:
    """List in words how two tasks differ; nothing if they are the same."""
    found = [
        f"{key}: {one.manifest[key]!r} and {two.manifest[key]!r}"
        for key in ("name", "class_names", "preprocessing", "metadata")
        if one.manifest[key] != two.manifest[key]
    ]
    if one.manifest["format_version"] != two.manifest["format_version"]:
        found.append("format: the hashes of their backbones cannot be compared")
    else:
        a, b = (t.manifest["shared"] for t in (one, two))
        # A leaf that one of them replaces has no hash there.
        other = [p for p in a if p not in b or None not in (a[p], b[p]) != a[p] != b[p]]
        other += [p for p in b if p not in a]
        if other:
            found.append(f"backbone: differs in {some(other)}")
    for what, a, b in (
        ("", one.nodes, two.nodes),
        ("model_state ", one.model_state, two.model_state),
    ):
        for path in [*a, *(p for p in b if p not in a)]:
            if path not in b or path not in a:
                found.append(f"{what}{path}: only in the {_side(path in a)}")
            elif difference := _compare(a[path], b[path]):
                found.append(f"{what}{path}: {difference}")
    return found


def _side(first: bool) -> str:
    return "first" if first else "second"


def _compare(a: Any, b: Any) -> str:
    if isinstance(a, Node) and type(a) is not type(b):
        return f"a {type(a).__name__} and a {type(b).__name__}"
    if jax.tree.structure(a) != jax.tree.structure(b):
        return "other settings"
    pairs = [*zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    shapes = [(x.shape, y.shape) for x, y in pairs if x.shape != y.shape]
    if shapes:
        return f"shapes {shapes[0][0]} and {shapes[0][1]}"
    if any(x.dtype != y.dtype for x, y in pairs):
        return "other dtypes"
    odd = [(x, y) for x, y in pairs if digest(x) != digest(y)]
    if not odd:
        return ""
    gaps = [
        np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
        for x, y in odd
    ]
    return f"values, by up to {max(gaps):.3g}"


def prune(task: BareTask, patterns: Sequence[str]) -> BareTask:
    """Take nodes out: those weights are the backbone's own again.

    Args:
        task: the task.
        patterns: regular expressions, each matched against whole paths.

    Raises:
        ValueError: if a pattern is none or matches nothing, or a node that stays reads
            arrays of one that goes.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is no regular expression: {error}"
            ) from error
        if not any(re.fullmatch(pattern, path) for path in task.nodes):
            raise ValueError(
                f"{pattern!r} matches none of the task's nodes: {some([*task.nodes])}"
            )
    gone = {p for p in task.nodes if any(re.fullmatch(x, p) for x in patterns)}
    kept = {p: n for p, n in task.nodes.items() if p not in gone}
    for path in gone:
        node = task.nodes[path]
        owns = [n for n in node.tied_fields if getattr(node, n) is not None]
        for other, reader in kept.items():
            if owns and node.share and reader.share == node.share:
                raise ValueError(
                    f"{other} reads {owns} of {path}, which cannot go alone; prune "
                    f"all nodes of the label {node.share!r}"
                )
    manifest = dict(task.manifest)
    manifest["beside"] = {k: v for k, v in manifest["beside"].items() if k not in gone}
    if bare := sorted(p for p in gone if manifest["shared"].get(p, "") is None):
        raise ValueError(
            f"the backbone's own {some(bare)} would be needed, and the file has no "
            "hash of them: the task replaced them; prune factors only"
        )
    return task._replace(nodes=kept, manifest=manifest)


def cast(task: BareTask, dtype: Any) -> BareTask:
    """Store the trained arrays of nodes in another floating type."""

    def one(node: Node) -> Node:
        return node.replace(
            **{
                name: jax.tree.map(lambda x: x.astype(dtype), getattr(node, name))
                for name in node.data_fields
                if name not in node.frozen_fields
            }
        )

    return task._replace(nodes={path: one(node) for path, node in task.nodes.items()})


def same_backbone(tasks: Sequence[BareTask]) -> dict[str, str | None]:
    """Join what tasks say of their backbone.

    Raises:
        ValueError: if they belong to different ones, or their files are of formats that
            cannot be compared.
    """
    versions = {task.manifest["format_version"] for task in tasks}
    if len({version >= 3 for version in versions}) > 1:
        raise ValueError(
            f"the tasks are of the formats {sorted(versions)}, whose hashes cannot be "
            "compared: bring them to one format with `ftn convert`"
        )
    joined: dict[str, str | None] = {}
    for task in tasks:
        shared = task.manifest["shared"]
        if joined and {*shared} != {*joined}:
            odd = sorted({*shared} ^ {*joined})
            raise ValueError(f"the tasks' backbones differ: {some(odd)}")
        for path, value in shared.items():
            known = joined.setdefault(path, value)
            if None not in (known, value) and known != value:
                raise ValueError(f"the tasks' backbones differ, first in {path}")
            joined[path] = known if value is None else value
    return joined
