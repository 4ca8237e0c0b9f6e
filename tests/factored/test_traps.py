"""Ways to hook a network that are silently wrong, each beside the one that is right."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import BRANCH, CHAIN, Case, assert_same_numbers, distances, draw
from factored.test_transforms import Scanned, Siblings, cp, stack
from flax import linen as nn

from ftn_jax.core import materialize
from ftn_jax.factored import Factored
from ftn_jax.factored.hooks import BESIDE
from ftn_jax.factored.linen import hooked, lay_beside
from ftn_jax.forward import merged

X = draw(np.random.default_rng(0), (2, 5, 4, 3))


@contextmanager
def naive(update):
    """Add `update(module)` to the outputs' layer: what a hook without care does."""

    def intercept(run, args, kwargs, context):
        y = run(*args, **kwargs)
        more = None
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            more = update(context.module)
        return y if more is None else y + args[0] @ more

    with nn.intercept_methods(intercept):
        yield


def register_companion(cls):
    jax.tree_util.register_pytree_node(cls, lambda _: ((), None), lambda *_: cls())
    return cls


def dense_updates(case):
    """What the delta adds to each dense kernel, by the layer's path."""
    params = materialize(case.shared, case.delta)
    return {
        name: params[name]["dense"]["kernel"] - case.shared[name]["dense"]["kernel"]
        for name in case.shared
    }


@pytest.fixture(scope="module")
def siblings():
    return Case(Siblings(), X, {"b./dense/kernel": cp})


def outputs(case, forward):
    return forward(case.apply, case.shared, case.delta, {}, case.batch, train=True)[0]


def test_factors_closed_over_are_wrong_under_nn_jit(siblings):
    """`nn.jit` traces siblings of one shape once: all of them get b0's update."""
    updates = dense_updates(siblings)
    right = outputs(siblings, merged)
    with naive(lambda module: updates.get(module.path[0])):
        wrong = siblings.apply(siblings.shared, {}, siblings.batch, train=True)[0]
    assert distances(wrong, right)[""] > 1e-2
    for forward in (CHAIN, BRANCH):
        assert_same_numbers(outputs(siblings, forward), right)


def test_siblings_of_one_shape_keep_their_own_deltas_and_scales(siblings):
    """The same factors with another scale are another program."""
    delta = {**siblings.delta}
    node = delta["b0"]["dense"]["kernel"]
    for name, scale in (("b0", 1.0), ("b1", -2.0)):
        scaled = type(node)(node.factors, axes=node.axes, scale=scale)
        delta[name] = {**delta[name], "dense": {"kernel": scaled, "bias": None}}
    shared = dict.fromkeys(siblings.shared, siblings.shared["b0"])

    def run(forward, delta):
        return forward(siblings.apply, shared, delta, {}, siblings.batch, train=True)[0]

    delta["b2"] = jax.tree.map(lambda _: None, shared["b2"])
    right = run(merged, delta)
    assert_same_numbers(run(CHAIN, delta), right)
    same = {**delta, "b1": delta["b0"]}
    assert distances(run(merged, same), right)[""] > 1e-2


def test_factors_in_another_collection_are_unseen_by_nn_scan():
    rules = {"blocks/dense/kernel": stack}
    case = Case(Scanned(), X, rules)
    params = materialize(case.shared, case.delta)
    kernel = ("blocks", "dense", "kernel")
    update = (
        params["blocks"]["dense"]["kernel"] - case.shared["blocks"]["dense"]["kernel"]
    )
    seen = []

    def from_collection(module):
        found = module.has_variable("factors", "update")
        seen.append(found)
        return module.get_variable("factors", "update") if found else None

    with naive(from_collection):
        variables = {
            "params": case.shared,
            "factors": {"blocks": {"dense": {"update": update}}},
        }
        wrong = Scanned().apply(variables, X)
    assert not any(seen) and distances(wrong, outputs(case, merged))[""] > 1e-2
    assert case.plan()["/".join(kernel)].choice == "chain"
    assert_same_numbers(outputs(case, CHAIN), outputs(case, merged))


def test_a_context_entered_outside_jit_meets_the_program_of_before(siblings):
    marks = {}

    @register_companion
    class Spy:
        def run(self, op, x, kernel):
            marks["met"] = True
            return op(x, kernel)

    model = nn.Dense(3)
    params = lay_beside(
        {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}, {"kernel": Spy()}
    )
    assert BESIDE in params
    run = jax.jit(lambda p, x: model.apply({"params": p}, x))
    run(params, X)
    with hooked():
        run(params, X)
        assert not marks  # the compiled program knows nothing of the context
        jax.jit(lambda p, x: model.apply({"params": p}, x))(params, X)
    assert marks


def test_the_forward_is_right_in_any_order_of_programs(siblings):
    """`nn.jit` keeps traces from one apply to the next; none must serve another way."""
    right = outputs(siblings, merged)
    ways = {"b0/dense/kernel": "kernel", "b1/dense/kernel": "chain"}
    mixed = Factored(choose=lambda path, work: ways.get(path, "branch"))
    for forward in (CHAIN, mixed, BRANCH, merged, CHAIN):
        assert_same_numbers(outputs(siblings, forward), right)
        assert siblings.plan(CHAIN)["b1/dense/kernel"].choice == "chain"


def test_second_derivatives_are_right_or_refused():
    """A merged kernel's own dependence on the factors is lost along the chain."""
    case = Case(nn.Dense(2), X[0], {"kernel": cp})

    def curvature(forward):
        def slope(delta):
            return jax.grad(lambda d: jnp.sin(outputs(d)).sum())(delta)

        def outputs(d):
            return forward(case.apply, case.shared, d, {}, case.batch, train=True)[0]

        return jax.jvp(slope, (case.delta,), (case.delta,))[1]

    found, expected = jax.jit(lambda: (curvature(BRANCH), curvature(merged)))()
    assert_same_numbers(found, expected)
    assert all(jnp.abs(x).max() > 1e-2 for x in jax.tree.leaves(expected))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        curvature(CHAIN)


def test_hooks_leave_the_modules_as_they_were():
    @register_companion
    class Broken:
        def run(self, op, x, kernel):
            raise RuntimeError("broken")

    layer = nn.Dense(3).bind(
        {
            "params": lay_beside(
                {"kernel": X[0, 0, :3], "bias": X[0, 0, 0]}, {"kernel": Broken()}
            )
        }
    )
    with hooked(), pytest.raises(RuntimeError, match="broken"):
        layer(X)
    assert layer.dot_general is None
    with hooked():  # and a field that the user has set stays the user's
        own = nn.Dense(3, dot_general=jax.lax.dot_general).bind(layer.variables)
        own(X)
