"""Decide, weight by weight, how a node gets its gradient."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from ftn_jax.factored.cost import Cost, Work, cheapest, count_merge, count_use
from ftn_jax.factored.factors import Factors, factors_of, polyadic
from ftn_jax.factored.hooks import Use
from ftn_jax.factored.probe import Reach
from ftn_jax.node import Node
from ftn_jax.nodes.stacked import Stacked

Choose = Literal["auto", "chain", "branch", "kernel"] | Callable[[str, Work], str]

Entries = Iterable[tuple[str, Any, Node | None]]


class Planned(NamedTuple):
    """What happens to one weight that has a node.

    Attributes:
        path: of the weight.
        node: name of the node's type.
        op: `"conv"` or `"dot"`; empty if the hooks do not reach the weight.
        choice: `"kernel"`: merge, and differentiate the whole weight, as `merged`
            does. `"chain"`: merge, and differentiate along the low-rank path.
            `"branch"`: run the low-rank path beside the frozen operation.
        work: of a training step, counted for each; `None` if there is no choice.
        why: why there is none; else empty.
        wasteful: whether a full gradient is formed for a node of fewer parameters.
        uses: the operations that the weight serves, if there is a choice.
    """

    path: str
    node: str
    op: str
    choice: str
    work: Work | None = None
    why: str = ""
    wasteful: bool = False
    uses: tuple[Use, ...] = ()


def candidates(entries: Entries) -> list[str]:
    """List the paths of the weights whose node has a low-rank form."""
    return [path for path, w, node in entries if node and _has_form(node, w.shape)]


def _has_form(node: Node, shape: tuple[int, ...]) -> bool:
    if isinstance(node, Stacked):
        layer = jax.eval_shape(lambda n: jax.tree.map(lambda x: x[0], n), node.inner)
        return not node.tied_fields and _has_form(layer, shape[1:])
    return jax.eval_shape(lambda n: polyadic(n, shape), node) is not None


def decide(
    entries: Entries, reached: Mapping[str, Reach], choose: Choose
) -> tuple[list[Planned], dict[str, Factors]]:
    """Plan every weight that has a node.

    Args:
        entries: `(path, weight, complete node)`, as `ftn_jax.core.complete` lists them.
        reached: what a probe found out about the `candidates`.
        choose: `"auto"`: the cheapest way by the counted work; one way wherever there
            is a choice; or a function of path and work.

    Returns:
        The plan, and the factors of the weights planned as `"chain"` or `"branch"`.

    Raises:
        ValueError: if `choose` is, or gives, anything else.
    """
    plan, factored = [], {}
    for path, w, node in entries:
        if node is None:
            continue
        name = type(node).__name__
        factors, why = _factors(node, w, reached.get(path))
        if factors is None:
            size = sum(x.size for x in jax.tree.leaves(node))
            wasteful = w.ndim > 1 and size < w.size
            plan.append(Planned(path, name, "", "kernel", None, why, wasteful))
            continue
        work = _total(reached[path], factors)
        choice = _choose(choose, path, work)
        uses = reached[path].uses
        plan.append(Planned(path, name, uses[0].op.name, choice, work, uses=uses))
        if choice != "kernel":
            factored[path] = factors
    return plan, factored


def _factors(node: Node, w: Any, reach: Reach | None) -> tuple[Factors | None, str]:
    name = type(node).__name__
    if reach is None:
        return None, f"{name} is no sum of outer products"
    if reach.why:
        return None, reach.why
    roles = {use.op.roles(len(use.kernel.shape)) for use in reach.uses}
    if len(roles) > 1:
        return None, "its uses take its axes in different roles"
    (role,) = roles
    assert role is not None
    if isinstance(node, Stacked):
        name = type(node.inner).__name__
        if not reach.layers:
            return None, "the network does not run through the layers it stacks"
        factors = jax.vmap(lambda n: factors_of(n, w.shape[1:], role))(node.inner)
    elif reach.layers:
        return None, f"one {name} spans the layers of a scan or vmap, see Stacked"
    else:
        factors = factors_of(node, w.shape, role)
    if factors is None:
        return None, f"{name} ties the weight's output axes to its input axes"
    return factors, ""


def _total(reach: Reach, factors: Factors) -> Work:
    layers = max(reach.layers, 1)
    if reach.layers:
        factors = jax.eval_shape(lambda f: jax.tree.map(lambda x: x[0], f), factors)
    works = [count_use(use, factors) for use in reach.uses]
    merge = count_merge(reach.uses[0].kernel, factors.right.shape[-1])

    def total(costs: Iterable[Cost]) -> Cost:
        return Cost(*(layers * sum(column) for column in zip(*costs, strict=True)))

    return Work(
        kernel=total([merge, *(w.kernel for w in works)]),
        chain=total([merge, *(w.chain for w in works)]),
        branch=total([w.branch for w in works]),
    )


def _choose(choose: Choose, path: str, work: Work) -> str:
    choice = choose(path, work) if callable(choose) else choose
    if choice == "auto":
        choice = cheapest(work)
    if choice not in work._fields:
        raise ValueError(
            f"{path}: choose is, or gives, {choice!r}; expected 'auto', 'chain', "
            "'branch' or 'kernel'"
        )
    return choice
