"""Pictures of dense tasks: the input, the truth, and what each method says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ftn_jax.adapt import Evaluator
from ftn_jax.checkpoint import restore_task
from ftn_jax.data import Domain, Subset, Transform
from ftn_jax.dense.losses import IGNORED, LARGEST_EDGE
from ftn_jax.measure import Measure
from ftn_jax.method import Backbone
from ftn_jax.sweep import Contender, slug


def plot_tasks(
    measures: Mapping[str, Measure],
    backbone: Backbone,
    domains: Sequence[Domain],
    methods: Mapping[str, Any],
    *,
    transform: Transform,
    workdir: Path,
    seed: int = 0,
    images: int = 3,
) -> None:
    """Draw `pictures_TASK.png`: rows are test images, columns input, methods, truth.

    Tasks are read back from `workdir/tasks`, as a user would read them.

    Args:
        measures: of the tasks, by the domain's name.
        backbone: that the tasks belong to.
        domains: the tasks; names are "semseg", "depth", "normals", "edges".
        methods: names of the table's rows, each with the backbone's values and what
            the method reads beside them; those without a saved task are left out.
        transform: of the evaluation.
        workdir: the experiment's folder.
        seed: whose tasks are drawn.
        images: number of rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for domain in domains:
        n = min(images, len(domain.test))
        some = Subset(domain.test, np.linspace(0, len(domain.test) - 1, n).astype(int))
        evaluator = Evaluator(
            backbone,
            classes=domain.num_classes,
            transform=transform,
            batch_size=n,
            measure=measures[domain.name],
        )
        columns: dict[str, list[Any]] = {"input": [], "truth": []}
        for i in range(n):
            example: Any = some[i]
            columns["input"].append(example.image)
            truth = example.targets["edge" if domain.name == "edges" else domain.name]
            columns["truth"].append(show(domain.name, truth))
        for method, shared in methods.items():
            place = workdir / "tasks" / slug(domain.name) / slug(method) / f"seed{seed}"
            if not place.exists():
                continue
            task = restore_task(place, shared).task
            outputs = evaluator.on(shared).outputs(task, some)
            columns[method] = [
                show(domain.name, predicted(domain.name, o)) for o in outputs
            ]
        figure, axes = plt.subplots(
            n,
            len(columns),
            figsize=(2.2 * len(columns), 1.6 * n),
            layout="constrained",
            squeeze=False,
        )
        for column, (title, pictures) in enumerate(columns.items()):
            axes[0, column].set_title(title, fontsize=9)
            for row, picture in enumerate(pictures):
                axes[row, column].imshow(picture, interpolation="nearest")
                axes[row, column].axis("off")
        figure.savefig(workdir / f"pictures_{domain.name}.png", dpi=90)
        plt.close(figure)


def shared_by_method(
    backbone: Backbone, contenders: Mapping[str, Contender]
) -> dict[str, Any]:
    """Lay what each row's method reads beside the backbone's values."""
    methods = {name: contender.method(1) for name, contender in contenders.items()}
    return {
        name: (method.prepare(backbone) if method.prepare else backbone).shared
        for name, method in methods.items()
    }


def predicted(task: str, outputs: Any) -> np.ndarray:
    """Turn a network's outputs for one image into a map like the task's truth."""
    if task == "semseg":
        return outputs.argmax(axis=-1)
    if task == "depth":
        return outputs[..., 0]
    if task == "normals":
        length = np.linalg.norm(outputs, axis=-1, keepdims=True)
        return outputs / np.maximum(length, 1e-12)
    return 1 / (1 + np.exp(-outputs[..., 0]))


def show(task: str, values: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Paint a map of classes, metres, unit vectors or edge strength."""
    from matplotlib import colormaps

    if task == "semseg":
        colours = colormaps["tab20"](np.arange(256) % 20)[:, :3]
        painted = colours[values.astype(int)] * (values != IGNORED)[..., None]
    elif task == "depth":
        painted = colormaps["viridis"](np.clip(values / 10, 0, 1))[..., :3]
    elif task == "normals":
        painted = (values + 1) / 2
    else:
        known = np.where(values <= LARGEST_EDGE, values, 0)
        painted = np.repeat(1 - known[..., None], 3, axis=-1)
    return (255 * np.clip(painted, 0, 1)).astype(np.uint8)
