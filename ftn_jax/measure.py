"""What a task is measured by: its loss, its metrics, and the one number reported."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ftn_jax import metrics
from ftn_jax.metrics import Sums

Loss = Callable[[Any, Mapping[str, Any]], Sums]


@dataclass(frozen=True)
class Measure:
    """A task's loss and metrics.

    Attributes:
        loss: `(outputs, batch) -> sums` of `make_train_step`, with `"loss"` and
            `"count"`.
        collect: `(outputs, batch) -> anything` that `score` needs of one evaluated
            batch: sums, or all outputs. Examples with `batch["mask"]` 0 only fill the
            batch and must not count.
        score: what `collect` gave, batch by batch -> named numbers of the whole set (or
            lists of them, such as curves), `metric` among them; `"loss"`, if there,
            decides between equals.
        metric: the one number that results report and validation chooses by.
        higher_is_better: whether a larger number is the better one.
        percent: the number is a share, printed in percent.
    """

    loss: Loss
    collect: Callable[[Any, Mapping[str, Any]], Any]
    score: Callable[[Sequence[Any]], dict[str, Any]]
    metric: str
    higher_is_better: bool = True
    percent: bool = True

    def better(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
        """Compare two scores; one that is NaN is the worst."""
        return self._rank(new) > self._rank(old)

    def _rank(self, scores: Mapping[str, Any]) -> tuple[float, float]:
        value, loss = scores[self.metric], scores.get("loss", 0.0)
        value = value if self.higher_is_better else -value
        return -math.inf if math.isnan(value) else value, -loss

    def show(self, value: float) -> str:
        """Write the number as a line of progress does."""
        return f"{100 * value:5.1f} %" if self.percent else f"{value:7.3f}"


def mean_score(collected: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Add up sums such as `metrics.classification`'s and divide by the count.

    Raises:
        ValueError: if nothing was counted.
    """
    total: Any = reduce(metrics.add, collected, None)
    return metrics.means(total or {})


CLASSIFICATION = Measure(
    loss=metrics.classification,
    collect=metrics.classification,
    score=mean_score,
    metric="accuracy",
)
