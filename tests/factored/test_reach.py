"""What the hooks do not reach is found out, materialized, and named."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored.agreement import CHAIN, KEY, Case, Zoo, assert_same_numbers, draw
from flax import linen as nn
from jax import lax

from ftn_jax.factored import Factored
from ftn_jax.forward import merged
from ftn_jax.nodes import CP, LoRA, Replace
from ftn_jax.nodes.scale import Scale

cp = partial(CP.init, rank=1)
X = draw(np.random.default_rng(0), (4, 4, 4, 3))
DIMS = ("NHWC", "HWIO", "NHWC")


class Raw(nn.Module):
    """A convolution of its own."""

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.normal(), (3, 3, 3, 4))
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=DIMS)


class Standardized(nn.Conv):
    """Flax's convolution of a kernel that is changed on its way there."""

    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return value / jnp.sqrt((value**2).sum()) if name == "kernel" else value


def mapped(module, change):
    """A dense layer that sees its parameters changed."""
    init = module.is_initializing()

    def change_in(variables):
        params = variables.get("params")
        return {"params": change(params)} if params and not init else variables

    return nn.map_variables(nn.Dense, "params", change_in, init=init, mutable=init)


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x):
        def double(params):
            return {**params, "kernel": 2 * params["kernel"]}

        return mapped(self, double)(4, name="dense")(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4, name="dense"), name="norm")(x)


class Penalized(nn.Module):
    """A layer whose kernel has a second use beside it."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        y = dense(x)
        return y, (dense.variables["params"]["kernel"] ** 2).sum()


class Borrowed(nn.Module):
    """A layer that runs with another layer's kernel; its own is not used."""

    @nn.compact
    def __call__(self, x):
        lender = nn.Dense(3, name="lender")
        y = lender(x)
        kernel = lender.variables["params"]["kernel"]
        borrower = mapped(self, lambda params: {**params, "kernel": kernel})
        return borrower(3, name="borrower")(y)


class Token(nn.Module):
    @nn.compact
    def __call__(self, x):
        tokens = (x[..., 0] > 0).astype(jnp.int32)
        return nn.Embed(5, 6, name="embed")(tokens)


class Ambiguous(nn.Module):
    """Layers mapped over an axis of their parameters that sizes do not tell."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}
        )
        return mapped(3, name="dense")(jnp.stack([x, -x, 2 * x]))


def thrice(x, w, *args, **options):
    return lax.dot_general(x, 3 * w, *args, **options)


def scaling(*arrays, dtype):
    return [None if a is None else a * 1.5 for a in arrays]


MASK = (np.arange(9 * 3 * 4).reshape(3, 3, 3, 4) % 3 > 0).astype(np.float32)
UNREACHED = {
    "raw": Raw,
    "masked": partial(nn.Conv, 4, (3, 3), mask=MASK),
    "standardized": partial(Standardized, 4, (3, 3)),
    "doubled": Doubled,
    "normed": Normed,
    "penalized": Penalized,
    "borrowed": Borrowed,
    "transposed": partial(nn.ConvTranspose, 4, (3, 3)),
    "local": partial(nn.ConvLocal, 4, (3, 3)),
    "einsum": partial(nn.Einsum, (3, 4), "bhwc,cd->bhwd"),
    "embed": Token,
    "field": partial(nn.Dense, 4, dot_general=thrice),
    "cls": partial(nn.Dense, 4, dot_general_cls=lambda: thrice),
    "conv_cls": partial(
        nn.Conv, 4, (3, 3), conv_general_dilated_cls=lambda: lax.conv_general_dilated
    ),
    "promoted": partial(nn.Dense, 4, promote_dtype=scaling),
    "batched": partial(nn.DenseGeneral, 4, axis=-1, batch_dims=(0,)),
    "ambiguous": Ambiguous,
}


class Super(nn.Conv):
    """A class of the user's own that does nothing to the kernel."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


REACHED = {"super": partial(Super, 4, (3, 3)), "dense": partial(nn.Dense, 4)}


@pytest.fixture(scope="module")
def case():
    layers = UNREACHED | REACHED
    rules = {".*/(kernel|embedding)": cp}
    return Case(Zoo(layers), dict.fromkeys(layers, X), rules, scale=0.8)


@pytest.mark.parametrize(
    "names",
    [
        ["masked", "cls", "raw", "super"],
        pytest.param([*UNREACHED, *REACHED], marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_what_no_hook_reaches_is_materialized_with_its_gradient(names):
    layers = {name: (UNREACHED | REACHED)[name] for name in names}
    rules = {".*/(kernel|embedding)": cp}
    case = Case(Zoo(layers), dict.fromkeys(layers, X), rules, scale=0.8)
    assert_same_numbers(case.numbers(CHAIN), case.numbers(merged))


def test_the_plan_names_what_no_hook_reaches_and_why(case):
    plan = case.plan()
    reached = {path for path, row in plan.items() if not row.why}
    assert reached == {f"{name}/kernel" for name in REACHED}
    assert all(plan[path].op for path in reached)
    whys = {path.split("/")[0]: row.why for path, row in plan.items()}
    assert "no hook reaches" in whys["raw"]
    assert "changed" in whys["masked"] and "changed" in whys["standardized"]
    assert "another kernel" in whys["borrowed"]
    assert "integer_pow" in whys["penalized"]
    assert "no low-rank path" in whys["batched"]
    assert "sliced" in whys["ambiguous"]


def test_strict_refuses_full_gradients_and_names_them(case):
    wasteful = [path for path, row in case.plan().items() if row.wasteful]
    assert {path.split("/")[0] for path in wasteful} == {*UNREACHED}
    strict = Factored(strict=True)
    with pytest.raises(ValueError, match="strict") as error:
        jax.eval_shape(
            lambda delta: strict(
                case.apply, case.shared, delta, {}, case.batch, train=True
            ),
            case.delta,
        )
    assert all(path in str(error.value) for path in wasteful)
    assert "dense/kernel" not in str(error.value).replace("/dense/", "")


def test_strict_lets_pass_what_loses_nothing():
    rules = {
        "a/kernel": cp,
        "b/kernel": Replace.init,
        "./bias": Scale.init,
    }
    layers = {"a": partial(nn.Conv, 8, (3, 3)), "b": partial(nn.Dense, 4)}
    case = Case(Zoo(layers), dict.fromkeys(layers, X), rules)
    strict = Factored(choose="chain", strict=True)
    assert_same_numbers(case.numbers(strict), case.numbers(merged))


def test_loralib_layout_and_other_nodes_say_why():
    layers = {"a": partial(nn.Conv, 8, (3, 3)), "b": partial(nn.Dense, 8)}
    rules = {
        "a/kernel": partial(LoRA.init, rank=1, form="reshape"),
        "b/kernel": Scale.init,
    }
    case = Case(Zoo(layers), dict.fromkeys(layers, X), rules)
    plan = case.plan()
    assert plan["a/kernel"].why == "LoRA is no sum of outer products"
    assert plan["b/kernel"].why == "Scale is no sum of outer products"
    assert plan["a/kernel"].wasteful and plan["b/kernel"].wasteful


def test_a_node_that_does_not_fit_is_refused_as_a_merge_refuses_it(case):
    other = jnp.ones((2, 4))
    for bad in (cp(KEY, other), LoRA.init(KEY, other, rank=1)):
        delta = {**case.delta, "dense": {**case.delta["dense"], "kernel": bad}}
        with pytest.raises(ValueError, match=f"dense/kernel: {type(bad).__name__}"):
            CHAIN(case.apply, case.shared, delta, {}, case.batch, train=True)
