"""A batch of several tasks gives what each task alone gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from banks import NETWORKS, SETTINGS, alone, build, images, initial, task
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ftn_jax import materialize
from ftn_jax.apply import from_linen
from ftn_jax.bank import Bank
from ftn_jax.mixed import make_mixed_eval_step, mixed, no_logit
from ftn_jax.nodes import CP, LoRA, Replace

pytestmark = pytest.mark.long

MIXES = {
    "distinct": "abcabcab",
    "uniform": "cabbaccb",
    "skewed": "aaaaabbc",
    "identical": "bbbbbbbb",
}
BATCH = 8


class Case:
    """A network, its bank, and one compiled program for every mix."""

    def __init__(self, name):
        self.make, self.shared, self.tasks = build(name)
        self.rules = NETWORKS[name][1]
        self.bank = Bank.of(self.tasks, shared=self.shared, capacity=6)
        step = make_mixed_eval_step(from_linen(self.make()), metrics=None)
        self.traces = 0

        def counted(*arguments):
            self.traces += 1
            return step(*arguments)

        self.run = jax.jit(counted)
        self.images = images(BATCH)
        self.alone = {n: self.outputs(t) for n, t in self.tasks.items()}

    def outputs(self, task):
        return np.asarray(alone(self.make, self.shared, task, self.images))

    def __call__(self, names, bank=None, order=slice(None)):
        bank = bank or self.bank
        ids = names if hasattr(names, "dtype") else bank.ids([*names])
        found = self.run(self.shared, bank.stack, ids, {"image": self.images[order]})
        assert self.traces == 1  # whatever the tasks and their mix
        return np.asarray(found)


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    return Case(request.param)


def check(found, expected, tolerance=1e-5):
    """Compare one example's outputs; those of classes it does not have are none."""
    size = len(expected)
    gap = np.abs(found[:size] - expected).max()
    assert gap < tolerance * np.abs(expected).max()
    assert (found[size:] == no_logit(found.dtype)).all()


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_equals_the_tasks_one_by_one(case, mix):
    outputs = case(MIXES[mix])
    for row, name in zip(range(BATCH), MIXES[mix], strict=True):
        check(outputs[row], case.alone[name][row])
        for other in {*SETTINGS} - {name}:  # the tasks are far apart
            theirs = case.alone[other][row]
            size = min(len(theirs), len(case.alone[name][row]))
            gap = np.abs(outputs[row, :size] - theirs[:size]).max()
            assert gap > 1e-3 * np.abs(theirs).max()


def test_order_and_neighbours_do_not_matter(case):
    order = np.random.default_rng(0).permutation(BATCH)
    names = MIXES["distinct"]
    plain = case(names)
    shuffled = case([names[n] for n in order], order=order)
    scale = np.abs(np.where(plain > -1e30, plain, 0)).max()
    np.testing.assert_allclose(shuffled, plain[order], atol=1e-6 * scale, rtol=1e-5)
    among_others = case(MIXES["identical"])[1]
    np.testing.assert_allclose(among_others, plain[1], rtol=1e-5, atol=1e-6 * scale)


def test_a_task_put_in_later_runs_in_the_same_program(case):
    state = next(iter(case.tasks.values())).model_state
    late = task(case.rules(4, 5), case.shared, state, seed=9)
    bank = case.bank.put("late", late)
    outputs = case(["late", *"abcacb", "late"], bank)
    expected = case.outputs(late)
    check(outputs[0], expected[0])
    check(outputs[7], expected[7])
    check(outputs[1], case.alone["a"][1])
    back = case(MIXES["skewed"], bank.drop("late"))
    np.testing.assert_array_equal(back, case(MIXES["skewed"]))


def test_ids_without_a_task_give_nan(case):
    ids = jnp.array([0, -1, 5, 6, 1, 1000, 3, 2], jnp.int32)  # from 3 on, free
    outputs = case(ids)
    assert np.isnan(outputs[[1, 2, 3, 5, 6]]).all()
    for row, name in ((0, "a"), (4, "b"), (7, "c")):
        check(outputs[row], case.alone[name][row])


def test_in_bfloat16(case):
    run = jax.jit(partial(mixed, from_linen(case.make()), compute_dtype=jnp.bfloat16))
    names = [*"abcabcab"]
    ids = case.bank.ids(names)
    outputs, _ = run(case.shared, case.bank.stack, ids, {"image": case.images})
    for row, name in enumerate(names):
        expected = case.alone[name][row]
        gap = np.abs(np.asarray(outputs[row, : len(expected)], np.float32) - expected)
        assert gap.max() < 3e-2 * np.abs(case.alone[name]).max()


class Layers(nn.Module):
    """Every kind of layer on one input."""

    kinds = {
        "strided": partial(nn.Conv, 6, (3, 3), strides=(2, 2), padding="SAME"),
        "dilated": partial(nn.Conv, 6, (3, 3), kernel_dilation=2, padding="VALID"),
        "explicit": partial(nn.Conv, 6, (3, 2), padding=((2, 0), (1, 1))),
        "grouped": partial(nn.Conv, 6, (3, 3), feature_group_count=2),
        "depthwise": partial(nn.Conv, 8, (3, 3), feature_group_count=4),
        "reflect": partial(nn.Conv, 6, (3, 3), padding="REFLECT"),
        "point": partial(nn.Conv, 6, (1, 1), strides=(2, 2)),
        "spread": partial(nn.Conv, 6, (3, 3), input_dilation=2, padding=(1, 1)),
        "dense": partial(nn.Dense, 6),
        "general": partial(nn.DenseGeneral, (2, 3), axis=(-2, -1)),
    }

    @nn.compact
    def __call__(self, x):
        return {kind: layer(name=kind)(x) for kind, layer in self.kinds.items()}


@pytest.mark.parametrize("init", [CP.init, LoRA.init])
def test_every_kind_of_layer(init):
    model = Layers()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7, 6, 4)), jnp.float32)
    shared, _ = initial(model, x)
    options = {"inputs": 2} if init == LoRA.init else {}
    rules = {
        "general/kernel": partial(init, rank=3, **options),
        ".*/kernel": partial(init, rank=3),
        ".*/bias": Replace.init,
    }
    tasks = {n: task(rules, shared, {}, seed=s) for s, n in enumerate("ab", 1)}
    bank = Bank.of(tasks, shared=shared)
    run = jax.jit(partial(mixed, from_linen(model, eval_options={})))
    found, _ = run(shared, bank.stack, bank.ids([*"abbab"]), {"image": x})
    one = jax.jit(lambda delta: model.apply({"params": materialize(shared, delta)}, x))
    each = {n: one(t.delta) for n, t in tasks.items()}
    for kind in model.kinds:
        rows = [each[n][kind][row] for row, n in enumerate("abbab")]
        expected = np.stack(rows)
        gap = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found[kind], expected, atol=gap, err_msg=kind)
        apart = np.abs(each["a"][kind] - each["b"][kind]).max()
        assert apart > 1e-2 * np.abs(expected).max(), kind


class Shared(nn.Module):
    """Layers of one shape under `nn.jit` and `nn.remat`, and one called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.jit(nn.Dense)(4, name="jit1")(x)
        x = nn.jit(nn.Dense)(4, name="jit2")(jnp.tanh(x))
        x = nn.remat(nn.Dense)(4, name="remat")(jnp.tanh(x))
        twice = nn.Dense(4, name="twice")
        return nn.GroupNorm(2, name="norm")(twice(jnp.tanh(twice(x))))


def test_lifted_and_repeated_layers():
    model, x = Shared(), images(4)[:, :3, :4, 0]
    shared, _ = initial(model, x)
    rules = {"norm/scale": Replace.init, ".*/kernel": partial(CP.init, rank=2)}
    tasks = {n: task(rules, shared, {}, seed=s) for s, n in enumerate("ab", 1)}
    bank = Bank.of(tasks, shared=shared)
    apply = from_linen(model, eval_options={})
    run = jax.jit(partial(mixed, apply))
    found, _ = run(shared, bank.stack, bank.ids([*"abba"]), {"image": x})
    one = jax.jit(lambda delta: model.apply({"params": materialize(shared, delta)}, x))
    each = {n: one(t.delta) for n, t in tasks.items()}
    expected = np.stack([each[n][row] for row, n in enumerate("abba")])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(each["a"] - each["b"]).max() > 1e-2


class Odd(nn.Module):
    """Leaves that no layer reads in a way that is understood."""

    @nn.compact
    def __call__(self, x):
        x = x + self.param("token", nn.initializers.ones, (1, 1, 4))
        w = self.param("kernel", nn.initializers.ones, (4, 4))
        x = nn.Dense(4, name="tied")(x @ w)
        x = x @ self.variables["params"]["tied"]["kernel"]
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.LayerNorm(feature_axes=(-2, -1), reduction_axes=-1, name="norm")(x)
        scanned = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scanned(nn.Dense(4, name="scanned"), x, None)[0]


def test_leaves_that_are_not_understood_are_listed():
    model, x = Odd(), jnp.ones((2, 3, 4))
    shared, _ = initial(model, x)
    rules = {
        "conv/kernel": Replace.init,
        "scanned/kernel": partial(CP.init, rank=1, axes=((0, 1), (2,))),
        ".*/kernel|kernel": partial(CP.init, rank=1),
        ".*": Replace.init,
    }
    bank = Bank.of({"a": task(rules, shared, {}, seed=1)}, shared=shared)
    apply = from_linen(model, eval_options={})
    with pytest.raises(ValueError, match="cannot run a mixed batch") as error:
        mixed(apply, shared, bank.stack, bank.ids(["a", "a"]), {"image": x})
    lines = {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]}
    assert lines == {
        "token",
        "kernel",
        "tied/kernel",
        "conv/kernel",
        "norm/scale",
        "norm/bias",
        "scanned/kernel",
        "scanned/bias",
    }
    assert "no layer that is understood reads it" in str(error.value)


def test_bad_ids_and_batches(case):
    apply, stack = from_linen(case.make()), case.bank.stack
    batch = {"image": case.images}
    for ids in (
        jnp.zeros(3, jnp.int32),
        jnp.zeros(BATCH),
        jnp.zeros((BATCH, 1), int),
        [*"abcabcab"],
    ):
        with pytest.raises(ValueError, match="one integer for each example"):
            mixed(apply, case.shared, stack, ids, batch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    split = jax.device_put(batch, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="'image' is split as .*AxisType.Auto"):
        mixed(apply, case.shared, stack, case.bank.ids([*"abcabcab"]), split)
    for params in ([1], nnx.State({"kernel": nnx.Param(jnp.ones(3))})):
        with pytest.raises(ValueError, match="Flax Linen networks"):
            mixed(apply, params, stack, case.bank.ids([*"abcabcab"]), batch)
