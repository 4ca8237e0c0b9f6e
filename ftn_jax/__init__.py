"""Factorized Tensor Networks: one frozen vision network, many tasks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ftn_jax.checkpoint import SavedTask, restore_task, save_task
from ftn_jax.core import (
    Extended,
    compact,
    count,
    extend,
    groups,
    make_delta,
    materialize,
)
from ftn_jax.extras import restore_extras, save_extras
from ftn_jax.node import Node, beside, frozen, static, tied
from ftn_jax.optimizer import make_optimizer
from ftn_jax.train import Task, TaskState, make_eval_step, make_train_step

if TYPE_CHECKING:
    from ftn_jax.algebra import combine
    from ftn_jax.bank import Bank
    from ftn_jax.lower_rank import recompress
    from ftn_jax.mixed import (
        create_mixed_state,
        make_mixed_eval_step,
        make_mixed_train_step,
    )

__all__ = [
    "Bank",
    "Extended",
    "Node",
    "SavedTask",
    "Task",
    "TaskState",
    "beside",
    "combine",
    "compact",
    "count",
    "create_mixed_state",
    "extend",
    "frozen",
    "groups",
    "make_delta",
    "make_eval_step",
    "make_mixed_eval_step",
    "make_mixed_train_step",
    "make_optimizer",
    "make_train_step",
    "materialize",
    "recompress",
    "restore_extras",
    "restore_task",
    "save_extras",
    "save_task",
    "static",
    "tied",
]

_LATER = {
    "Bank": "bank",
    "combine": "algebra",
    "create_mixed_state": "mixed",
    "make_mixed_eval_step": "mixed",
    "make_mixed_train_step": "mixed",
    "recompress": "lower_rank",
}


def __getattr__(name: str) -> Any:
    """Import what serves many tasks when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
