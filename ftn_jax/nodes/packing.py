"""Pack tasks into one network, one after the other (PackNet).

What is packed so far lies beside the backbone, under the kind `"packnet"`: for each
kernel the `values` and the `owner` of every position, 0 for free, 1 for the base, 2,
3, ... for the tasks. Nothing is written in place: packing a task returns a new
`Extended`, and an earlier task reads the positions of its own time alone, so that it
is the same on every later state, bit for bit.

    packed = extend(shared, packnet=start_packing(shared, kernels, prune=0.5))
    delta = make_delta(key, packed, {kernels: partial(PackNet.init, task=2)})
    ...                              # train, at 1e-3 in the paper
    delta = prune(delta, share=0.75)
    ...                              # train what is left, at 1e-4
    packed = pack(packed, delta)     # and so on with task=3
    save_task(folder, Task(compact(delta), state), shared=packed, name="second")

The paper trains the base again after its pruning: start with `prune=None`, and treat
the base as task 1, on the data that it was pretrained on.

Source: Mallya and Lazebnik, "PackNet" (arXiv 1711.05769), and its code.
"""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ftn_jax.node import is_node
from ftn_jax.nodes.bits import pack_bits
from ftn_jax.nodes.packnet import PackNet
from ftn_jax.paths import path_name, some


def start_packing(
    shared: Any, pattern: str, *, prune: float | None
) -> dict[str, dict[str, Array]]:
    """Make a packed state of the backbone, for `extend(shared, packnet=...)`.

    Args:
        shared: the backbone's tree.
        pattern: regular expression of whole paths, the kernels to pack into (of
            convolutions and dense layers in the paper, not biases and norms).
        prune: share of each kernel's weights, the smallest, that the base gives up
            (0.5 in the paper, which then trains the rest again). `None`: the base is
            still to be trained, as task 1, and every position holds its pretrained
            weight, owned by nobody.

    Returns:
        By path: `values`, of the kernel's shape and dtype, and `owner` (uint8).

    Raises:
        ValueError: if the pattern matches no path, or the share is not in [0, 1).
    """
    _check_share(0.0 if prune is None else prune)
    state: dict[str, dict[str, Array]] = {}
    paths = []
    for entries, w in jax.tree_util.tree_leaves_with_path(shared):
        paths.append(path := path_name(entries))
        if not re.fullmatch(pattern, path):
            continue
        values = np.array(w)
        owner = np.zeros(w.shape, np.uint8)
        if prune is not None:
            owner[...] = 1
            freed = np.unravel_index(_smallest(values, prune), w.shape)
            values[freed], owner[freed] = 0, 0
        state[path] = {"values": jnp.asarray(values), "owner": jnp.asarray(owner)}
    if not state:
        raise ValueError(
            f"the pattern {pattern!r} matches no leaf (it must match the whole path); "
            f"the backbone has the leaves {some(paths)}"
        )
    return state


def prune(delta: Any, share: float) -> Any:
    """Let a task give up a share of its own positions in each layer, the smallest.

    Exactly `round(share * own)` of them; among equals the first go. The released code
    compares with the k-th smallest value, and so frees all equals of it.

    Args:
        delta: of concrete arrays, not under jit; nodes of other types stay.
        share: 0.75 in the paper; the last task to be packed keeps all.

    Returns:
        The delta to train again. Make a new optimizer state for it.

    Raises:
        ValueError: if the delta has no PackNet node, or the share is not in [0, 1).
    """
    _check_share(share)
    _nodes(delta)

    def one(node: Any) -> Any:
        if not isinstance(node, PackNet):
            return node
        places, own = node.own
        keep = np.setdiff1d(np.arange(own.size), _smallest(own, share))
        mine = np.zeros(8 * node.mine.size, bool)
        mine[places[keep]] = True
        value = node.value if node.shape is None else jnp.asarray(own[keep])
        return node.replace(value=value, mine=pack_bits(mine))

    return jax.tree.map(one, delta, is_leaf=is_node)


def pack(extended: Any, delta: Any) -> Any:
    """Write a trained task into the packed state; the next one trains what is left.

    Positions that no task owns then hold zero, where the next task starts.

    Args:
        extended: the backbone and what lies beside it; not changed.
        delta: the task's, of concrete arrays, compact or not.

    Returns:
        The backbone with the new packed state beside it (an `Extended`).

    Raises:
        ValueError: if the task's number is not the next one, or if it owns positions
            that are taken (names the path), none at all, or of other kernels.
    """
    state, nodes = _state(extended), _nodes(delta)
    tasks, task = sorted({node.task for _, node in nodes}), next_task(extended)
    if tasks != [task]:
        raise ValueError(
            f"found a delta of the tasks {tasks}, expected task {task}: tasks are "
            f"packed in the order of their numbers, and {task - 1} came last"
        )
    if not sum(node.own[0].size for _, node in nodes):
        raise ValueError(
            f"task {task} owns no position: nothing was free when it was made (see "
            "free_share); prune earlier tasks more before packing them"
        )
    packed = dict(state)
    for path, node in nodes:
        if path not in state:
            raise ValueError(
                f"{path}: not in the packed state, which has {some(sorted(state))}"
            )
        values, owner = (np.array(state[path][n]) for n in ("values", "owner"))
        if (found := node.shape or node.value.shape) != values.shape:
            raise ValueError(
                f"{path}: the task has shape {found}, the packed state {values.shape}"
            )
        places, own = node.own
        if (taken := owner.ravel()[places]).any():
            raise ValueError(
                f"{path}: {np.count_nonzero(taken)} positions of task {task} are owned "
                f"by tasks {sorted({*taken.tolist()} - {0})} already; train the "
                "task on this packed state"
            )
        values.flat[places], owner.flat[places] = own, task
        values[owner == 0] = 0
        packed[path] = {"values": jnp.asarray(values), "owner": jnp.asarray(owner)}
    return replace(extended, extras={**extended.extras, "packnet": packed})


def next_task(extended: Any) -> int:
    """Return the number of the task to be packed next: 1 is the base, then 2, 3, ...

    Raises:
        ValueError: if nothing is packed beside the backbone.
    """
    return 1 + max(int(x["owner"].max()) for x in _state(extended).values())


def free_share(extended: Any) -> float:
    """Return the share of all packed positions that no task owns, in [0, 1].

    Raises:
        ValueError: if nothing is packed beside the backbone.
    """
    owners = [np.asarray(x["owner"]) for x in _state(extended).values()]
    return sum(np.count_nonzero(o == 0) for o in owners) / sum(o.size for o in owners)


def _state(extended: Any) -> dict[str, dict[str, Array]]:
    state = getattr(extended, "extras", {}).get("packnet")
    if not state:
        raise ValueError(
            "no packed state lies beside the backbone; lay one there with "
            "extend(shared, packnet=start_packing(shared, pattern, prune=0.5))"
        )
    return state


def _nodes(delta: Any) -> list[tuple[str, PackNet]]:
    found = jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_node)
    nodes = [(path_name(p), node) for p, node in found if isinstance(node, PackNet)]
    if not nodes:
        raise ValueError("the delta holds no PackNet node")
    return nodes


def _smallest(x: np.ndarray, share: float) -> np.ndarray:
    """Return the flat places of the smallest magnitudes, the first among equals."""
    order = np.argsort(np.abs(x).ravel(), kind="stable")
    return order[: round(share * x.size)]


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"the share to prune must be in [0, 1), found {share!r}")
