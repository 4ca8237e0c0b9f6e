"""Is one method better than another? Intervals, and paired tests over tasks.

The papers print one number a cell. Here a mean has an interval, and two methods are
compared task by task: what makes a task hard for one makes it hard for the other, so
their differences vary less than their accuracies.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ftn_jax.results import Row

IntervalBy = Literal["t", "bootstrap"]


class Interval(NamedTuple):
    """A mean and where it may lie.

    Attributes:
        mean: of the values.
        std: sample standard deviation (n - 1); NaN for one value.
        low: end of the confidence interval; NaN for one value.
        high: likewise.
        n: number of values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int


def interval(
    values: Sequence[float] | Float[np.ndarray, " n"],
    *,
    level: float = 0.95,
    by: IntervalBy = "t",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Give a mean its standard deviation and confidence interval.

    Args:
        values: independent, such as one method's accuracies with several seeds.
        level: share of such intervals that hold the true mean.
        by: `"t"`, Student's, right for few values that are about normal; or
            `"bootstrap"`, the percentiles of resampled means, which needs no such
            shape but ten values or more: with few it is too narrow.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: for no value, one that is not finite, or a level that is not
            between 0 and 1.
    """
    x = _finite(values)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, found {level}")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, np.nan, np.nan, np.nan, 1)
    std = float(x.std(ddof=1))
    if by == "t":
        from scipy import stats

        half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * std / len(x) ** 0.5
        return Interval(mean, std, mean - half, mean + half, len(x))
    draws = np.random.default_rng(seed).choice(x, (resamples, len(x)))
    low, high = np.quantile(draws.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, std, float(low), float(high), len(x))


class Paired(NamedTuple):
    """Two methods on the same tasks.

    Attributes:
        difference: of the first less the second, over tasks.
        wins: tasks on which the first is better.
        ties: tasks on which they are level.
        t_test: two-sided p of the paired t test: no difference of the means.
        wilcoxon: two-sided p of the signed-rank test: differences symmetric about 0.
            With n tasks it cannot be below `2 / 2**n`: five tasks never give 0.05.
    """

    difference: Interval
    wins: int
    ties: int
    t_test: float
    wilcoxon: float


def paired(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> Paired:
    """Test whether two methods differ, paired over tasks.

    Source: Demsar, "Statistical comparisons of classifiers over multiple data sets"
    (JMLR 2006), who prefers the signed-rank test: tasks are no sample of one
    distribution.

    Args:
        first: one method's results, one for each task (the mean over its seeds:
            seeds are not tasks, and counting them as such would flatter the test).
        second: the other's, on the same tasks in the same order.
        level: of the difference's interval.

    Raises:
        ValueError: for unequal lengths or fewer than two tasks.
    """
    a, b = _finite(first), _finite(second)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"pairs of results on two tasks or more are needed, found {len(a)} and "
            f"{len(b)}"
        )
    # Accuracies are ratios of counts: equal ones may differ in the last bit.
    gaps = np.where(np.isclose(a, b, rtol=0, atol=1e-12), 0.0, a - b)
    found = interval(gaps, level=level)
    wins, ties = int((gaps > 0).sum()), int((gaps == 0).sum())
    if ties == len(gaps):
        return Paired(found, wins, ties, 1.0, 1.0)
    from scipy import stats

    by_t: Any = stats.ttest_1samp(gaps, 0.0) if found.std > 0 else (np.inf, 0.0)
    by_ranks: Any = stats.wilcoxon(gaps)
    return Paired(found, wins, ties, float(by_t[1]), float(by_ranks[1]))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p values for their number: some of many tests succeed by chance.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Args:
        p_values: by name of the test.
    """
    corrected, worst = {}, 0.0
    for n, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - n) * p))
        corrected[name] = worst
    return {name: corrected[name] for name in p_values}


def compare(
    rows: Sequence[Row], reference: str, *, level: float = 0.95
) -> dict[str, Paired]:
    """Compare every method with one, over the tasks and seeds that both have.

    Args:
        rows: of an experiment.
        reference: the method to compare with.
        level: of the differences' intervals.

    Returns:
        By method, `method - reference` of the means over common seeds. Methods that
        share fewer than two tasks with the reference are left out.

    Raises:
        ValueError: if no row is the reference's.
    """
    table: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        table.setdefault(row.method, {})[row.task, row.seed] = row.value
    if reference not in table:
        raise ValueError(f"no row of {reference!r}; there are {sorted(table)}")
    found = {}
    for method, own in table.items():
        common = sorted({*own} & {*table[reference]})
        tasks = sorted({task for task, _ in common})
        if method == reference or len(tasks) < 2:
            continue
        pairs = [
            [
                float(np.mean([results[key] for key in common if key[0] == task]))
                for task in tasks
            ]
            for results in (own, table[reference])
        ]
        found[method] = paired(pairs[0], pairs[1], level=level)
    return found


def comparison_table(
    rows: Sequence[Row], reference: str, *, level: float = 0.95
) -> str:
    """Lay `compare` out, in points of percent; p values are Holm's."""
    found = compare(rows, reference, level=level)
    adjusted = holm({name: result.wilcoxon for name, result in found.items()})
    lines = [
        f"| method, less {reference} | mean | {level:.0%} interval | better / level / "
        "worse | p, t test | p, Wilcoxon | the same, Holm |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in found.items():
        gap = result.difference
        worse = gap.n - result.wins - result.ties
        lines.append(
            f"| {name} | {100 * gap.mean:+.1f} | {100 * gap.low:+.1f} to "
            f"{100 * gap.high:+.1f} | {result.wins} / {result.ties} / {worse} | "
            f"{result.t_test:.3f} | {result.wilcoxon:.3f} | {adjusted[name]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected one or more finite numbers in a row, found {x}")
    return x
