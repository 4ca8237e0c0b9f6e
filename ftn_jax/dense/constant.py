"""What a task's metric is for a network that says the same everywhere."""

from typing import Any

import numpy as np

from ftn_jax.data import Source, Transform, eval_batches
from ftn_jax.dense.losses import IGNORED, shifted_labels
from ftn_jax.measure import Measure

_NAMES = {"edges": "edge"}


def constant_score(
    task: str,
    measure: Measure,
    train: Source,
    test: Source,
    *,
    classes: int,
    transform: Transform,
    batch_size: int = 8,
) -> float:
    """Judge the mean of the training truth (the commonest class) on the test data.

    A trained network that is not better has learnt nothing of the pictures.

    Args:
        task: "semseg", "depth", "normals" or "edges".
        measure: of the task.
        train: where the mean is taken; at most 64 examples of it.
        test: what is judged.
        classes: channels of the network's outputs.
        transform: of the evaluation.
        batch_size: examples at a time.
    """
    name = _NAMES.get(task, task)
    some = [_targets(train, i)[name] for i in range(min(len(train), 64))]
    outputs = _outputs(task, np.stack(some), classes)
    collected = []
    for batch in eval_batches(test, batch_size=batch_size, transform=transform):
        shape = (*batch["image"].shape[:3], classes)
        collected.append(measure.collect(np.broadcast_to(outputs, shape), batch))
    return measure.score(collected)[measure.metric]


def _targets(source: Source, index: int) -> Any:
    example: Any = source[index]
    return example.targets


def _outputs(task: str, truth: np.ndarray, classes: int) -> np.ndarray:
    if task == "semseg":
        labels = np.asarray(shifted_labels(truth, classes=classes))
        counts = np.bincount(labels[labels != IGNORED], minlength=classes)
        return np.eye(classes, dtype=np.float32)[counts[:classes].argmax()]
    if task == "depth":
        return np.asarray([truth[truth != 0].mean()], np.float32)
    if task == "normals":
        return truth[(truth != 0).any(-1)].mean(axis=0).astype(np.float32)
    share = np.clip(truth[truth <= 1.1].mean(), 1e-3, 1 - 1e-3)
    return np.asarray([np.log(share / (1 - share))], np.float32)
