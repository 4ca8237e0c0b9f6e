"""Does the input keep up? JPEG folders at 224 px against a ResNet-50's training step.

    python -m experiments.input_speed                      # pictures made on the spot
    python -m experiments.input_speed --data DIR           # DIR/train/CLASS/*.jpg, ...
    python -m experiments.input_speed --workers 0 2 4 8

Three measurements, in this order and each repeated, medians reported: images per
second on one core, stage by stage (decode; crop and flip; normalise); seconds per batch
with threads and with worker processes; and a real training run, of which the share of
time that the loop waits for its next batch is taken. Without `--data`, 256 JPEG files
of 500x375 pixels (ImageNet's usual size, quality 90) are cut from scikit-learn's two
photographs.

Writes `input_speed.json`, `input_speed.md` and `input_speed.png` under the workdir.
"""

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import TaskState, count, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.data import (
    Compose,
    FileSource,
    Source,
    imagenet_transforms,
    load_folder,
    prefetch,
    train_batches,
)
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, RESNET
from ftn_jax.results import write_benchmark


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: Path = Path("runs/input_speed")
    """Folder for the results, and for the pictures that are made."""
    data: Path | None = None
    """A folder with train/CLASS/*.jpg and test/CLASS/*.jpg; none: pictures are made."""
    pictures: int = 256
    """How many are made."""
    image_px: int = 224
    """Height and width that the network sees."""
    batch_size: int = 32
    """Images per step."""
    backbone: str = "resnet50"
    """Name in ftn_jax.models.RESNETS, with random weights."""
    rank: int = 10
    """Rank of the FTN that is trained."""
    threads: tuple[int, ...] = (0, 2)
    """Numbers of reading threads to try, without worker processes."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of worker processes to try."""
    rounds: int = 5
    """Batches of every measurement; medians are over these."""
    steps: int = 5
    """Training steps, after one that does not count."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/input_speed_tiny"),
            pictures=8,
            image_px=32,
            batch_size=4,
            backbone="cifar_resnet8",
            rank=1,
            threads=(0,),
            workers=(1,),
            rounds=2,
            steps=2,
        )


def make_pictures(folder: Path, number: int) -> FileSource:
    """Cut JPEG files of 500x375 pixels out of two photographs, with the same seed."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{n:04}.jpg" for n in range(number)]
    photographs = [Image.fromarray(x) for x in load_sample_images()["images"]]
    for path in paths:
        picture = photographs[rng.integers(2)]
        share = rng.uniform(0.5, 1.0)
        width, height = round(500 * share), round(375 * share)
        left = int(rng.integers(picture.width - width + 1))
        top = int(rng.integers(picture.height - height + 1))
        cut = picture.crop((left, top, left + width, top + height))
        if not path.exists():
            cut.resize((500, 375)).save(path, quality=90)
    return FileSource(paths, np.arange(number) % 10)


def per_core(cfg: Config, source: Source, transform: Compose) -> dict[str, float]:
    """Time the stages on the calling thread; images per second up to each stage."""
    stages: dict[str, float] = {}
    *steps, normalize = transform.steps
    indices = range(min(len(source), cfg.batch_size))

    def decode() -> None:
        for index in indices:
            source[index].image  # noqa: B018

    def cut() -> None:
        for index in indices:
            image, rng = source[index].image, np.random.default_rng(index)
            for step in steps:
                image = step(rng, image)

    def whole() -> None:
        for index in indices:
            transform(np.random.default_rng(index), source[index].image)

    for name, run in (("decode", decode), ("crop, flip", cut), ("normalise", whole)):
        run()  # the files are in the page cache then
        seconds = statistics.median(_timed(run) for _ in range(cfg.rounds))
        stages[name] = len(indices) / seconds
    return stages


def per_batch(cfg: Config, source: Source, transform: Compose) -> dict[str, float]:
    """Time batches with nothing else running: median seconds for each."""
    ways = {f"{n} threads" if n else "one thread": {"threads": n} for n in cfg.threads}
    ways |= {f"{n} worker process{'es' * (n > 1)}": {"workers": n} for n in cfg.workers}
    seconds = {}
    for name, options in ways.items():
        # What was made ahead while the processes started must not count.
        warm = 1 + 4 * options.get("workers", 0)
        with closing(_batches(cfg, source, transform, **options)) as stream:
            for _ in range(warm):
                next(stream)
            begin = time.perf_counter()
            for _ in range(2 * cfg.rounds):
                next(stream)
            seconds[name] = (time.perf_counter() - begin) / (2 * cfg.rounds)
    return seconds


def training(
    cfg: Config, source: Source, transform: Compose
) -> dict[str, dict[str, float]]:
    """Train for real, with each way of input; seconds per step and of waiting."""
    model = RESNETS[cfg.backbone](num_classes=10)
    image = jnp.zeros((1, cfg.image_px, cfg.image_px, 3))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    method = METHODS["ftn"](RESNET, classes=10, rank=cfg.rank)
    shared = variables["params"]
    delta = make_delta(jax.random.key(1), shared, method.rules_for(shared))
    tx = make_optimizer({g: 1e-4 for g in count(delta).by_group}, steps=10_000)
    state = TaskState.create(
        delta,
        {"batch_stats": variables["batch_stats"]},
        tx=tx,
        key=jax.random.key(2),
    )
    step = jax.jit(make_train_step(from_linen(model), tx), donate_argnums=1)
    ways: dict[str, Callable[[], Generator[Any, None, None]]] = {
        "made between steps": lambda: _batches(cfg, source, transform),
        "one thread ahead": lambda: prefetch(_batches(cfg, source, transform)),
        f"{max(cfg.workers)} worker processes": lambda: prefetch(
            _batches(cfg, source, transform, workers=max(cfg.workers))
        ),
    }
    found = {}
    for name, make in ways.items():
        steps, waits = [], []
        stream = make()
        for n in range(cfg.steps + 1):
            begin = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - begin
            state, sums = step(shared, state, batch)
            jax.block_until_ready(sums)
            if n:
                steps.append(time.perf_counter() - begin)
                waits.append(waited)
        stream.close()
        found[name] = {
            "step_s": statistics.median(steps),
            "wait_s": statistics.median(waits),
            "waiting": sum(waits) / sum(steps),
        }
    return found


def markdown(result: dict[str, Any]) -> str:
    """Lay the three measurements out as tables."""
    lines = ["| up to this stage | images per second, one core |", "|---|--:|"]
    lines += [f"| {k} | {v:.0f} |" for k, v in result["per_core"].items()]
    lines += ["", "| input alone | seconds per batch |", "|---|--:|"]
    lines += [f"| {k} | {v:.3f} |" for k, v in result["per_batch"].items()]
    lines += [
        "",
        "| input while training | seconds per step | of which waiting | share |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {k} | {v['step_s']:.2f} | {v['wait_s']:.4f} | {v['waiting']:.2%} |"
        for k, v in result["training"].items()
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw seconds per batch of input beside seconds per training step."""
    from matplotlib.figure import Figure

    inputs = result["per_batch"]
    step = min(v["step_s"] for v in result["training"].values())
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    names = [f"input, {name}" for name in inputs] + ["training step"]
    values = [*inputs.values(), step]
    bars = axes.barh(names, values, color=["C0"] * len(inputs) + ["C1"])
    axes.bar_label(bars, [f"{v:.2f} s" for v in values], padding=3)
    axes.set(
        xscale="log", xlabel=f"seconds for {result['config']['batch_size']} images"
    )
    axes.margins(x=0.2)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(cfg: Config) -> dict[str, Any]:
    """Measure, print and write the tables."""
    if cfg.backbone not in RESNETS:
        raise ValueError(
            f"--backbone {cfg.backbone}: unknown, known are {sorted(RESNETS)}"
        )
    if cfg.data:
        source: Source = load_folder(cfg.data).train
    else:
        source = make_pictures(cfg.workdir / "pictures", cfg.pictures)
    transform = imagenet_transforms(size=cfg.image_px, test_resize=cfg.image_px).train
    found = {
        "per_core": per_core(cfg, source, transform),
        "per_batch": per_batch(cfg, source, transform),
        "training": training(cfg, source, transform),
    }
    table, packages = markdown(found), ("pillow", "grain")
    result = write_benchmark(cfg, "input_speed", found, table=table, packages=packages)
    plot(result, cfg.workdir / "input_speed.png")
    return result


def _batches(
    cfg: Config,
    source: Source,
    transform: Compose,
    *,
    threads: int = 0,
    workers: int = 0,
) -> Generator[Any, None, None]:
    return train_batches(
        source,
        batch_size=cfg.batch_size,
        transform=transform,
        seed=0,
        threads=threads,
        workers=workers,
    )


def _timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    launch(Config, main)
