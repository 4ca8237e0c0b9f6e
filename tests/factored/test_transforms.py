"""Networks built with Flax's lifted transforms, and steps under JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import BRANCH, CHAIN, Case, Zoo, assert_same_numbers, draw
from flax import linen as nn

from ftn_jax.factored import Factored
from ftn_jax.forward import merged
from ftn_jax.nodes import CP
from ftn_jax.nodes.stacked import Stacked

pytestmark = pytest.mark.long

cp = partial(CP.init, rank=2)
X = draw(np.random.default_rng(0), (2, 5, 4, 3))


class Block(nn.Module):
    """A convolution and a dense layer, 3 channels in and out."""

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.Dense(3, name="dense")(jnp.tanh(x))
        return x if _ is None else (x, None)


class Twice(nn.Module):
    """Calls one module twice, on images of two sizes."""

    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        return block(block(x)[:, 1:])


class Siblings(nn.Module):
    """Three blocks of one shape, which `nn.jit` traces once."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(Block)
        for i in range(3):
            x = block(name=f"b{i}")(x)
        return x


class Layers(nn.Module):
    """The layers themselves transformed."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Conv)(4, (3, 3), name="remat")(x)
        x = nn.jit(nn.Conv)(3, (3, 3), name="jit")(x)
        return nn.jit(nn.remat(nn.Dense))(3, name="both")(x)


class Switch(nn.Module):
    """A layer in one of two branches."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (3, 3), name="conv")
        y = conv(x)
        return nn.cond(x.sum() > -1e6, lambda m, x: m(x), lambda m, x: x, conv, y)


def scan(block, **options):
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        **options,
    )


class Scanned(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        return scan(self.block)(name="blocks")(x, jnp.zeros(3))[0]


class Repeated(nn.Module):
    """A scan that runs the same parameters three times."""

    @nn.compact
    def __call__(self, x):
        repeat = nn.scan(
            Block, variable_broadcast="params", split_rngs={"params": False}, length=3
        )
        return repeat(name="block")(x, jnp.zeros(3))[0]


class Mapped(nn.Module):
    """Blocks side by side, each on an input of its own."""

    @nn.compact
    def __call__(self, x):
        block = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True})
        return block(name="blocks")(jnp.stack([x, x[::-1], -x, 2 * x, x * x]))


def stack(key, w):
    keys = jax.random.split(key, len(w))
    nodes = [cp(k, w[i]) for i, k in enumerate(keys)]
    return Stacked.of(nodes, place="blocks_{}/kernel")


NETWORKS = {
    "plain": Block,
    "remat": nn.remat(Block),
    "jit": Siblings,
    "layers": Layers,
    "switch": Switch,
    "twice": Twice,
    "scan": Scanned,
    "scan_of_remat": partial(Scanned, nn.remat(Block, prevent_cse=False)),
    "repeated": Repeated,
    "vmap": Mapped,
}
RULES = {".*/blocks/.*kernel": stack, ".*kernel": cp}


FEW = ("plain", "remat", "jit", "twice", "scan", "vmap")


def case_of(names):
    rules = RULES if {"scan", "vmap"} & {*names} else {".*kernel": cp}
    networks = {name: NETWORKS[name] for name in names}
    return Case(Zoo(networks), dict.fromkeys(networks, X), rules)


@pytest.fixture(scope="module")
def case():
    return case_of(FEW)


def test_lifted_transforms_get_the_same_numbers(case):
    ways = {path: ("chain", "branch")[n % 2] for n, path in enumerate(case.paths)}
    forward = Factored(choose=lambda path, work: ways[path])
    assert {p: row.choice for p, row in case.plan(forward).items()} == ways
    assert_same_numbers(case.numbers(forward), case.numbers(merged))


@pytest.mark.slow
@pytest.mark.parametrize("forward", [CHAIN, BRANCH], ids=["chain", "branch"])
def test_every_lifted_transform_gets_the_same_numbers(forward):
    case = case_of(NETWORKS)
    assert not {row.path for row in case.plan().values() if row.choice == "kernel"}
    assert_same_numbers(case.numbers(forward), case.numbers(merged))


def test_uses_of_one_weight_are_all_counted(case):
    plan = case.plan()
    once, twice = (plan[f"{n}/conv/kernel"].work for n in ("plain", "twice/block"))
    assert twice.chain.flops > 1.5 * once.chain.flops
    three = plan["scan/blocks/conv/kernel"].work
    assert three.chain == tuple(3 * c for c in once.chain)
