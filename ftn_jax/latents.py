"""Train what belongs to no weight: one vector for each image, beside a delta.

A task that inverts a generator is a delta over the generator and a few tables, each
with a row for every image. Both are trees of nodes, so they make one tree that the
training step differentiates, groups and saves as it does any delta:

    {"generator": delta over shared, "latents": {"z": Replace (n, dim_z), ...}}

`with_latents` is the forward pass that knows this form: it takes the rows that
`batch["index"]` names, puts them into the batch, and runs the generator's delta.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.apply import Apply
from ftn_jax.forward import Forward, merged
from ftn_jax.nodes.replace import Replace
from ftn_jax.train import Task

GROUP = "latents"
"""The optimizer group of the tables."""


def make_latents(**tables: Float[Array, "n _"]) -> dict[str, Replace]:
    """Make the tables trainable.

    Args:
        **tables: by the name that the network finds the rows under, in its batch.

    Raises:
        ValueError: if the tables do not have one row for each image.
    """
    sizes = {name: len(table) for name, table in tables.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tables have different numbers of rows: {sizes}")
    return {name: Replace(jnp.copy(t), group=GROUP) for name, t in tables.items()}


def beside(delta: Any, latents: Mapping[str, Replace]) -> dict[str, Any]:
    """Return the tree that is trained: a generator's delta and its images' latents."""
    return {"generator": delta, "latents": dict(latents)}


def with_latents(forward: Forward = merged) -> Forward:
    """Return the forward pass of a delta with latents.

    Args:
        forward: how to run the generator, e.g. `ftn_jax.factored.factored`.
    """

    def run(
        apply: Apply,
        shared: Any,
        delta: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
        compute_dtype: Any = None,
    ) -> tuple[Any, Any]:
        rows = jax.tree.map(lambda table: table[batch["index"]], tables(delta))
        return forward(
            apply,
            shared,
            delta["generator"],
            model_state,
            {**batch, **rows},
            train=train,
            key=key,
            compute_dtype=compute_dtype,
        )

    return run


def tables(delta: Any) -> dict[str, Float[Array, "n _"]]:
    """Return the latents as plain arrays."""
    return {name: node.value for name, node in delta["latents"].items()}


def for_file(task: Task) -> Task:
    """Return what `save_task` can hold: the latents are state, beside the statistics.

    A task file is bound to a backbone leaf by leaf, and latents belong to no leaf.
    """
    state = {**task.model_state, GROUP: tables(task.delta)}
    return Task(task.delta["generator"], state)


def from_file(task: Task) -> Task:
    """Return the task that `for_file` was given.

    Raises:
        ValueError: if the task was saved without latents.
    """
    state = dict(task.model_state)
    if GROUP not in state:
        raise ValueError(
            f"the task has no {GROUP} in its state, only {sorted(state)}: it was not "
            "saved by for_file"
        )
    latents = make_latents(**state.pop(GROUP))
    return Task(beside(task.delta, latents), state)
