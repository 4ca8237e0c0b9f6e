"""The papers' parameter tables, for any backbone, method and rank, by shapes alone.

    python -m experiments.parameters                       # the papers' settings
    python -m experiments.parameters --backbone resnet50 --ranks 1 8 --classes 200
    python -m experiments.parameters --json

    python -m experiments.parameters --backbone resnet18 --methods all --ranks 1 10

Shapes are enough: `jax.eval_shape` builds backbone and deltas. Totals follow the
papers: the backbone's convolutions once, and for each task its factors and BatchNorm
scale and bias; heads and running statistics are shown but not in the totals. Masks
and switches count as they are trained; a task file holds one bit for each.

Source: FTN (arXiv 2310.06124) and its NeurIPS submission, Tables 1 to 3 and S1. A
printed figure that no reading of the papers' text reproduces is marked.
"""

import json
import re
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from ftn_jax import count
from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.method import Backbone
from ftn_jax.models import RESNETS
from ftn_jax.paths import path_name
from ftn_jax.presets import METHODS, RESNET, Layers
from ftn_jax.presets.budget import plan
from ftn_jax.published import NO_SHORTCUT_BN, PUBLISHED, SETTINGS, Published

RANKED = ("ftn", "lora", "dora", "factored_adapters")


@dataclass(frozen=True)
class Config:
    """Settings of the parameter tables."""

    backbone: str | None = None
    """Count this backbone instead of the papers' settings (see ftn_jax.models)."""
    methods: tuple[str, ...] = ("bn_head", "ftn", "fine_tuning")
    """Names of ftn_jax.presets, or all, with --backbone."""
    ranks: tuple[int, ...] = (1, 10, 50)
    """Ranks of the methods that have one, with --backbone."""
    classes: int = 100
    """Classes of a task's head, with --backbone."""
    tasks: int = 5
    """Number of tasks in the totals, with --backbone."""
    json: bool = False
    """Print JSON instead of tables."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial: the counts of one small network."""
        return cls(backbone="cifar_resnet20", ranks=(1,), classes=10)


def count_backbone(name: str, classes: int) -> dict[str, int]:
    """Count a backbone's kernels, norms, head and running statistics."""
    variables = _variables(name, classes)
    parts = {"kernels": 0, "norms": 0, "head": 0, "statistics": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        kind = (
            "head"
            if re.fullmatch(RESNET.head, path_name(path))
            else "norms"
            if re.fullmatch(RESNET.norms or "", path_name(path))
            else "kernels"
        )
        parts[kind] += leaf.size
    parts["statistics"] = sum(
        leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])
    )
    return parts


def count_task(
    name: str, method: str, *, classes: int, layers: Layers = RESNET, **options: Any
) -> dict[str, int]:
    """Count what one task trains: factors (masks, adapters), norms, head, weights.

    Bases and packed states take real arrays to make: methods that need such are
    counted on random weights, all others by shapes alone.
    """
    variables = _variables(name, classes)
    preset = METHODS[method](layers, classes=classes, **options)
    params = variables["params"]
    if preset.prepare:
        params = jax.tree.map(_random, params)
    state = {"batch_stats": variables["batch_stats"]}
    backbone = Backbone(
        lambda n: from_linen(RESNETS[name](num_classes=n)), params, state, layers
    )
    groups = count(plan(backbone, preset)).by_group
    statistics = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
    return {
        "factors": sum(groups.get(g, 0) for g in ("factors", "masks", "adapters")),
        "norms": groups.get("norm", 0),
        "weights": groups.get("weights", 0),
        "head": groups["head"],
        "statistics": statistics,
    }


def total(base: dict[str, int], task: dict[str, int], tasks: int) -> int:
    """Add up as the papers do: kernels once, factors and norms for each task."""
    own = task["factors"] + task["norms"] + task["weights"]
    replaced = task["weights"] >= base["kernels"]  # fine-tuning keeps no backbone
    return tasks * own + (0 if replaced else base["kernels"])


def compare(figure: Published) -> dict[str, Any]:
    """Set a printed figure beside our count of it."""
    backbone, tasks, classes = SETTINGS[figure.setting]
    base = count_backbone(backbone, classes)
    rank = {"rank": figure.rank} if figure.rank else {}
    counted = partial(count_task, backbone, figure.method, classes=classes, **rank)
    full, read = counted(), counted(layers=figure.layers)
    reading = total(base, read, tasks)
    truncated, rounded = f"{reading // 10_000 / 100:.2f}", f"{reading / 1e6:.2f}"
    return {
        "setting": figure.setting,
        "backbone": backbone,
        "tasks": tasks,
        "method": figure.method,
        "rank": figure.rank,
        "task": full,
        "total": total(base, full, tasks),
        "papers_reading": reading,
        "papers_reading_leaves_out_shortcut_bn": figure.layers is NO_SHORTCUT_BN,
        "printed_millions": figure.millions,
        "printed_figure_holds": figure.millions in (truncated, rounded),
        "note": figure.note,
    }


def report() -> dict[str, Any]:
    """Count the papers' settings."""
    names = ("resnet18", "resnet34", "resnet50")
    return {
        "rank_1_factors_per_task": {
            name: count_task(name, "ftn", rank=1, classes=1)["factors"]
            for name in names
        },
        "backbones": {name: count_backbone(name, 1000) for name in names},
        "rows": [compare(figure) for figure in PUBLISHED],
    }


def report_backbone(cfg: Config) -> dict[str, Any]:
    """Count one backbone: every method that was asked for, those with ranks at each."""
    name = cfg.backbone or ""
    if name not in RESNETS:
        raise ValueError(f"--backbone {name}: unknown, known are {sorted(RESNETS)}")
    base = count_backbone(name, cfg.classes)
    rows = []
    for method, options in _rows(cfg):
        try:
            task = count_task(name, method, classes=cfg.classes, **options)
        except ValueError as error:  # a size or a shape that the method refuses
            rows.append({"method": method, "options": options, "refused": str(error)})
            continue
        own = task["factors"] + task["norms"] + task["weights"]
        rows.append(
            {
                "method": method,
                "options": options,
                "task": task,
                "share_of_backbone": own / (base["kernels"] + base["norms"]),
                "total": total(base, task, cfg.tasks),
            }
        )
    return {"backbone": name, "tasks": cfg.tasks, "base": base, "rows": rows}


def main(cfg: Config) -> dict[str, Any]:
    """Print the counts."""
    result = report_backbone(cfg) if cfg.backbone else report()
    if cfg.json:
        print(json.dumps(result, indent=1))
    elif cfg.backbone:
        _print_backbone(result)
    else:
        _print_papers(result)
    return result


def _print_backbone(result: dict[str, Any]) -> None:
    base = ", ".join(f"{v:,} {k}" for k, v in result["base"].items())
    print(f"{result['backbone']}: {base}\n")
    head = ("factors", "norms", "weights", "head", "statistics")
    print(
        f"| method | {' | '.join(head)} | share | total, {result['tasks']} tasks |\n"
        f"|---|{'--:|' * (len(head) + 2)}"
    )
    for row in result["rows"]:
        if "refused" in row:
            print(f"| {_label(row)} | not for this network: {row['refused']} |")
            continue
        cells = " | ".join(f"{row['task'][h]:,}" for h in head)
        share = f"{row['share_of_backbone']:.1%}"
        print(f"| {_label(row)} | {cells} | {share} | {row['total']:,} |")


def _print_papers(result: dict[str, Any]) -> None:
    for name, size in result["rank_1_factors_per_task"].items():
        print(f"{name}: {size:,} factors per task at rank 1 (all convs but the stem)")
    print(
        "\n| setting | method | factors | norms | head | statistics | total "
        "| papers' reading | printed | |\n|---|---|--:|--:|--:|--:|--:|--:|--:|---|"
    )
    for row in result["rows"]:
        task = row["task"]
        parts = " | ".join(
            f"{task[h]:,}" for h in ("factors", "norms", "head", "statistics")
        )
        verdict = "ok" if row["printed_figure_holds"] else f"DIFFERS: {row['note']}"
        print(
            f"| {row['setting']} ({row['backbone']}, {row['tasks']} tasks) "
            f"| {_label(row)} | {parts} | {row['total']:,} "
            f"| {row['papers_reading']:,} | {row['printed_millions']} M | {verdict} |"
        )
    print(
        "\ntotal: convolutions + tasks x (factors + norms). The papers' reading for "
        "DomainNet and NYUD leaves the shortcuts' BatchNorms out; they truncate."
    )


def _rows(cfg: Config) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for method in METHODS if "all" in cfg.methods else cfg.methods:
        if method in RANKED:
            rows += [(method, {"rank": rank}) for rank in cfg.ranks]
        elif method in METHODS:
            rows.append((method, {}))
        else:
            raise ValueError(f"--methods {method}: unknown, known are {[*METHODS]}")
    return rows


def _label(row: dict[str, Any]) -> str:
    rank = row.get("rank") or row.get("options", {}).get("rank")
    return f"{row['method']} R={rank}" if rank else row["method"]


def _random(x: Any) -> Any:
    return jax.random.normal(jax.random.key(0), x.shape, x.dtype)


@cache
def _variables(name: str, classes: int) -> Any:
    model = RESNETS[name](num_classes=classes)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


if __name__ == "__main__":
    launch(Config, main)
