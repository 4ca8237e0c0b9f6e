"""One calling convention for Flax Linen, Flax NNX and plain functions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Key

from ftn_jax.paths import fold_in_name, path_name

Around = Callable[[Any], AbstractContextManager[None]]
_around: ContextVar[Around] = ContextVar("around", default=lambda _: nullcontext())


@runtime_checkable
class Apply(Protocol):
    """Run a network on materialized parameters.

    Any function with this signature will do; `from_linen` and `from_nnx` make one.
    """

    def __call__(
        self,
        params: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Any]:
        """Return the outputs and the new mutable state (BatchNorm's statistics)."""
        ...


def from_linen(
    model: Any,
    *,
    inputs: str | Sequence[str] = "image",
    train_options: Mapping[str, Any] | None = None,
    eval_options: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Apply:
    """Wrap a Flax Linen module, ours or anyone's, unchanged.

    Args:
        model: the module; `model_state` holds its mutable collections by name, for
            example `{"batch_stats": ...}`.
        inputs: the batch's entry that the module is called with, or several in order.
        train_options: keyword arguments of its call in training, by default
            `train=True`; other models may want `deterministic=False` or nothing.
        eval_options: keyword arguments otherwise, by default `train=False`.
        rngs: names of the random streams that the module may draw from.
    """
    options = {
        True: dict(train_options if train_options is not None else {"train": True}),
        False: dict(eval_options if eval_options is not None else {"train": False}),
    }
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)

    def apply(
        params: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Any]:
        variables = {"params": params, **model_state}
        given = [batch[name] for name in names]
        if not train:
            return model.apply(variables, *given, **options[False]), model_state
        streams = {}
        if key is not None:
            streams = {name: fold_in_name(key, name) for name in rngs}
        outputs, mutated = model.apply(
            variables,
            *given,
            **options[True],
            mutable=list(model_state),
            rngs=streams,
        )
        return outputs, {**model_state, **mutated}

    return apply


def from_nnx(graphdef: Any, *, inputs: str = "image") -> Apply:
    """Wrap a Flax NNX module split as `nnx.split(model, nnx.Param, ...)`.

    The split's second part, the parameters, is `shared`; its third, everything else,
    is `model_state`. `model.train()` and `model.eval()` switch BatchNorm and dropout.
    Random streams are drawn afresh from `key` in every training call; those in
    `model_state` stay as they are.

    Args:
        graphdef: the split's first part.
        inputs: the batch's entry that the module is called with.
    """

    def apply(
        params: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Any]:
        from flax import nnx

        def fresh(path: Any, x: Any) -> Any:
            if key is None or not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                return x
            return fold_in_name(key, path_name(path))

        # A rebuilt state: NNX refuses to write to one that an outer trace made.
        state = jax.tree_util.tree_map_with_path(fresh, model_state)
        model = nnx.merge(graphdef, params, state)
        model.train() if train else model.eval()
        with _around.get()(model):
            outputs = model(batch[inputs])
        if not train:
            return outputs, model_state
        new: Any = nnx.split(model, nnx.Param, nnx.RngState, ...)[3]
        streams: Any = nnx.filter_state(model_state, nnx.RngState)
        return outputs, nnx.merge_state(new, streams)

    return apply


@contextmanager
def around_calls(around: Around) -> Iterator[None]:
    """Have every NNX module that `from_nnx` rebuilds called inside `around(module)`.

    A Linen network is changed for the time of a call by its parameters and by
    `flax.linen.intercept_methods`; an NNX one exists only inside the call.
    """
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)
