"""What the gradient of each layer's factors costs, by each way to get it.

    python -m experiments.layer_speed                                # ResNet-18
    python -m experiments.layer_speed --backbone resnet50 --image-px 224 \\
        --batch-size 128 --bf16

Every distinct convolution of a ResNet is timed by itself, forward and backward: frozen,
and with FTN's factors by each way of `ftn_jax.factored` (whole kernel, chain, branch).
Calls are interleaved; what a way adds is the median of its difference to the frozen
layer within a round. The table holds these beside what `"auto"` chooses, and what all
layers of the network add by each way, by that choice and by the best way of each. From
the same times come rates of a `Machine`, by least squares on the counted work
(`ftn_jax/factored/cost.py` says which machines it knows): how to fit a new one.

Writes `layer_speed.json` and `layer_speed.md` under the workdir.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.core import make_delta
from ftn_jax.factored import Cost, Planned, Work, factored
from ftn_jax.factored.cost import Machine
from ftn_jax.factored.factors import factors_of
from ftn_jax.factored.hooks import Branch, Chain
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP
from ftn_jax.results import write_benchmark
from ftn_jax.step_cost import compile_together, interleave

FROZEN = "frozen"


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/layer_speed")
    """Folder for layer_speed.json and layer_speed.md."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS."""
    image_px: int = 96
    """Height and width of the images."""
    batch_size: int = 32
    """Images per call."""
    rank: int = 10
    """Rank of the factors."""
    rounds: int = 5
    """Interleaved rounds."""
    steps: int = 3
    """Calls of each way in a round."""
    bf16: bool = False
    """Compute in bfloat16."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/layer_speed_tiny"),
            backbone="cifar_resnet8",
            image_px=8,
            batch_size=2,
            rank=2,
            rounds=1,
            steps=1,
        )


def plan(cfg: Config) -> list[Planned]:
    """Plan the network's layers, from shapes alone."""
    model = RESNETS[cfg.backbone](num_classes=10)
    size = (cfg.batch_size, cfg.image_px, cfg.image_px, 3)
    image = jax.ShapeDtypeStruct(size, jnp.float32)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), image))
    shared = variables.pop("params")
    rules = {".*conv.*/kernel": partial(CP.init, rank=cfg.rank)}
    make = partial(make_delta, rules=rules)
    delta = jax.eval_shape(make, jax.random.key(0), shared)
    return factored.plan(
        from_linen(model),
        shared,
        delta,
        variables,
        {"image": image},
        compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
    )


def ways(row: Planned, rank: int) -> dict[str, Callable[[], Any]]:
    """Compile a layer's forward and backward pass, by each way."""
    (use,) = row.uses
    op, dtype = use.op, use.x.dtype
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], use.x.shape, dtype)
    out_bar = jax.random.normal(keys[1], use.out.shape, use.out.dtype)
    kernel = 0.1 * jax.random.normal(keys[2], use.kernel.shape)
    node = CP.init(keys[3], kernel, rank=rank)
    roles = op.roles(kernel.ndim)
    assert roles is not None

    def run(way: str, x: Any, node: CP, kernel: Any) -> Any:
        if way == FROZEN:
            return op(x, kernel.astype(dtype))
        if way == "kernel":
            return op(x, node.merge(kernel).astype(dtype))
        factors = factors_of(node, kernel.shape, roles)
        assert factors is not None
        if way == "branch":
            return Branch(factors).run(op, x, kernel.astype(dtype))
        merged = jax.lax.stop_gradient(node.merge(kernel).astype(dtype))
        return Chain(factors).run(op, x, merged)

    def both(way: str, x: Any, node: CP, kernel: Any, out_bar: Any) -> Any:
        out, pull = jax.vjp(lambda x, node: run(way, x, node, kernel), x, node)
        return out, pull(out_bar)

    arrays = x, node, kernel, out_bar

    def compiled(way: str) -> Callable[[], Any]:
        return partial(jax.jit(partial(both, way)).lower(*arrays).compile(), *arrays)

    return compile_together({w: partial(compiled, w) for w in (FROZEN, *Work._fields)})


def measure(cfg: Config) -> list[dict[str, Any]]:
    """Time every distinct layer; one row each, times in microseconds."""
    layers = [row for row in plan(cfg) if row.work]
    count = Counter(map(_shape, layers))
    rows = []
    for row in {_shape(row): row for row in layers}.values():
        times = interleave(ways(row, cfg.rank), rounds=cfg.rounds, steps=cfg.steps)
        added = {
            way: median(
                own - base for own, base in zip(times[way], times[FROZEN], strict=True)
            )
            for way in Work._fields
        }
        rows.append(
            {
                "layer": _shape(row),
                "count": count[_shape(row)],
                "choice": row.choice,
                "frozen_us": 1e6 * median(times[FROZEN]),
                "added_us": {way: 1e6 * value for way, value in added.items()},
                "work": {way: cost._asdict() for way, cost in _work(row).items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)  # long: a run that ends early says this
    return rows


def _work(row: Planned) -> dict[str, Cost]:
    assert row.work is not None
    return row.work._asdict()


def _shape(row: Planned) -> str:
    (use,) = row.uses
    *taps, inputs, outputs = use.kernel.shape
    places = "x".join(map(str, use.out.shape[1:-1]))
    window = "x".join(map(str, taps))
    return f"{window}, {inputs} to {outputs}, {places} places, {use.op.strides}"


def fit(rows: Sequence[dict[str, Any]]) -> Machine:
    """Fit a machine's rates to what the ways add, relative errors alike.

    What adds less than a tenth of its layer's own time counts as that much: smaller
    differences are noise. A kind of work that explains nothing gets the rate infinity.
    """
    pairs = [(row, way) for row in rows for way in Work._fields]
    counted = np.asarray([Cost(**row["work"][way]) for row, way in pairs])
    found = np.asarray([row["added_us"][way] for row, way in pairs])
    seconds = 1e-6 * np.maximum(found, [0.1 * row["frozen_us"] for row, _ in pairs])
    relative = counted / seconds[:, None]
    scale = relative.max(0).clip(1e-30)
    inverse, _ = nnls(relative / scale, np.ones(len(pairs)))
    with np.errstate(divide="ignore"):
        return Machine(*(float(r) for r in scale / inverse))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sum over the network what the layers take, in milliseconds."""

    def total(choose: Callable[[dict[str, Any]], float]) -> float:
        return sum(row["count"] * choose(row) for row in rows) / 1000

    return {
        FROZEN: total(lambda row: row["frozen_us"]),
        **{w: total(lambda row, w=w: row["added_us"][w]) for w in Work._fields},
        "auto": total(lambda row: row["added_us"][row["choice"]]),
        "best": total(lambda row: min(row["added_us"].values())),
    }


def markdown(rows: Sequence[dict[str, Any]], found: dict[str, float]) -> str:
    """Lay the rows out as a table."""
    lines = [
        "| layer | layers | frozen, us | + kernel | + chain | + branch | auto |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        added = " | ".join(f"{row['added_us'][way]:.0f}" for way in Work._fields)
        lines.append(
            f"| {row['layer']} | {row['count']} | {row['frozen_us']:.0f} | {added} "
            f"| {row['choice']} |"
        )
    sums = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    return "\n".join(lines) + f"\n\nall layers, ms: {sums}\n"


def main(cfg: Config) -> dict[str, Any]:
    """Measure, fit, print and write the table."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    rows = measure(cfg)
    found, machine = summary(rows), fit(rows)
    table = f"{markdown(rows, found)}\nfitted: {machine}\n"
    content = {"rows": rows, "total_ms": found, "fitted": machine._asdict()}
    return write_benchmark(cfg, "layer_speed", content, table=table)


if __name__ == "__main__":
    launch(Config, main)
