"""Find out, without running a network, whether it can run a mixed batch."""

from collections.abc import Mapping
from typing import Any

import jax

from ftn_jax.apply import Apply
from ftn_jax.factored import linen as marks
from ftn_jax.factored.factors import factors_of
from ftn_jax.factored.probe import Reach, probe
from ftn_jax.mixed.layer import Layer, Record
from ftn_jax.mixed.linen import lay, served
from ftn_jax.mixed.low_rank import refusal
from ftn_jax.paths import path_name
from ftn_jax.slots import LowRankSlots, Slots

Entries = list[tuple[str, Any, Slots]]

_UNSEEN = "no layer that is understood reads it (Conv, Dense, DenseGeneral, norms)"


def split(path: str) -> tuple[str, str]:
    """Split a leaf's path in its layer's and its name."""
    layer, _, name = path.rpartition("/")
    return layer, name


def check_reach(
    apply: Apply,
    params: Any,
    entries: Entries,
    model_state: Any,
    batch: Any,
    key: Any,
    *,
    train: bool,
) -> None:
    """Check that every node and all state of a stack is served by some layer.

    Args:
        apply: the network.
        params: the backbone.
        entries: the weights with slots.
        model_state: one task's.
        batch: inputs.
        key: of dropout.
        train: training mode.

    Raises:
        ValueError: if not, listing the paths with the reasons.
    """
    record = Record({})
    layers = _probes(entries, model_state, record)
    kernels = [path for path, _, _ in entries if split(path)[1] == "kernel"]

    def run(params: Any, companions: Mapping[str, Any], state: Any, batch: Any) -> Any:
        params = lay(marks.lay_beside(params, companions), layers)
        with marks.hooked(), served():
            return apply(params, state, batch, train=train, key=key)

    reached = probe(run, params, model_state, batch, paths=kernels)
    wrong = {}
    for path, w, slots in entries:
        if path in reached and not record.leaves.get(path):
            wrong[path] = _why_not(reached[path], w, slots)
        else:
            wrong[path] = record.leaves.get(path, _UNSEEN)
    for path in _state_shapes(model_state):
        wrong[path] = record.leaves.get(path, "only BatchNorm's statistics are mixed")
    if listed := [f"{path}: {why}" for path, why in wrong.items() if why]:
        raise ValueError(
            "the network cannot run a mixed batch for these leaves; leave them "
            "without a node, or serve the tasks one by one:\n  " + "\n  ".join(listed)
        )


def norm_paths(model_state: Any) -> set[str]:
    """Return the paths of the layers that keep running statistics."""
    return {split(path.partition(":")[2])[0] for path in _state_shapes(model_state)}


def _state_shapes(model_state: Any) -> dict[str, tuple[int, ...]]:
    """Return shapes by `collection:path`."""
    leaves = jax.tree_util.tree_leaves_with_path(model_state)
    return {path_name(path).replace("/", ":", 1): x.shape for path, x in leaves}


def _probes(entries: Entries, model_state: Any, record: Record) -> dict[str, Layer]:
    leaves: dict[str, list[Any]] = {path: [] for path in norm_paths(model_state)}
    for path, shape in _state_shapes(model_state).items():
        collection, _, place = path.partition(":")
        layer, name = split(place)
        leaves[layer].append((f"{collection}:{name}", shape))
    ragged = set()
    for path, w, slots in entries:
        layer, name = split(path)
        leaves.setdefault(layer, []).append((name, w.shape))
        if getattr(slots, "ragged", False):
            ragged.add(layer)
    return {
        path: Layer(
            *(None,) * 5,
            path=path,
            leaves=tuple(names),
            ragged=path in ragged,
            record=record,
        )
        for path, names in leaves.items()
    }


def _why_not(reach: Reach, w: Any, slots: Slots) -> str:
    """Say why the operations that use a kernel cannot use the tasks' own."""
    if reach.why or reach.layers:
        return reach.why or "it is sliced by nn.scan or nn.vmap"
    for use in reach.uses:
        if not isinstance(slots, LowRankSlots):
            if why := refusal(use.op, w.shape):
                return why
            continue
        roles = use.op.roles(w.ndim)
        assert roles is not None

        def factors(node: Any, roles: Any = roles) -> Any:
            return factors_of(node, w.shape, roles)

        if jax.eval_shape(jax.vmap(factors), slots) is None:
            return "its factors tie the weight's output axes to its input axes"
    return ""
