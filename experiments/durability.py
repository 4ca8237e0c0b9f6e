"""What it costs to lose nothing: saving, resuming, fingerprints, task files.

    python -m experiments.durability                      # ResNet-18 at 64 px
    python -m experiments.durability --backbone resnet50 --image-px 224 --batch-size 128

Trains with a method of few parameters (FTN) and with the one of most (fine-tuning),
every other round with one save in it, and sets the rounds side by side: what a save
costs is how much longer its round took, divided by the seconds between two saves in
`ftn_jax.fit`. Expected: under 5 % of training time for either.

Writes `durability.json` and `durability.md` under the workdir.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import (
    TaskState,
    make_delta,
    make_optimizer,
    make_train_step,
    restore_task,
    save_task,
)
from ftn_jax.apply import from_linen
from ftn_jax.checkpoint import fingerprint
from ftn_jax.command import launch
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.results import write_benchmark
from ftn_jax.resume import StateFolder


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/durability")
    """Folder for durability.json and durability.md; states go to its disk."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS."""
    image_px: int = 64
    """Height and width of the images."""
    batch_size: int = 32
    """Images per step."""
    rank: int = 8
    """Of FTN."""
    steps: int = 12
    """Steps in a round."""
    rounds: int = 6
    """Pairs of rounds, one of each with a save in it; medians are over the pairs."""
    save_every_s: float = 60.0
    """Seconds between two saves, for the share of training time."""
    million: int = 100
    """Parameters of the tree that is fingerprinted, in millions."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/durability_tiny"),
            backbone="cifar_resnet8",
            image_px=8,
            batch_size=2,
            rank=1,
            steps=1,
            rounds=1,
            million=1,
        )


def seconds(run: Callable[[], Any], *, times: int = 3) -> float:
    """Time a function: the median of some calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def fingerprints(cfg: Config) -> dict[str, float]:
    """Hash a tree of kernels like a network's, by both formats."""
    count = max(1, cfg.million * 10**6 // (9 * 512 * 512))
    rng = np.random.default_rng(0)
    tree = {
        str(n): jnp.asarray(rng.normal(size=(3, 3, 512, 512)), jnp.float32)
        for n in range(count)
    }
    size = sum(x.size for x in tree.values()) / 10**6
    result = {
        "million_parameters": size,
        "seconds": seconds(lambda: fingerprint(tree)),
        "seconds_format_2": seconds(lambda: fingerprint(tree, format_version=2)),
    }
    print(result, flush=True)
    return result


def training(cfg: Config, name: str, place: Path, **options: Any) -> dict[str, Any]:
    """Train with and without saves, resume, and save the task."""
    model = RESNETS[cfg.backbone](num_classes=10)
    size = (cfg.batch_size, cfg.image_px, cfg.image_px, 3)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=size), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, cfg.batch_size)),
    }
    variables = model.init(jax.random.key(0), batch["image"][:1])
    shared, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    method = METHODS[name](RESNET, classes=10, **options)
    delta = make_delta(jax.random.key(1), shared, method.rules_for(shared))
    groups = ("factors", "norm", "head", "weights")
    tx = make_optimizer(dict.fromkeys(groups, 1e-4), steps=10_000)
    state = TaskState.create(delta, stats, tx=tx, key=jax.random.key(2))
    step = jax.jit(make_train_step(from_linen(model), tx), donate_argnums=1)
    folder = StateFolder(place / name)
    state, _ = step(shared, state, batch)  # compile

    def rounds(save: bool) -> tuple[float, float]:
        """Run a round; its seconds, and those that the save blocked it."""
        nonlocal state
        blocked = 0.0
        start = time.perf_counter()
        for n in range(cfg.steps):
            state, _ = step(shared, state, batch)
            if save and n == 0:
                jax.block_until_ready(state)
                before = time.perf_counter()
                folder.save(state)
                blocked = time.perf_counter() - before
        jax.block_until_ready(state)
        return time.perf_counter() - start, blocked

    rounds(True)  # opens the folder
    folder.wait()
    plain, saving, blocked = [], [], []
    for _ in range(cfg.rounds):
        plain.append(rounds(False)[0])
        whole, alone = rounds(True)
        saving.append(whole)
        blocked.append(alone)
        folder.wait()
    extra = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
    arrays = jax.tree.leaves((state.task, state.opt_state))
    saved = place / f"{name}-task"
    save = lambda: save_task(saved, state.task, shared=shared, name=name)  # noqa: E731
    result = {
        "method": name,
        "state_mib": sum(x.size * x.dtype.itemsize for x in arrays) / 2**20,
        "step_ms": 1000 * statistics.median(plain) / cfg.steps,
        "save_blocks_ms": 1000 * statistics.median(blocked),
        "save_costs_ms": 1000 * extra,
        "share_of_training": extra / cfg.save_every_s,
        "resume_ms": 1000 * seconds(lambda: folder.restore(state)),
        "save_task_ms": 1000 * seconds(lambda: (save(), 0)[1]),
        "restore_task_ms": 1000 * seconds(lambda: restore_task(saved, shared).task),
    }
    folder.close()
    print(result, flush=True)
    return result


def markdown(result: dict[str, Any], cfg: Config) -> str:
    """Lay the rows out as a table."""
    lines = [
        "| | state, MiB | step, ms | a save blocks, ms | a save costs, ms "
        f"| share at one in {cfg.save_every_s:.0f} s | resume, ms | save task, ms "
        "| open task, ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['method']} | {r['state_mib']:.1f} | {r['step_ms']:.0f} "
            f"| {r['save_blocks_ms']:.0f} | {r['save_costs_ms']:.0f} "
            f"| {r['share_of_training']:.2%} | {r['resume_ms']:.0f} "
            f"| {r['save_task_ms']:.0f} | {r['restore_task_ms']:.0f} |"
        )
    f = result["fingerprint"]
    lines += [
        "",
        f"Fingerprint of {f['million_parameters']:.0f} million parameters: "
        f"{f['seconds']:.2f} s (SHA-256, as formats 1 and 2: "
        f"{f['seconds_format_2']:.2f} s).",
    ]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict[str, Any]:
    """Measure, print and write the table."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    cfg.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.workdir) as place:
        found = {
            "fingerprint": fingerprints(cfg),
            "rows": [
                training(cfg, "ftn", Path(place), rank=cfg.rank),
                training(cfg, "fine_tuning", Path(place)),
            ],
        }
    table, packages = markdown(found, cfg), ("orbax-checkpoint",)
    return write_benchmark(cfg, "durability", found, table=table, packages=packages)


if __name__ == "__main__":
    launch(Config, main)
