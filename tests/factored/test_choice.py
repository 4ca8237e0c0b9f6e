"""Which way a weight's gradient takes: counted, decided, overridden, as planned."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import BRANCH, CHAIN, KEY, Case, Zoo, draw, swing
from flax import linen as nn

from ftn_jax import make_delta
from ftn_jax.apply import from_linen
from ftn_jax.factored import Cost, Factored, Work, factored
from ftn_jax.factored.cost import cheapest
from ftn_jax.forward import Forward, merged
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP, LoRA, Replace


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@cache
def resnet_plan(rank, *, px=96, node=CP, forward=factored, dtype=None):
    """The plan of a ResNet-18 on 32 images, from shapes alone."""
    model, x = RESNETS["resnet18"](10), shape(32, px, px, 3)
    variables = jax.eval_shape(model.init, KEY, x)
    rules = {
        r".*conv\d*/kernel": partial(node.init, rank=rank),
        r".*bn\d*/.*": Replace.init,
    }
    delta = jax.eval_shape(partial(make_delta, rules=rules), KEY, variables["params"])
    return {
        row.path: row
        for row in forward.plan(
            from_linen(model),
            variables["params"],
            delta,
            {"batch_stats": variables["batch_stats"]},
            {"image": x},
            compute_dtype=dtype,
        )
    }


def test_a_resnet_takes_the_low_rank_path_wherever_it_pays():
    plan = resnet_plan(10)
    convs = {path: row for path, row in plan.items() if row.op == "conv"}
    assert len(convs) == 20
    whole = {path for path, row in convs.items() if row.choice == "kernel"}
    assert whole == {"stem/conv/kernel"}  # 49 taps on a large map, 3 channels
    assert convs["layer1_0/conv1/kernel"].choice == "chain"
    assert convs["layer4_1/conv2/kernel"].choice == "branch"
    norms = [row for path, row in plan.items() if path not in convs]
    assert len(norms) == 40 and {row.choice for row in norms} == {"kernel"}
    assert not any(row.wasteful for row in norms)


def test_high_ranks_fall_back_to_whole_kernels():
    def count(rank):
        return sum(row.choice == "kernel" for row in resnet_plan(rank).values())

    few, many = count(10), count(2000)
    assert few < 45 < many


def test_the_work_is_that_of_the_formulas():
    layers = {"conv": partial(nn.Conv, 8, (3, 3)), "dense": partial(nn.Dense, 8)}
    inputs = {
        "conv": jnp.ones((2, 5, 5, 4), jnp.float32),
        "dense": jnp.ones((2, 4), jnp.float32),
    }
    case = Case(Zoo(layers), inputs, {".*kernel": partial(CP.init, rank=3)})
    plan = case.plan()
    # Kernel: one product for each weight and place; the merge; the merge's gradient.
    places, weights, rank = 2 * 5 * 5, 9 * 4 * 8, 3
    work = plan["conv/kernel"].work
    assert work.kernel.matmul == 2 * places * weights + 6 * weights * rank
    x, out = places * 4, places * 8
    assert work.chain.matmul == 4 * (x + out) * rank + 2 * weights * rank
    assert work.branch.matmul == 6 * (x + out) * rank
    assert plan["dense/kernel"].work.chain.elementwise == 0
    assert work.chain.elementwise >= 6 * places * rank * 9


def test_choices_can_be_overridden_by_path():
    seen, choice = {}, "chain"

    def choose(path, work):
        seen[path] = work
        return choice if path.startswith("layer4") else "auto"

    plan = resnet_plan(10, forward=Factored(choose=choose))
    assert len(seen) == 20 and all(isinstance(w, Work) for w in seen.values())
    inside = {
        row.choice for path, row in plan.items() if path in seen and "layer4" in path
    }
    assert inside == {choice}
    auto = resnet_plan(10)
    assert all(plan[p] == auto[p] for p in plan if "layer4" not in p)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="layer1_0/conv1/kernel: choose .* 'fast'"):
        resnet_plan(10, forward=Factored(choose="fast"))


def test_machines_differ():
    much_shifting = Work(
        kernel=Cost(1e9, 0, 1e6), chain=Cost(1e8, 6e7, 1e6), branch=Cost(2e8, 6e7, 1e7)
    )
    assert cheapest(much_shifting, "cpu") == "kernel"
    assert cheapest(much_shifting, "gpu") == "chain"
    assert cheapest(much_shifting._replace(chain=Cost(1e8, 0, 1e6)), "cpu") == "chain"


def test_a_plan_costs_nothing_and_matches_a_run():
    assert isinstance(factored, Forward) and factored == Factored()
    layers = {"conv": partial(nn.Conv, 8, (3, 3))}
    x = draw(np.random.default_rng(0), (2, 5, 5, 4))
    case = Case(Zoo(layers), {"conv": x}, {".*kernel": partial(LoRA.init, rank=2)})
    shapes = jax.tree.map(
        lambda a: shape(*a.shape), (case.shared, case.delta, {}, case.batch)
    )
    (row,) = CHAIN.plan(case.apply, *shapes)
    assert row == case.plan()["conv/kernel"]


@pytest.mark.parametrize(
    ("forward", "formed"), [(merged, True), (CHAIN, False), (BRANCH, False)]
)
def test_no_gradient_of_a_full_kernel_is_formed(forward, formed):
    """Nor, beside the frozen kernel, the merged one: the compiled program shows it."""
    x = draw(np.random.default_rng(0), (2, 7, 7, 5))
    case = Case(nn.Conv(11, (3, 3)), x, {"kernel": partial(CP.init, rank=2)})

    def gradient(delta, shared):
        def objective(delta):
            return swing(
                forward(case.apply, shared, delta, {}, case.batch, train=True)[0]
            )

        return jax.grad(objective)(delta)

    text = jax.jit(gradient).lower(case.delta, case.shared).compile().as_text()
    backward = [line for line in text.splitlines() if "transpose(jvp" in line]
    assert backward
    size = {3 * 3 * 5 * 11}
    results = [re.search(r"= f32\[([\d,]+)\]", line) for line in backward]
    sizes = {int(np.prod([int(n) for n in m[1].split(",")])) for m in results if m}
    assert (size <= sizes) == formed
