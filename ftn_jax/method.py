"""What a backbone and a method of adaptation are, for training loops and tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ftn_jax.apply import Apply
from ftn_jax.core import Rules


class Layers(NamedTuple):
    """Patterns of a backbone's leaves; each must match whole paths.

    Attributes:
        kernels: the kernels that carry FTN's factors.
        norms: scale and bias of every normalisation; `None` for a network without.
        head: kernel and bias of the last layer, classes on the last axis.
        stem: the first kernels, where the papers' FTN leaves them out but other
            methods touch them; `None` if `kernels` has them.
        new_head: `classes -> Rules` of a task's own head, for a head of several layers
            (a decoder). Default: kernel and bias of `head` start afresh, with the
            classes on the last axis.
    """

    kernels: str
    norms: str | None
    head: str
    stem: str | None = None
    new_head: Callable[[int], Rules] | None = None

    @property
    def all_kernels(self) -> str:
        """The pattern of every kernel but the head's."""
        return f"{self.stem}|{self.kernels}" if self.stem else self.kernels


class Backbone(NamedTuple):
    """A pretrained network, frozen.

    Attributes:
        network: `classes -> Apply`: how to run it with a head of so many outputs. A
            Linen module checks the shapes of its parameters, so each task runs the
            module that was built for its number of classes.
        shared: its parameters, perhaps with arrays beside them (`Extended`).
        model_state: its mutable collections, where every task starts from.
        layers: which of its paths are kernels, norms and head.
    """

    network: Callable[[int], Apply]
    shared: Any
    model_state: Any
    layers: Layers


class Stage(NamedTuple):
    """A part of a task's training.

    Attributes:
        share: of the task's steps.
        rate: multiplies the learning rates, whose schedule runs once in each stage.
        change: what happens to the delta before the stage (pruning, compressing); the
            optimizer starts afresh.
    """

    share: float = 1.0
    rate: float = 1.0
    change: Callable[[Any], Any] | None = None


class Method(NamedTuple):
    """A way to adapt a network to a task of so many classes.

    Attributes:
        rules: for `make_delta`, or a function of `shared` that makes them.
        classes: number of the task's classes.
        frozen_stats: for `make_train_step`: keep the pretrained running statistics.
        penalty: `(delta, done) -> scalar`, added to the mean loss; `done` is the share
            of the task's steps that are taken, between 0 and 1.
        stages: the parts of the training, in order; their shares add up to 1.
        prepare: lays what the method reads beside the backbone, once for all tasks.
        after: `(backbone, delta) -> backbone` for the next task, where tasks depend on
            their order.
    """

    rules: Rules | Callable[[Any], Rules]
    classes: int
    frozen_stats: bool = False
    penalty: Callable[[Any, Any], Any] | None = None
    stages: tuple[Stage, ...] = (Stage(),)
    prepare: Callable[[Backbone], Backbone] | None = None
    after: Callable[[Backbone, Any], Backbone] | None = None

    def rules_for(self, shared: Any) -> Rules:
        """Return the rules for this backbone."""
        return self.rules(shared) if callable(self.rules) else self.rules
