"""One batch, several tasks: the frozen network runs once, the rest by example."""

from ftn_jax.metrics import no_logit
from ftn_jax.mixed.forward import mixed
from ftn_jax.mixed.train import (
    create_mixed_state,
    make_mixed_eval_step,
    make_mixed_train_step,
)

__all__ = [
    "create_mixed_state",
    "make_mixed_eval_step",
    "make_mixed_train_step",
    "mixed",
    "no_logit",
]
