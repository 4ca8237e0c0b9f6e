"""What a training step costs: time, work and memory of every method, in one process.

    python -m experiments.speed                                   # ResNet-18 at 64 px
    python -m experiments.speed --backbone cifar_resnet20 --image-px 32 --methods all
    python -m experiments.speed --backbone resnet50 --image-px 224 --batch-size 128
    python -m experiments.speed --backbone clip_vit_b32 --image-px 224 --methods all

Each row is one compiled training step. Rounds are interleaved (every row once, then
again), so that a machine that slows down slows all of them; times are medians over the
rounds, ratios are taken within each round against full fine-tuning and against the
floor: training next to nothing where the methods train. On a ResNet that is BN + head,
on a Vision Transformer the head and the bias of every attention's output: a forward
pass, and a backward pass down to the first of these without the gradient of any
kernel. FLOPs and peak temporary memory are the compiler's own counts. FTN and LoRA run
twice: through `materialize`, and by the factored path, which never forms a kernel's
gradient.

Writes `speed.json` and `speed.md` under the workdir.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax.adapt import Recipe
from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.factored import factored
from ftn_jax.forward import Forward, merged
from ftn_jax.method import Backbone, Method
from ftn_jax.models import RESNETS, VITS
from ftn_jax.nodes import Replace
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.presets.vit import VIT, VIT_LABELS, VIT_METHODS
from ftn_jax.presets.vit_rules import vit_method
from ftn_jax.results import write_benchmark
from ftn_jax.sizes import backbone_size
from ftn_jax.step_cost import CompiledStep, compile_together, interleave

FLOORS = {"resnet": "BN + head", "vit": "head + output biases"}
GROUPS = ("factors", "masks", "adapters", "weights", "norm", "head")
RATES: dict[str, float] = {group: 1e-4 for group in GROUPS}


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/speed")
    """Folder for speed.json and speed.md."""
    backbone: str = "resnet18"
    """Name in ftn_jax.models.RESNETS or VITS."""
    image_px: int = 64
    """Height and width of the images."""
    batch_size: int = 32
    """Images per step."""
    methods: tuple[str, ...] = ()
    """Names of ftn_jax.presets, or all, beside the fixed rows."""
    ranks: tuple[int, ...] = (1, 10, 50)
    """Ranks of a ResNet's FTN and LoRA rows."""
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


def candidates(cfg: Config) -> dict[str, Candidate]:
    """List a ResNet's rows."""

    def make(name: str, **options: Any) -> Method:
        return METHODS[name](RESNET, classes=cfg.classes, **options)

    rows = {
        "fine-tuning": Candidate(make("fine_tuning")),
        FLOORS["resnet"]: Candidate(make("bn_head")),
        "head only": Candidate(make("feature_extractor")),
    }
    for rank in cfg.ranks:
        for label, name in (("FTN", "ftn"), ("LoRA", "lora")):
            method = make(name, rank=rank)
            rows[f"{label} R={rank}, materialized"] = Candidate(method)
            rows[f"{label} R={rank}, factored"] = Candidate(method, factored)
    taken = {"fine_tuning", "bn_head", "feature_extractor", "ftn", "lora"}
    ranked = {"dora": {"rank": 4}, "factored_adapters": {"rank": 0.5}}
    for name in asked(cfg, METHODS):
        if name not in taken:
            label = name.replace("_", " ")
            rows[label] = Candidate(make(name, **ranked.get(name, {})))
    return rows


def vit_candidates(cfg: Config) -> dict[str, Candidate]:
    """List a Vision Transformer's rows, at the papers' rank."""
    biases = {".*/attention/out/bias": partial(Replace.init, group="norm")}
    rows = {
        "fine-tuning": Candidate(VIT_METHODS["fine_tuning"](VIT, classes=cfg.classes)),
        FLOORS["vit"]: Candidate(vit_method(VIT, cfg.classes, None, biases)),
        "head only": Candidate(VIT_METHODS["linear_probe"](VIT, classes=cfg.classes)),
    }
    always = ("ftn_o", "ftn_qv", "lora_qv")
    for name in dict.fromkeys((*always, *asked(cfg, VIT_METHODS))):
        label, method = VIT_LABELS[name], VIT_METHODS[name](VIT, classes=cfg.classes)
        if name.startswith(("ftn", "lora")):
            rows[f"{label}, materialized"] = Candidate(method)
            rows[f"{label}, factored"] = Candidate(method, factored)
        elif name not in ("linear_probe", "fine_tuning"):
            rows[label] = Candidate(method)
    return rows


def asked(cfg: Config, methods: Mapping[str, Any]) -> Sequence[str]:
    """List the presets that were asked for."""
    if unknown := sorted({*cfg.methods} - {*methods, "all"}):
        raise ValueError(f"--methods {unknown[0]}: unknown, known are {[*methods]}")
    return [*methods] if "all" in cfg.methods else cfg.methods


def load(cfg: Config) -> Backbone:
    """Build the network with random weights."""
    image = jnp.zeros((1, cfg.image_px, cfg.image_px, 3))
    if cfg.backbone in VITS:
        model: Any = VITS[cfg.backbone](cfg.classes, image_px=cfg.image_px)
        layers = VIT
    else:
        model, layers = RESNETS[cfg.backbone](num_classes=cfg.classes), RESNET
    state = dict(jax.jit(model.init)(jax.random.key(0), image))
    params = state.pop("params")
    return Backbone(lambda classes: from_linen(model), params, state, layers)


def measure(cfg: Config) -> list[dict[str, Any]]:
    """Compile and time every row."""
    backbone = load(cfg)
    of_vit = cfg.backbone in VITS
    recipe = Recipe(
        epochs=1,
        batch_size=cfg.batch_size,
        rates=RATES,
        compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
    )
    rng = np.random.default_rng(0)
    size = (cfg.batch_size, cfg.image_px, cfg.image_px, 3)
    batch = {
        "image": jnp.asarray(rng.normal(size=size), jnp.float32),
        "label": jnp.asarray(rng.integers(0, cfg.classes, cfg.batch_size)),
    }
    rows = compile_together(
        {
            name: partial(
                CompiledStep,
                backbone,
                row.method,
                recipe,
                batch,
                forward=row.forward,
            )
            for name, row in (vit_candidates if of_vit else candidates)(cfg).items()
        }
    )
    print(f"compiled {len(rows)} steps", flush=True)
    times = interleave(rows, rounds=cfg.rounds, steps=cfg.steps)
    full, floor = times["fine-tuning"], times[FLOORS["vit" if of_vit else "resnet"]]

    def ratio(own: list[float], base: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(own, base, strict=True))

    return [
        {
            "row": name,
            "params": row.params,
            "share_of_backbone": row.params / backbone_size(backbone),
            "step_ms": 1000 * statistics.median(times[name]),
            "times_fine_tuning": ratio(times[name], full),
            "times_floor": ratio(times[name], floor),
            "flops": row.flops,
            "flops_of_fine_tuning": row.flops / rows["fine-tuning"].flops,
            "temp_mib": row.temp_bytes / 2**20,
        }
        for name, row in rows.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    lines = [
        "| row | trained | step, ms | x fine-tuning | x floor "
        "| GFLOPs | FLOPs of fine-tuning | temporary, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['row']} | {r['share_of_backbone']:.1%} | {r['step_ms']:.1f} "
            f"| {r['times_fine_tuning']:.2f} | {r['times_floor']:.2f} "
            f"| {r['flops'] / 1e9:.2f} | {r['flops_of_fine_tuning']:.2f} "
            f"| {r['temp_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict[str, Any]:
    """Measure, print and write the table."""
    if cfg.backbone not in RESNETS | VITS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS | VITS)}"
        )
    rows = measure(cfg)
    found = {"rows": rows}
    return write_benchmark(cfg, "speed", found, table=markdown(rows))


if __name__ == "__main__":
    launch(Config, main)
