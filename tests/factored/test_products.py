"""Node x layer kind x stride x padding x dilation x groups x rank: `merged`'s numbers.

By default a part of the product in which every two levels meet; all of it is slow.
"""

from functools import partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import BRANCH, CHAIN, Case, Zoo, assert_same_numbers, swing
from flax import linen as nn

from ftn_jax.factored import Factored
from ftn_jax.forward import merged
from ftn_jax.nodes import CP, LoRA

pytestmark = pytest.mark.long

NODES = {
    "cp1": partial(CP.init, rank=1),
    "cp3": partial(CP.init, rank=3),
    "lora2": partial(LoRA.init, rank=2),
}
PADDING_2D = ["SAME", "VALID", ((2, 0), (1, 3)), "CIRCULAR", "REFLECT"]


def images(spatial, channels):
    rng = np.random.default_rng(len(spatial) * channels)
    return jnp.asarray(rng.normal(size=(2, *spatial, channels)), jnp.float32)


def add(layers, inputs, name, make, x, nodes=NODES):
    for node in nodes:
        layers[f"{node}__{name}"], inputs[f"{node}__{name}"] = make, x


LEVELS = (tuple(NODES), (1, 2), range(len(PADDING_2D)), (1, 2), (1, 2, 4))


def every_pair(levels):
    """Choose few combinations so that every two levels of two factors meet."""

    def pairs(row):
        return {*combinations(enumerate(row), 2)}

    missing = set().union(*map(pairs, product(*levels)))
    chosen = []
    while missing:
        chosen.append(max(product(*levels), key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def convolutions_2d(rows):
    layers, inputs = {}, {}
    for node, s, p, d, g in rows:
        make = partial(
            nn.Conv,
            features=8 if g == 4 else 4,
            kernel_size=(3, 2),
            strides=(s, 1),
            padding=PADDING_2D[p],
            kernel_dilation=(1, d),
            feature_group_count=g,
        )
        # Groups of 4 channels: depthwise.
        x = images((6, 5), 4 if g == 4 else 6)
        add(layers, inputs, f"s{s}p{p}d{d}g{g}", make, x, [node])
    return layers, inputs


def other_layers():
    layers, inputs = {}, {}
    table = {
        "conv1d": (partial(nn.Conv, 4, (3,), strides=2), (7,), 3),
        "causal": (
            partial(nn.Conv, 4, (3,), padding="CAUSAL", kernel_dilation=2),
            (7,),
            3,
        ),
        "conv3d": (partial(nn.Conv, 4, (2, 3, 2), strides=(1, 2, 1)), (4, 5, 3), 3),
        "pointwise": (partial(nn.Conv, 4, (1, 1)), (4, 5), 3),
        "pointwise_strided": (partial(nn.Conv, 4, (1, 1), strides=2), (5, 4), 3),
        "pointwise_padded": (partial(nn.Conv, 4, (1, 1), padding=1), (3, 3), 3),
        "transposed": (
            partial(nn.Conv, 4, (3, 3), input_dilation=2, padding=((2, 1), (1, 2))),
            (3, 3),
            3,
        ),
        "cropped": (partial(nn.Conv, 4, (3, 3), padding=((-1, 0), (1, -1))), (6, 6), 3),
        "unbatched_axes": (partial(nn.Conv, 4, (3, 3)), (2, 5, 4), 3),
        "dense": (partial(nn.Dense, 4), (), 6),
        "dense_3d": (partial(nn.Dense, 4), (5,), 6),
        "heads": (partial(nn.DenseGeneral, (2, 3)), (5,), 6),
        "merge_heads": (partial(nn.DenseGeneral, 5, axis=(-2, -1)), (4, 2), 6),
        "swapped": (partial(nn.DenseGeneral, 5, axis=(-1, 1)), (4, 2), 6),
    }
    for name, (make, spatial, channels) in table.items():
        nodes = ("cp3", "lora2") if name != "dense" else NODES
        add(layers, inputs, name, make, images(spatial, channels), nodes)
    attention = partial(nn.MultiHeadDotProductAttention, num_heads=2, qkv_features=6)
    add(layers, inputs, "attention", attention, images((4,), 6), ("cp3", "lora2"))
    return layers, inputs


FEW = (
    "cp1__dense",
    "cp3__causal",
    "cp3__heads",
    "cp3__pointwise_strided",
    "lora2__conv3d",
    "lora2__merge_heads",
)


def few_layers():
    layers, inputs = other_layers()
    return {name: layers[name] for name in FEW}, {name: inputs[name] for name in FEW}


AXES = {
    "joined": ((0, 1, 2), (3,)),
    "apart": ((0,), (1,), (2,), (3,)),
    "reordered": ((2,), (1, 0), (3,)),
    "input_row": ((0, 2), (1,), (3,)),
}
TYING = {"tap_and_output": ((0, 1, 3), (2,)), "ends": ((0, 1), (2, 3))}


def axis_groups():
    layers, inputs = {}, {}
    for name in AXES | TYING:
        layers[name], inputs[name] = partial(nn.Conv, 4, (3, 2)), images((5, 4), 3)
    layers["heads_inputs1"] = partial(nn.DenseGeneral, (2, 3))
    layers["depthwise_lora"] = partial(nn.Conv, 8, (3, 3), feature_group_count=4)
    inputs["heads_inputs1"] = images((5,), 6)
    inputs["depthwise_lora"] = images((5, 5), 4)
    rules = {
        f"{name}/kernel": partial(CP.init, rank=2, init="normal", axes=axes)
        for name, axes in (AXES | TYING).items()
    }
    rules["heads_inputs1/kernel"] = partial(LoRA.init, rank=2, inputs=1)
    rules["depthwise_lora/kernel"] = NODES["lora2"]
    return Case(Zoo(layers), inputs, rules)


def table(parts):
    layers, inputs = parts()
    used = {name.split("__")[0] for name in layers}
    rules = {f"{name}__.*kernel": init for name, init in NODES.items() if name in used}
    return Case(Zoo(layers), inputs, rules)


# Nodes whose factors tie outputs to inputs: LoRA takes all axes but the last for
# inputs, unless it is told otherwise, those of attention heads among them.
TIES = {
    "other": (
        "lora2__heads",
        *(f"lora2__attention/{n}" for n in ("query", "key", "value")),
    ),
    "axes": tuple(TYING),
}
CASES = {
    "few": partial(table, few_layers),
    "other": partial(table, other_layers),
    "axes": axis_groups,
}


@pytest.mark.parametrize(
    "name", ["few", *(pytest.param(n, marks=pytest.mark.slow) for n in TIES)]
)
def test_other_layers_get_the_same_numbers(name):
    case = CASES[name]()
    whole = {p for p, row in case.plan().items() if row.choice == "kernel"}
    ties = TIES.get(name, ())
    assert whole == {path for path in case.paths if path.startswith(ties)}
    expected = case.numbers(merged)
    # Merged kernels run forward: the outputs are equal to the last bit.
    gradients, outputs = case.numbers(CHAIN)
    assert_same_numbers(outputs, expected[1], tolerance=1e-6)
    assert_same_numbers(gradients, expected[0])
    assert_same_numbers(case.numbers(BRANCH), expected)


@pytest.mark.parametrize("rows", ["pairs", pytest.param("all", marks=pytest.mark.slow)])
def test_2d_convolutions_get_the_same_numbers(rows):
    rows = every_pair(LEVELS) if rows == "pairs" else product(*LEVELS)
    case = table(partial(convolutions_2d, rows))
    ways = {path: ("chain", "branch")[n % 2] for n, path in enumerate(case.paths)}
    forward = Factored(choose=lambda path, work: ways[path])
    assert {p: row.choice for p, row in case.plan(forward).items()} == ways
    assert_same_numbers(case.numbers(forward), case.numbers(merged))


@pytest.mark.parametrize("node", ["cp3", "lora2"])
def test_an_empty_batch_is_a_batch(node):
    make = partial(nn.Conv, 4, (3, 3), feature_group_count=2)
    case = Case(make(), images((5, 5), 4)[:0], {"kernel": NODES[node]})
    for forward in (CHAIN, BRANCH):

        def objective(delta, forward=forward):
            batch = case.shared, delta, {}, case.batch
            return swing(forward(case.apply, *batch, train=True)[0])

        shapes = jax.eval_shape(jax.grad(objective), case.delta)
        assert jax.tree.structure(shapes) == jax.tree.structure(case.delta)


def test_a_wrong_gradient_would_be_noticed():
    layers, inputs = other_layers()
    layers = {"cp3__dense": layers["cp3__dense"]}
    case = Case(Zoo(layers), inputs, {".*kernel": NODES["cp3"]})
    gradients, _ = case.numbers(merged)
    wrong = {**gradients}
    node = wrong["cp3__dense"]["kernel"]
    left, right = node.factors
    wrong["cp3__dense"] = {
        "kernel": node.replace(factors=(left, right.at[0, 0].multiply(1 + 1e-3))),
        "bias": None,
    }
    with pytest.raises(AssertionError, match="1 differ"):
        assert_same_numbers(wrong, gradients)
