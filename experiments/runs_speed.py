"""Many runs in one program: what eight seeds, or eight ranks, take, compiling included.

    python -m experiments.runs_speed

Eight runs of FTN on one backbone, trained for some steps on the same batch, timed
from the first compilation to the last step:

- `Together`: all runs by one program (`ftn_jax.runs`).
- separate seeds: one run after the other in one process, the step compiled once.
- separate ranks: one run after the other, the step compiled for each rank.

Each round times every row; nothing compiled is kept between rows or rounds, in memory
or on disk. Ratios are taken within a round, medians over the rounds. Writes
`runs_speed.json` and `runs_speed.md` under the workdir.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.factored import factored
from ftn_jax.models import RESNETS
from ftn_jax.presets import RESNET, ftn
from ftn_jax.results import write_benchmark
from ftn_jax.runs import Form, Together, fill


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/runs_speed")
    """Folder for runs_speed.json and runs_speed.md."""
    backbone: str = "cifar_resnet20"
    """Name in ftn_jax.models.RESNETS."""
    image_px: int = 32
    """Height and width of the images."""
    batch_size: int = 32
    """Images per step of a run."""
    ranks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Rank of each run; the runs of the seeds all have the largest."""
    steps: int = 10
    """Steps of each run."""
    rounds: int = 3
    """Interleaved rounds."""
    kinds: tuple[Literal["seeds", "ranks"], ...] = ("seeds", "ranks")
    """What the runs differ in."""
    form: Form | None = None
    """How the runs go together; by default as the kind of device wants it."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/runs_speed_tiny"),
            backbone="cifar_resnet8",
            image_px=8,
            batch_size=2,
            ranks=(1, 2),
            steps=1,
            rounds=1,
        )


def main(cfg: Config) -> dict[str, Any]:
    """Time every row; print and write the seconds and ratios."""
    jax.config.update("jax_enable_compilation_cache", False)
    model = RESNETS[cfg.backbone](num_classes=10)
    rng = np.random.default_rng(0)
    size = (cfg.batch_size, cfg.image_px, cfg.image_px, 3)
    batch = {
        "image": jnp.asarray(rng.normal(size=size), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, cfg.batch_size)),
    }
    variables = dict(jax.jit(model.init)(jax.random.key(0), batch["image"]))
    shared = variables.pop("params")
    tx = make_optimizer({"factors": 1e-3, "norm": 1e-2, "head": 1e-2}, steps=cfg.steps)

    def states(ranks: Sequence[int], *, filled: bool) -> list[TaskState]:
        keys = [jax.random.key(n) for n in range(len(ranks))]
        deltas = [
            make_delta(
                key, shared, ftn(RESNET, classes=10, rank=rank).rules_for(shared)
            )
            for key, rank in zip(keys, ranks, strict=True)
        ]
        return [
            # Every run trains buffers of its own, for the step donates them.
            TaskState.create(delta, jax.tree.map(jnp.copy, variables), tx=tx, key=key)
            for delta, key in zip(fill(deltas) if filled else deltas, keys, strict=True)
        ]

    def new_step() -> Any:
        return make_train_step(from_linen(model), tx, forward=factored)

    def together(ranks: Sequence[int]) -> Any:
        run = Together(new_step(), form=cfg.form)
        runs = run.begin(states(ranks, filled=True))
        for _ in range(cfg.steps):
            runs, _ = run(shared, runs, [batch])
        return runs.states

    def separate(ranks: Sequence[int]) -> Any:
        step = jax.jit(new_step(), donate_argnums=1)
        ends = []
        for state in states(ranks, filled=False):
            for _ in range(cfg.steps):
                state, _ = step(shared, state, batch)
            ends.append(jax.block_until_ready(state))
        return ends

    ranks = {"seeds": (max(cfg.ranks),) * len(cfg.ranks), "ranks": cfg.ranks}
    rows: dict[str, Callable[[], Any]] = {}
    for kind in cfg.kinds:
        rows[f"Together, {kind}"] = partial(together, ranks[kind])
        rows[f"separate {kind}"] = partial(separate, ranks[kind])
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(cfg.rounds):
        for name, run in rows.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    ratios = {
        kind: statistics.median(
            one / many
            for one, many in zip(
                seconds[f"Together, {kind}"], seconds[f"separate {kind}"], strict=True
            )
        )
        for kind in cfg.kinds
    }
    lines = [
        f"- {kind}: Together takes {ratio:.2f} of the separate runs' time\n"
        for kind, ratio in ratios.items()
    ]
    found = {"seconds": seconds, "ratios": ratios}
    return write_benchmark(cfg, "runs_speed", found, table="".join(lines))


if __name__ == "__main__":
    launch(Config, main)
