"""Many runs of one program are what each of them is alone."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.factored import Factored
from ftn_jax.fit import fit
from ftn_jax.nodes import CP, LoRA, Replace
from ftn_jax.nodes.scale import Scale
from ftn_jax.resume import StateFolder
from ftn_jax.runs import Together, cut, fill, own_classes

pytestmark = pytest.mark.long

STEPS, PEAKS = 3, {"factors": 1e-2, "norm": 1e-1, "head": 1e-1}


class Net(nn.Module):
    classes: int = 5

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.Dense(self.classes, name="head")(nn.relu(x).mean((1, 2)))


def batch(seed, classes=5, n=8):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(n, 6, 6, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, classes, n)),
        "classes": jnp.int32(classes),
    }


VARIABLES = Net().init(jax.random.key(0), batch(0)["image"])
SHARED, STATS = VARIABLES["params"], {"batch_stats": VARIABLES["batch_stats"]}


def delta_of(rank, seed=0, classes=5, node=CP):
    rules = {
        "conv/kernel": partial(node.init, rank=rank),
        "bn/.*": Replace.init,
        "head/.*": partial(Replace.init, group="head", shape=(..., classes)),
    }
    return make_delta(jax.random.key(seed), SHARED, rules)


def optimizer(peaks=PEAKS):
    decay = {"factors": 1e-3, "head": 1e-3}
    return make_optimizer(peaks, steps=10, weight_decay=decay, clip_norm=10.0)


def state_of(delta, seed=0, tx=None):
    return TaskState.create(
        delta, STATS, tx=tx or optimizer(), key=jax.random.key(seed)
    )


def stepper(classes=5, tx=None, **options):
    apply = from_linen(Net(classes))
    return make_train_step(apply, tx or optimizer(), loss=own_classes, **options)


# Eight runs: (rank, seed, classes, factors' rate).
EIGHT = [(1 + n % 3, n, 5 if n % 2 else 3, 1e-2 * (1 + n)) for n in range(8)]


@pytest.fixture(scope="module")
def alone():
    """Each of the eight by itself, with shapes and rates of its own."""
    ends = []
    for rank, seed, classes, rate in EIGHT:
        tx = optimizer({**PEAKS, "factors": rate})
        step = jax.jit(stepper(classes, tx))
        state = state_of(delta_of(rank, seed, classes), tx=tx)
        for t in range(STEPS):
            state, _ = step(SHARED, state, batch((seed, t), classes))
        ends.append(state.task)
    return ends


def together_of(form, deltas, **options):
    together = Together(stepper(**options), form=form)
    filled = fill(deltas)
    runs = together.begin(
        state_of(delta, tx=optimizer({**PEAKS, "factors": rate}))
        for delta, (*_, rate) in zip(filled, EIGHT, strict=True)
    )
    for t in range(STEPS):
        batches = [batch((seed, t), classes) for _, seed, classes, _ in EIGHT]
        runs, sums = together(SHARED, runs, batches)
    return runs, sums


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


@pytest.mark.parametrize(
    ("form", "options"),
    [("loop", {}), ("vmap", {}), ("vmap", {"forward": Factored(choose="branch")})],
    ids=["loop", "vmap", "vmap beside"],
)
def test_eight_runs_in_one_program_are_eight_separate_ones(alone, form, options):
    deltas = [delta_of(rank, seed, classes) for rank, seed, classes, _ in EIGHT]
    runs, sums = together_of(form, deltas, **options)
    assert int(runs.step) == STEPS and float(sums["count"]) == 8 * 8
    assert (
        len({int(n.value.shape[-1]) for d in deltas for n in [d["head"]["bias"]]}) == 2
    )
    for state, delta, expected in zip(runs.unstack(), deltas, alone, strict=True):
        found = cut(state.task.delta, delta)
        assert distance(found, expected.delta) < 1e-5
        assert distance(state.task.model_state, expected.model_state) < 1e-5
        # What was filled up never moved: exactly inert.
        (full,) = {f.shape[-1] for f in state.task.delta["conv"]["kernel"].factors}
        rank = delta["conv"]["kernel"].rank
        assert full == 3
        for f in state.task.delta["conv"]["kernel"].factors:
            assert not f[:, rank:].any() and f[:, :rank].all()
    others = [*alone[1:], alone[0]]  # control: they are not all alike
    assert all(
        distance(a.model_state, b.model_state) > 1e-3
        for a, b in zip(alone, others, strict=True)
    )


def test_a_term_that_is_not_zero_is_not_inert():
    (small, _) = fill([delta_of(1), delta_of(2)])
    node = small["conv"]["kernel"]
    loud = node.replace(factors=tuple(f.at[:, 1].set(0.3) for f in node.factors))
    step = jax.jit(stepper())
    ends = [
        step(SHARED, state_of({**small, "conv": {"kernel": n}}), batch(0))[0]
        for n in (node, loud)
    ]
    moved = [end.task.delta["conv"]["kernel"].factors[-1][:, 1] for end in ends]
    assert not moved[0].any() and jnp.abs(moved[1] - 0.3).min() > 1e-3


def test_lora_is_filled_up_along_both_its_matrices():
    small, large = (delta_of(rank, node=LoRA) for rank in (1, 3))
    filled, same = fill([small, large])
    assert filled["conv"]["kernel"].a.shape == large["conv"]["kernel"].a.shape
    chex.assert_trees_all_equal(same, large)
    chex.assert_trees_all_equal(cut(filled, small), small)
    w = SHARED["conv"]["kernel"]
    loud = jax.tree.map(lambda x: x + 1.0, small)
    merged = [d["conv"]["kernel"].merge(w) for d in (loud, fill([loud, large])[0])]
    np.testing.assert_allclose(*merged, rtol=1e-6)


def test_what_cannot_be_filled_up_is_refused():
    with pytest.raises(ValueError, match="delta 1 has other nodes"):
        fill([delta_of(1), delta_of(1, node=LoRA)])
    shapes = [{"w": Scale(jnp.ones(n), None)} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"w: the runs' Scale nodes .*zeros cannot"):
        fill(shapes)
    # A term of one factor moves from zero.
    biases = [{"b": CP.init(jax.random.key(0), jnp.ones(4), rank=r)} for r in (1, 2)]
    with pytest.raises(ValueError, match="b: the runs' CP nodes .*zeros cannot"):
        fill(biases)
    with pytest.raises(ValueError, match="one run or more"):
        Together(stepper()).begin([])
    assert fill(2 * [{"w": None}]) == 2 * [{"w": None}]
    with pytest.raises(ValueError, match="run 1 has another structure.*fill"):
        Together(stepper()).begin([state_of(delta_of(1)), state_of(delta_of(2))])


def test_other_ranks_rates_and_classes_are_the_same_program():
    traces = []

    def counted(*args):
        traces.append(1)
        return stepper()(*args)

    together = Together(counted)
    for rank, classes, rate in ((1, 3, 0.1), (3, 5, 0.01)):
        *filled, _ = fill([delta_of(rank, 0, classes), delta_of(3)])
        tx = optimizer({**PEAKS, "factors": rate})
        runs = together.begin([state_of(filled[0], tx=tx)])
        together(SHARED, runs, [batch(0, classes)])
    assert len(traces) == 1


@pytest.mark.parametrize("form", ["loop", "vmap"])
def test_a_run_that_fails_does_not_stop_the_others(form):
    together = Together(stepper(), form=form, feeds=[0, 1, 0])
    runs = together.begin(state_of(delta_of(2, seed)) for seed in range(3))
    bad = {**batch(1), "image": jnp.full((8, 6, 6, 3), jnp.nan)}
    runs, sums = together(SHARED, runs, [batch(0), bad])
    assert [bool(s.finite) for s in runs.unstack()] == [True, False, True]
    assert float(sums["count"]) == 16 and np.isfinite(sums["loss"])
    assert runs.finite and not sums["nonfinite"]
    with pytest.raises(ValueError, match="found 1 batches for 3 runs"):
        together(SHARED, runs, [batch(0)])
    with pytest.raises(ValueError, match="found 4 batches for 3 runs.*one for each"):
        Together(stepper(), form=form)(SHARED, runs, 4 * [batch(0)])
    runs, sums = together(SHARED, runs, [bad, bad])
    assert not runs.finite and sums["nonfinite"]


def test_runs_are_fitted_saved_and_go_on(tmp_path):
    together = Together(stepper(), form="loop")

    def begin():
        return together.begin(state_of(delta_of(2, seed)) for seed in range(2))

    def batches(start):
        return ([batch((n, s)) for s in range(2)] for n in range(start, 9))

    whole = fit(together, SHARED, begin(), batches, steps=4)
    folder = StateFolder(tmp_path / "state")
    folder.save(fit(together, SHARED, begin(), batches, steps=2), wait=True)
    back = folder.restore(begin())
    assert back is not None and int(back.step) == 2
    chex.assert_trees_all_equal(
        fit(together, SHARED, back, batches, steps=4).unstack()[1].task,
        whole.unstack()[1].task,
    )
