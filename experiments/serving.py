"""What serving many tasks costs: materialize, switch, and batches of mixed tasks.

    python -m experiments.serving                       # ResNet-18 at 64 px, batch 32
    python -m experiments.serving --image-px 32
    python -m experiments.serving --backbone resnet50 --image-px 224 --bf16

Every row is a compiled program in evaluation mode. One merged task, the floor, runs the
whole batch on parameters that are there already. The others serve K tasks, each with
its share of the batch:

- mixed: one program for any mix; the frozen network runs once, each example has its
  own factors, norms and head. It starts from the bank: nothing is prepared.
- loop: the tasks one after another, each on its own examples, on parameters that were
  materialized before, or are for each batch.
- vmapped merging: one program that merges a kernel for each task; convolutions become
  grouped ones. Tasks have heads of one size here, which only the mixed batch needs not.

Rounds are interleaved, so that a machine that slows down slows every row; times are
medians over the rounds, ratios are taken within each round.

Writes `serving.json` and `serving.md` under the workdir. Expected on a CPU: 32 tasks in
one batch within 1.5 of one merged task.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import Task, make_delta, materialize
from ftn_jax.apply import from_linen
from ftn_jax.bank import Bank
from ftn_jax.command import launch
from ftn_jax.forward import cast
from ftn_jax.mixed import make_mixed_eval_step
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.results import write_benchmark
from ftn_jax.step_cost import interleave

Runs = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/serving")
    """Folder for serving.json and serving.md."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS."""
    image_px: int = 64
    """Height and width of the images."""
    batch_size: int = 32
    """Images per batch."""
    tasks: tuple[int, ...] = (1, 4, 16, 32)
    """Numbers of tasks in one batch; each must divide the batch size."""
    method: Literal["ftn", "lora", "bn_head"] = "ftn"
    """Name in ftn_jax.presets of what the tasks are made by."""
    rank: int = 10
    """Rank of the tasks' factors."""
    classes: int = 10
    """Size of the heads."""
    rounds: int = 7
    """Interleaved rounds; medians are over these."""
    calls: int = 1
    """Calls of each row in a round."""
    vmapped: tuple[int, ...] = (4,)
    """Numbers of tasks, among `tasks`, for which vmapped merging is timed too; it is
    many times slower than the rest on a CPU."""
    bf16: bool = False
    """Compute in bfloat16."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/serving_tiny"),
            backbone="cifar_resnet8",
            image_px=16,
            batch_size=4,
            tasks=(1, 4),
            rank=2,
            rounds=2,
        )


def random_tasks(cfg: Config, shared: Any, model_state: Any) -> dict[str, Task]:
    """Make tasks of random arrays: what they are does not matter to the time."""
    options = {} if cfg.method == "bn_head" else {"rank": cfg.rank}
    method = METHODS[cfg.method](RESNET, classes=cfg.classes, **options)
    delta = make_delta(jax.random.key(1), shared, method.rules_for(shared))
    rng = np.random.default_rng(0)

    def draw(x: Any) -> Any:
        return jnp.asarray(rng.normal(0.1, 0.1, x.shape), x.dtype)

    names = [f"task{n}" for n in range(max(cfg.tasks))]
    return {name: Task(jax.tree.map(draw, delta), model_state) for name in names}


def serving_rows(cfg: Config) -> tuple[Runs, dict[str, Any]]:
    """Return what is timed, by the name of its row, and what is known beforehand."""
    model = RESNETS[cfg.backbone](num_classes=cfg.classes)
    px = cfg.image_px
    variables = model.init(jax.random.key(0), jnp.zeros((1, px, px, 3)))
    shared, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}
    tasks = random_tasks(cfg, shared, model_state)
    bank = Bank.of(tasks, shared=shared)
    apply, dtype = from_linen(model), jnp.bfloat16 if cfg.bf16 else None
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(cfg.batch_size, px, px, 3)), jnp.float32)

    def run(params: Any, model_state: Any, images: Any) -> Any:
        batch = {"image": cast(images, dtype)}
        return apply(cast(params, dtype), model_state, batch, train=False)[0]

    def merge_and_run(task: Task, images: Any) -> Any:
        return run(materialize(shared, task.delta), task.model_state, images)

    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    alone, merging = jax.jit(run), jax.jit(merge_and_run)
    vmapped = jax.jit(jax.vmap(merge_and_run))
    mixed = jax.jit(make_mixed_eval_step(apply, metrics=None, compute_dtype=dtype))
    first = tasks["task0"]
    merged = {name: materialize(shared, task.delta) for name, task in tasks.items()}

    def parts(count: int) -> list[tuple[str, Any]]:
        return list(zip([*tasks][:count], jnp.split(images, count), strict=True))

    rows: Runs = {
        "one merged task": lambda: alone(merged["task0"], model_state, images),
        "copy of the backbone": lambda: copy(shared),
        "materialize": lambda: materialize(shared, first.delta),
        "switch: materialize, then a batch": lambda: merging(first, images),
    }
    for count in cfg.tasks:
        if cfg.batch_size % count:
            raise ValueError(f"--tasks {count} does not divide {cfg.batch_size}")
        each = cfg.batch_size // count
        ids = bank.ids(np.repeat([*tasks][:count], each))
        stack = jax.tree.map(lambda *x: jnp.stack(x), *[*tasks.values()][:count])
        split, stacked = parts(count), images.reshape(count, each, px, px, 3)

        def batch(ids: Any = ids) -> Any:
            return mixed(shared, bank.stack, ids, {"image": images})

        def loop(split: Any = split) -> Any:
            return [alone(merged[n], model_state, x) for n, x in split]

        def loop_merging(split: Any = split) -> Any:
            return [merging(tasks[n], x) for n, x in split]

        def stacked_tasks(stack: Any = stack, x: Any = stacked) -> Any:
            return vmapped(stack, x)

        rows[f"mixed, {count}"] = batch
        if count > 1:
            rows[f"loop, merged before, {count}"] = loop
            rows[f"loop, merging, {count}"] = loop_merging
            if count in cfg.vmapped:
                rows[f"vmapped merging, {count}"] = stacked_tasks
    size = sum(x.nbytes for x in jax.tree.leaves(shared))
    return rows, {"backbone_mib": size / 2**20, "task_mib": _mib(first)}


def _mib(tree: Any) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20


def measure(cfg: Config) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compile and time every row."""
    rows, facts = serving_rows(cfg)

    def repeated(run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [jax.block_until_ready(run()) for _ in range(cfg.calls)]

    times = interleave(
        {name: repeated(run) for name, run in rows.items()}, rounds=cfg.rounds
    )

    def ratio(name: str, base: str) -> float:
        pairs = zip(times[name], times[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    table = [
        {
            "row": name,
            "ms": 1000 * statistics.median(times[name]) / cfg.calls,
            "times_one_merged": ratio(name, "one merged task"),
            "times_copy": ratio(name, "copy of the backbone"),
        }
        for name in rows
    ]
    return table, facts


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    lines = ["| row | ms | x one merged task | x copy |", "|---|--:|--:|--:|"]
    for r in rows:
        lines.append(
            f"| {r['row']} | {r['ms']:.1f} | {r['times_one_merged']:.2f} "
            f"| {r['times_copy']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict[str, Any]:
    """Measure, print and write the table."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    rows, facts = measure(cfg)
    found = {**facts, "rows": rows}
    return write_benchmark(cfg, "serving", found, table=markdown(rows))


if __name__ == "__main__":
    launch(Config, main)
