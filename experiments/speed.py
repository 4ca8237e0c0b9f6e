"""What a training step costs: time, work and memory of every method, in one process.

    python -m experiments.speed                                   # ResNet-18 at 64 px
    python -m experiments.speed --backbone cifar_resnet20 --image-px 32 --methods all
    python -m experiments.speed --backbone resnet50 --image-px 224 --batch-size 128

Each row is one compiled training step. Rounds are interleaved (every row once, then
again), so that a machine that slows down slows all of them; times are medians over the
rounds, ratios are taken within each round against full fine-tuning and against
BN + head, the floor for any method that trains something in every layer. FLOPs and
peak temporary memory are the compiler's own counts. FTN and LoRA run twice: through
`materialize`, and by the factored path, which never forms a kernel's gradient.

Writes `speed.json` and `speed.md` under the workdir.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import TaskState, count, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import Apply, from_linen
from ftn_jax.atomic import write_atomic
from ftn_jax.command import launch
from ftn_jax.factored import factored
from ftn_jax.forward import Forward, merged
from ftn_jax.method import Backbone, Method
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.results import describe_device
from ftn_jax.sizes import backbone_size, stored_size

GROUPS = ("factors", "masks", "adapters", "weights", "norm", "head")
RATES: dict[str, float] = {group: 1e-4 for group in GROUPS}


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/speed")
    """Folder for speed.json and speed.md."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS."""
    image_px: int = 64
    """Height and width of the images."""
    batch_size: int = 32
    """Images per step."""
    methods: tuple[str, ...] = ()
    """Names of ftn_jax.presets, or all, beside the fixed rows."""
    ranks: tuple[int, ...] = (1, 10, 50)
    """Ranks of the FTN and LoRA rows."""
    classes: int = 10
    """Size of the head."""
    rounds: int = 7
    """Interleaved rounds; medians are over these."""
    steps: int = 3
    """Steps of each row in a round."""
    bf16: bool = False
    """Compute in bfloat16."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/speed_tiny"),
            backbone="cifar_resnet8",
            image_px=16,
            batch_size=4,
            ranks=(2,),
            rounds=2,
            steps=1,
        )


class Candidate(NamedTuple):
    """A row: a method and how its network runs."""

    method: Method
    forward: Forward = merged


class Compiled(NamedTuple):
    """A row's step, ready to run."""

    step: Any
    shared: Any
    state: TaskState
    params: int
    flops: float
    temp_bytes: int


def candidates(cfg: Config) -> dict[str, Candidate]:
    """List the rows."""

    def make(name: str, **options: Any) -> Method:
        return METHODS[name](RESNET, classes=cfg.classes, **options)

    rows = {
        "fine-tuning": Candidate(make("fine_tuning")),
        "BN + head": Candidate(make("bn_head")),
        "head only": Candidate(make("feature_extractor")),
    }
    for rank in cfg.ranks:
        for label, name in (("FTN", "ftn"), ("LoRA", "lora")):
            method = make(name, rank=rank)
            rows[f"{label} R={rank}, materialized"] = Candidate(method)
            rows[f"{label} R={rank}, factored"] = Candidate(method, factored)
    taken = {"fine_tuning", "bn_head", "feature_extractor", "ftn", "lora"}
    ranked = {"dora": {"rank": 4}, "factored_adapters": {"rank": 0.5}}
    for name in METHODS if "all" in cfg.methods else cfg.methods:
        if name not in METHODS:
            raise ValueError(f"--methods {name}: unknown, known are {[*METHODS]}")
        if name not in taken:
            label = name.replace("_", " ")
            rows[label] = Candidate(make(name, **ranked.get(name, {})))
    return rows


def compile_row(
    cfg: Config, backbone: Backbone, row: Candidate, batch: dict[str, Any]
) -> Compiled:
    """Compile one training step."""
    method = row.method
    if method.prepare:
        backbone = method.prepare(backbone)
    shared = backbone.shared
    delta = make_delta(jax.random.key(1), shared, method.rules_for(shared))
    groups = count(delta).by_group
    tx = make_optimizer({g: RATES[g] for g in groups}, steps=10_000)
    state = TaskState.create(delta, backbone.model_state, tx=tx, key=jax.random.key(2))
    penalty = method.penalty
    step = make_train_step(
        backbone.network(cfg.classes),
        tx,
        penalty=penalty and (lambda delta, step: penalty(delta, step / 10_000)),
        forward=row.forward,
        frozen_stats=method.frozen_stats,
        compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
    )
    compiled = jax.jit(step, donate_argnums=1).lower(shared, state, batch).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        compiled,
        shared,
        state,
        stored_size(delta),
        float((cost or {}).get("flops", float("nan"))),
        int(memory.temp_size_in_bytes) if memory else 0,
    )


def interleave(
    rows: dict[str, Callable[[], Any]], *, rounds: int
) -> dict[str, list[float]]:
    """Time every row once a round, after one round that does not count; seconds."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for n in range(rounds + 1):
        for name, run in rows.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if n:
                times[name].append(time.perf_counter() - start)
    return times


def stepper(compiled: Compiled, batch: dict[str, Any], steps: int) -> Callable[[], Any]:
    """Return a function that runs some steps; the state goes on from call to call."""
    state = compiled.state

    def run() -> Any:
        nonlocal state
        for _ in range(steps):
            state, sums = compiled.step(compiled.shared, state, batch)
        return sums

    return run


def measure(cfg: Config) -> list[dict[str, Any]]:
    """Compile and time every row."""
    model = RESNETS[cfg.backbone](num_classes=cfg.classes)
    image = jnp.zeros((1, cfg.image_px, cfg.image_px, 3))
    variables = model.init(jax.random.key(0), image)

    def network(classes: int) -> Apply:
        return from_linen(model)

    backbone = Backbone(
        network, variables["params"], {"batch_stats": variables["batch_stats"]}, RESNET
    )
    rng = np.random.default_rng(0)
    size = (cfg.batch_size, cfg.image_px, cfg.image_px, 3)
    batch = {
        "image": jnp.asarray(rng.normal(size=size), jnp.float32),
        "label": jnp.asarray(rng.integers(0, cfg.classes, cfg.batch_size)),
    }
    rows: dict[str, Compiled] = {}
    for name, row in candidates(cfg).items():
        rows[name] = compile_row(cfg, backbone, row, batch)
        print(f"compiled {name}", flush=True)
    runs = {name: stepper(row, batch, cfg.steps) for name, row in rows.items()}
    times = interleave(runs, rounds=cfg.rounds)
    full, floor = times["fine-tuning"], times["BN + head"]

    def ratio(own: list[float], base: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(own, base, strict=True))

    return [
        {
            "row": name,
            "params": row.params,
            "share_of_backbone": row.params / backbone_size(backbone),
            "step_ms": 1000 * statistics.median(times[name]) / cfg.steps,
            "times_fine_tuning": ratio(times[name], full),
            "times_bn_head": ratio(times[name], floor),
            "flops": row.flops,
            "flops_of_fine_tuning": row.flops / rows["fine-tuning"].flops,
            "temp_mib": row.temp_bytes / 2**20,
        }
        for name, row in rows.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    lines = [
        "| row | trained | step, ms | x fine-tuning | x BN + head "
        "| FLOPs of fine-tuning | temporary, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['row']} | {r['share_of_backbone']:.1%} | {r['step_ms']:.1f} "
            f"| {r['times_fine_tuning']:.2f} | {r['times_bn_head']:.2f} "
            f"| {r['flops_of_fine_tuning']:.2f} | {r['temp_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict[str, Any]:
    """Measure, print and write the table."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    rows = measure(cfg)
    result = {
        "config": json.loads(json.dumps(asdict(cfg), default=str)),
        "device": describe_device(),
        "versions": {p: version(p) for p in ("ftn-jax", "jax", "jaxlib", "flax")},
        "rows": rows,
    }
    cfg.workdir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(result, indent=1)
    write_atomic(cfg.workdir / "speed.json", content.encode())
    write_atomic(cfg.workdir / "speed.md", markdown(rows).encode())
    print(f"\n{markdown(rows)}\n{result['device']}; {cfg.workdir / 'speed.json'}")
    return result


if __name__ == "__main__":
    launch(Config, main)
