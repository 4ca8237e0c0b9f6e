"""`ftn`: look at task files, check, combine and change them, and merge them.

    ftn inspect runs/multi_domain/tasks/digits/ftn_r_8/seed0
    ftn merge TASK OUT.safetensors --backbone resnet18 --weights resnet18.safetensors

`ftn COMMAND --help` explains every flag.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro
from tyro.conf import Positional

from ftn_jax import task_edit
from ftn_jax.algebra import combine
from ftn_jax.checkpoint import restore_task, save_task
from ftn_jax.export import (
    Naming,
    Variables,
    load_backbone,
    merge_task,
    write_checkpoint,
)
from ftn_jax.extras import restore_extras
from ftn_jax.lower_rank import recompress
from ftn_jax.task_parts import BareTask, read_bare, write_bare

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class _Backbone:
    """Which backbone a task belongs to."""

    weights: str | None = None
    """Checkpoint (.safetensors, .pth, .npz) or hub name (hf://owner/repo)."""
    backbone: str | None = None
    """Name in ftn_jax.models (resnet18, clip_vit_b32); without it, the tensors are
    called params/... and batch_stats/..., as `ftn merge` writes them."""
    classes: int | None = None
    """Classes of the checkpoint's head, where not the name's default."""
    extras: Path | None = None
    """Folder of what the task reads beside the backbone (save_extras wrote it)."""

    def load(self) -> tuple[Variables, object]:
        """Read the variables, and the parameters with what lies beside them."""
        if self.weights is None:
            raise ValueError("give the backbone's checkpoint: --weights")
        found = load_backbone(self.weights, name=self.backbone, classes=self.classes)
        if self.extras is None:
            return found, found.params
        return found, restore_extras(self.extras, found.params)


@dataclass(frozen=True)
class Inspect:
    """Show what a task file holds; no backbone is needed."""

    task: Positional[Path]
    """The task's folder."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Print it."""
        found = task_edit.summary(read_bare(self.task))
        if self.json:
            print(json.dumps(found, indent=1))
            return 0
        print(
            f"{found['name']}: {found['parameters']:,} parameters, "
            f"{found['bytes']:,} bytes, format {found['format_version']}"
        )
        for group, size in found["by_group"].items():
            print(f"  {group:<12} {size:>12,}")
        width = max((len(node["path"]) for node in found["nodes"]), default=0)
        for node in found["nodes"]:
            shapes = " ".join("x".join(map(str, s)) or "1" for s in node["arrays"])
            print(f"{node['path']:<{width}}  {node['type']:<12} {shapes}")
        for key in ("class_names", "preprocessing", "metadata"):
            print(f"{key}: {json.dumps(found[key], ensure_ascii=False)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(_Backbone):
    """Check files whole, and that they belong to a backbone if one is given."""

    tasks: Positional[tuple[Path, ...]]
    """The tasks' folders."""

    def run(self) -> int:
        """Say for each task whether it is whole; 1 if any is not."""
        shared = None if self.weights is None else self.load()[1]
        bad = 0
        for path in self.tasks:
            try:
                if shared is None:
                    read_bare(path)
                else:
                    restore_task(path, shared)
                print(f"{path}: whole")
            except (ValueError, OSError) as error:
                bad += 1
                print(error, file=sys.stderr)
        return min(bad, 1)


@dataclass(frozen=True, kw_only=True)
class Merge(_Backbone):
    """Write the whole network of a task as one checkpoint."""

    task: Positional[Path]
    """The task's folder."""
    out: Positional[Path]
    """File to write."""
    naming: Naming = "safetensors"
    """flax: msgpack; safetensors: params/..., batch_stats/...; torchvision: PyTorch's
    names and layouts, in safetensors."""

    def run(self) -> int:
        """Write it."""
        found, shared = self.load()
        saved = restore_task(self.task, shared)
        merged = merge_task(found, shared, saved.task)
        write_checkpoint(self.out, merged, naming=self.naming)
        print(f"wrote {self.out}: {saved.name}, {len(saved.class_names)} classes")
        return 0


@dataclass(frozen=True)
class Diff:
    """Say how two tasks differ; 1 if they do."""

    one: Positional[Path]
    """A task's folder."""
    two: Positional[Path]
    """Another one."""

    def run(self) -> int:
        """Print the differences."""
        found = task_edit.differences(read_bare(self.one), read_bare(self.two))
        print("\n".join(found) or "the same")
        return min(len(found), 1)


@dataclass(frozen=True)
class Sum:
    """Add up tasks' updates with weights; factors are laid side by side, exactly."""

    tasks: Positional[tuple[Path, ...]]
    """The tasks' folders."""
    out: Path
    """Folder to write."""
    weights: tuple[float, ...] = ()
    """One number for each task; default: 1 each."""
    take: int = 0
    """Which task (from 0) gives what cannot be added: replaced leaves (norms, head),
    running statistics, class names, preprocessing."""
    rank: int | None = None
    """Bring the sum's updates down to this rank; default: the ranks add up."""

    def run(self) -> int:
        """Write the sum."""
        tasks = [read_bare(path) for path in self.tasks]
        weights = self.weights or (1.0,) * len(tasks)
        if len(weights) != len(tasks) or not 0 <= self.take < len(tasks):
            raise ValueError(
                f"{len(tasks)} tasks, {len(weights)} weights, --take {self.take}: "
                "expected one weight for each task, and --take below their number"
            )
        shared = task_edit.same_backbone(tasks)
        paths = sorted({path for task in tasks for path in task.nodes})
        names = [str(n) for n in range(len(tasks))]
        nodes = combine(
            {
                n: {p: t.nodes.get(p) for p in paths}
                for n, t in zip(names, tasks, strict=True)
            },
            dict(zip(names, weights, strict=True)),
            replaced=names[self.take],
        )
        chosen = tasks[self.take]
        terms = [
            {"name": t.manifest["name"], "weight": w}
            for t, w in zip(tasks, weights, strict=True)
        ]
        manifest = chosen.manifest | {
            "name": "_".join(t.manifest["name"] for t in tasks),
            "metadata": {"sum": terms},
            "shared": shared,
        }
        nodes = {path: node for path, node in nodes.items() if node is not None}
        if self.rank is not None:
            nodes, errors = recompress(nodes, self.rank)
            for path, error in errors.items():
                print(f"{path}: {error:.2%} of the update lost")
        write_bare(self.out, BareTask(nodes, chosen.model_state, manifest))
        print(f"wrote {self.out}: {manifest['name']}, {len(nodes)} nodes")
        return 0


@dataclass(frozen=True)
class Prune:
    """Take layers' nodes out of a task: there it is the backbone again."""

    task: Positional[Path]
    """The task's folder."""
    drop: tuple[str, ...]
    """Regular expressions, matched against whole paths: 'layer4_.*/kernel'."""
    out: Path
    """Folder to write."""

    def run(self) -> int:
        """Write what is left."""
        task = read_bare(self.task)
        kept = task_edit.prune(task, self.drop)
        write_bare(self.out, kept)
        print(f"wrote {self.out}: {len(kept.nodes)} of {len(task.nodes)} nodes")
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert(_Backbone):
    """Bring a task file to the present format, in another precision if wanted."""

    task: Positional[Path]
    """The task's folder."""
    out: Positional[Path]
    """Folder to write."""
    dtype: Dtype | None = None
    """Floating type of the trained arrays; default: as they are."""

    def run(self) -> int:
        """Write it."""
        _, shared = self.load()
        saved = restore_task(self.task, shared)
        save_task(
            self.out,
            saved.task,
            shared=shared,
            name=saved.name,
            class_names=saved.class_names,
            preprocessing=saved.preprocessing,
            metadata=saved.metadata,
        )
        if self.dtype:
            write_bare(
                self.out, task_edit.cast(read_bare(self.out), jnp.dtype(self.dtype))
            )
        print(f"wrote {self.out}: {saved.name}")
        return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 2 for a wrong or damaged input."""
    command = tyro.cli(
        Inspect | Verify | Merge | Diff | Sum | Prune | Convert,
        prog="ftn",
        description=__doc__,
        args=args,
    )
    try:
        return command.run()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
