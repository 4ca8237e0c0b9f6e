"""Many runs of one training step: seeds, learning rates, ranks, tasks, one backbone.

The runs' states have one structure, so one compiled program trains them all: fill
smaller ranks and heads up with `fill`, and start each state with a `make_optimizer` of
its own rates, which become part of it. `Together` takes a step of every run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ftn_jax.core import iter_nodes
from ftn_jax.metrics import Sums, classification, no_logit
from ftn_jax.node import register
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.replace import Replace
from ftn_jax.train import TaskState, TrainStep

Form = Literal["loop", "vmap"]


def fill(deltas: Sequence[Any]) -> list[Any]:
    """Fill deltas of different ranks, or sizes of heads, up to the largest, with zeros.

    A term of two or more factors that are all zero adds nothing, and its gradient is
    exactly zero: it stays zero through training, under Adam, SGD and weight decay
    alike. Each run is thus what it is alone, at its own rank, with the init of that
    rank. Classes that a task does not have are no such thing; the loss `own_classes`
    leaves them out.

    Args:
        deltas: of one backbone, with nodes of the same types and settings.

    Returns:
        The deltas, all of one structure and shapes; `cut` undoes it.

    Raises:
        ValueError: if they do not become one structure by filling the arrays of `CP`
            (of two or more factors), `LoRA` (form `"conv"`) and `Replace` (names the
            path).
    """
    structures = [jax.tree.structure(delta) for delta in deltas]
    for n, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"delta {n} has other nodes, or nodes with other settings, than delta "
                "0; runs of one program need the same"
            )
    for columns in zip(*map(iter_nodes, deltas), strict=True):
        path, node = columns[0]
        shapes = [[x.shape for x in jax.tree.leaves(other)] for _, other in columns]
        fits = (
            type(node) is Replace
            # A term of one factor alone has a gradient at zero.
            or (type(node) is CP and len(node.factors) > 1)
            or (type(node) is LoRA and node.form == "conv")
        )
        axes = {tuple(map(len, sizes)) for sizes in shapes}
        if shapes.count(shapes[0]) < len(shapes) and not (fits and len(axes) == 1):
            raise ValueError(
                f"{path}: the runs' {type(node).__name__} nodes have arrays of the "
                f"shapes {shapes}, and zeros cannot fill them up; give it one size"
            )

    def filled(*arrays: Any) -> list[Any]:
        if len({x.shape for x in arrays}) == 1:
            return [jnp.array(x) for x in arrays]  # copies: a step donates them
        shape = tuple(map(max, zip(*(x.shape for x in arrays), strict=True)))
        return [jnp.zeros(shape, x.dtype).at[_corner(x)].set(x) for x in arrays]

    leaves = [filled(*xs) for xs in zip(*map(jax.tree.leaves, deltas), strict=True)]
    return [s.unflatten(xs[n] for xs in leaves) for n, s in enumerate(structures)]


def cut(delta: Any, like: Any) -> Any:
    """Cut a filled delta back to the shapes of `like`, its delta before `fill`."""
    return jax.tree.map(lambda x, small: x[_corner(small)], delta, like)


def _corner(x: Any) -> tuple[slice, ...]:
    return tuple(slice(n) for n in x.shape)


@dataclass(frozen=True)
class Runs:
    """Several runs' states, in the form that a `Together` trains them in.

    Stands where `TaskState` does in `fit` and `StateFolder`. A run whose loss is not
    finite stays as it was, and the others go on.

    Attributes:
        step: steps taken together.
        finite: whether any run goes on.
        states: one state with stacked arrays, or a tuple of states.
    """

    step: Int[Array, ""]
    finite: Bool[Array, ""]
    states: Any

    def unstack(self) -> list[TaskState]:
        """Return each run's state."""
        if isinstance(self.states, tuple):
            return list(self.states)
        count = self.states.step.shape[0]
        return [jax.tree.map(lambda x, n=n: x[n], self.states) for n in range(count)]


register(Runs, ("step", "finite", "states"), ())


class Together:
    """Take one training step of several runs: `runs, sums = together(shared, runs, b)`.

    On accelerators the step is mapped over stacked states: one program with large
    operations, in which the backbone is read once. With `forward=Factored("branch")`
    the frozen convolutions run on all runs' images at once; merged kernels would
    become grouped convolutions, which are slow. On a CPU, where one run's
    convolutions fill the cores and those of mapped kernels are many times slower, the
    runs take the same compiled step in turn.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from functools import partial
        >>> from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
        >>> from ftn_jax.apply import from_linen
        >>> from ftn_jax.nodes import LoRA
        >>> model, x = nn.Dense(3), jnp.ones((2, 4))
        >>> shared = model.init(jax.random.key(0), x)["params"]
        >>> tx = make_optimizer({"factors": 1e-2}, steps=5)
        >>> apply = from_linen(model, train_options={})
        >>> together = Together(make_train_step(apply, tx))
        >>> key = jax.random.key(1)
        >>> deltas = [
        ...     make_delta(key, shared, {"kernel": partial(LoRA.init, rank=rank)})
        ...     for rank in (1, 2)
        ... ]
        >>> runs = together.begin(
        ...     TaskState.create(delta, {}, tx=tx, key=key) for delta in fill(deltas)
        ... )
        >>> batch = {"image": x, "label": jnp.zeros(2, int)}
        >>> runs, sums = together(shared, runs, [batch])
        >>> first = cut(runs.unstack()[0].task.delta, deltas[0])
        >>> first["kernel"].a.shape, bool(first["kernel"].b.any())
        ((4, 1), True)
    """

    def __init__(
        self,
        step: TrainStep,
        *,
        feeds: Sequence[int] | None = None,
        form: Form | None = None,
    ) -> None:
        """Compile nothing yet.

        Args:
            step: of one run, from `make_train_step`; not jitted.
            feeds: for each run, which of the batches it gets. Default: the only one,
                or each its own.
            form: `"vmap"` or `"loop"`; default: by the kind of device.
        """
        self.form = form or ("loop" if jax.default_backend() == "cpu" else "vmap")
        self.feeds = feeds
        self._step = jax.jit(
            step if self.form == "loop" else _mapped(step), donate_argnums=1
        )

    def begin(self, states: Iterable[TaskState]) -> Runs:
        """Take over the states of all runs, which are then trained in place.

        Raises:
            ValueError: if there are none, or they do not have one structure and the
                same shapes.
        """
        states = tuple(states)
        if not states:
            raise ValueError("no states: there must be one run or more")
        for n, state in enumerate(states):
            if _shapes(state) != _shapes(states[0]):
                raise ValueError(
                    f"the state of run {n} has another structure, or other shapes, "
                    "than that of run 0; make their deltas alike with ftn_jax.runs.fill"
                )
        alive = jnp.asarray(any(bool(state.finite) for state in states))
        if self.form == "vmap":
            states = jax.tree.map(lambda *x: jnp.stack(x), *states)
        return Runs(jnp.zeros((), jnp.int32), alive, states)

    def __call__(
        self, shared: Any, runs: Runs, batches: Sequence[Mapping[str, Any]]
    ) -> tuple[Runs, Sums]:
        """Return the next states, and the sums over all runs that go on.

        `sums["nonfinite"]` tells whether none does.
        """
        if self.form == "vmap":
            count = runs.states.step.shape[0]
            feeds = jnp.asarray(self._feeds(count, len(batches)))
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
            states, sums = self._step(shared, runs.states, stacked, feeds)
        else:
            feeds = self._feeds(len(runs.states), len(batches))
            pairs = zip(runs.states, feeds, strict=True)
            results = [self._step(shared, state, batches[n]) for state, n in pairs]
            states, sums = zip(*results, strict=True)
        step, finite, total = _total(runs.step, sums)
        return Runs(step, finite, states), total

    def _feeds(self, count: int, batches: int) -> Sequence[int]:
        own = [0] * count if batches == 1 else range(batches)
        feeds = own if self.feeds is None else self.feeds
        if len(feeds) != count or not all(0 <= n < batches for n in feeds):
            raise ValueError(
                f"found {batches} batches for {count} runs, of which run n gets batch "
                f"{list(feeds)}[n]; give one for all, one for each, or say in feeds"
            )
        return feeds


def own_classes(logits: Float[Array, "b classes"], batch: Mapping[str, Any]) -> Sums:
    """Sum `classification`'s metrics over a task's own classes, the first of the head.

    A loss for `make_train_step`, for heads that `fill` filled up.

    Args:
        logits: of all classes that there is room for.
        batch: as for `classification`, and `"classes"`, the number of the task's own.
    """
    own = jnp.arange(logits.shape[-1]) < batch["classes"]
    return classification(jnp.where(own, logits, no_logit(logits.dtype)), batch)


def _mapped(step: TrainStep) -> Callable[..., Any]:
    def together(shared: Any, states: Any, batches: Any, feeds: Any) -> Any:
        if jax.tree.leaves(batches)[0].shape[0] == 1:  # frozen parts run once for all
            one = jax.tree.map(lambda x: x[0], batches)
            return jax.vmap(lambda state: step(shared, state, one))(states)

        def run(state: TaskState, feed: Any) -> Any:
            return step(shared, state, jax.tree.map(lambda x: x[feed], batches))

        return jax.vmap(run)(states, feeds)

    return together


@jax.jit
def _total(step: Any, sums: Any) -> tuple[Any, Any, Sums]:
    if isinstance(sums, tuple):
        sums = jax.tree.map(lambda *x: jnp.stack(x), *sums)
    failed = sums.pop("nonfinite") > 0
    total = {name: jnp.where(failed, 0.0, x).sum() for name, x in sums.items()}
    return step + 1, ~failed.all(), total | {"nonfinite": 1.0 * failed.all()}


def _shapes(tree: Any) -> Any:
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), shapes
