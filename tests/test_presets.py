"""Every method of the shelf on a small network: trained, saved, counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ftn_jax import compact, count, make_delta, materialize, restore_task, save_task
from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.apply import from_linen
from ftn_jax.core import iter_nodes
from ftn_jax.data import Compose, Normalize
from ftn_jax.data.domain import ArraySource
from ftn_jax.method import Backbone, Method, Stage
from ftn_jax.models import RESNETS
from ftn_jax.presets import METHODS, PLACEMENTS, RESNET, fine_tuning, parallel_adapters
from ftn_jax.presets.budget import (
    KNOBS,
    fit_to,
    planned_size,
)
from ftn_jax.sizes import backbone_size, stored_size

pytestmark = pytest.mark.long

OPTIONS = {
    "ftn": {"rank": 2},
    "lora": {"rank": 1},
    "dora": {"rank": 1},
    "factored_adapters": {"rank": 2},
}


class Unit(nn.Module):
    """Convolutions and their norms, named as in our ResNets."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]

    @nn.compact
    def __call__(self, x, train):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            pad = ((1, 1), (1, 1))
            x = nn.Conv(8, (3, 3), padding=pad, use_bias=False, name=conv)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=norm)(x))
        return x


class Net(nn.Module):
    """A stem and two blocks."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = Unit(("conv",), ("bn",), name="stem")(x, train)
        for name in ("layer1_0", "layer2_0"):
            x = Unit(("conv1", "conv2"), ("bn1", "bn2"), name=name)(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = rng.integers(0, 120, (32, 6, 6, 3))
    images[labels == 1, ::2] += 120
    return ArraySource(images.astype(np.uint8), labels)


@pytest.fixture(scope="module")
def backbone(source):
    model = Net()
    images = jnp.asarray(source.images, jnp.float32) / 255
    variables = model.init(jax.random.key(0), images)
    # Statistics of such images, as a pretrained network has them.
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    for _ in range(30):
        _, stats = step(variables, (images - 0.4) / 0.2)
        variables = {**variables, **stats}
    return Backbone(
        lambda classes: from_linen(model.clone(num_classes=classes)),
        variables["params"],
        {"batch_stats": variables["batch_stats"]},
        RESNET,
    )


NORMALIZE = Compose((Normalize((0.4,) * 3, (0.2,) * 3),))
RATES = {
    "norm": 0.1,
    "head": 0.1,
    "factors": 1e-2,
    "masks": 1e-2,
    "adapters": 0.1,
    "weights": 0.05,
}


def adaptation(backbone, method, source, epochs=6):
    made = make_delta(
        jax.random.key(0), backbone.shared, method.rules_for(backbone.shared)
    )
    rates = {g: RATES[g] for g in count(made).by_group}
    recipe = Recipe(epochs=epochs, batch_size=8, rates=rates)
    return Adaptation(backbone, method, recipe, source, transform=NORMALIZE)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_its_task_file_gives_the_same_network(
    name, backbone, source, tmp_path
):
    method = METHODS[name](RESNET, classes=2, **OPTIONS.get(name, {}))
    before = jax.tree.map(np.array, backbone.shared)
    if method.prepare:
        backbone = method.prepare(backbone)
    run = adaptation(backbone, method, source)
    evaluator = Evaluator(backbone, classes=2, transform=NORMALIZE)
    start = evaluator.score(run.start(0).task, source)
    state = run.run(0)
    trained = evaluator.score(state.task, source)
    assert trained["loss"] < 0.97 * start["loss"], name
    assert METHODS[name].__doc__ and "Source:" in METHODS[name].__doc__

    small = compact(state.task.delta)
    kept = materialize(backbone.shared, small)
    jax.tree.map(
        np.testing.assert_array_equal,
        kept,
        materialize(backbone.shared, state.task.delta),
    )
    save_task(tmp_path, run.start(0).task, shared=backbone.shared, name="start")
    save_task(
        tmp_path,
        type(state.task)(small, state.task.model_state),
        shared=backbone.shared,
        name=name,
    )
    found = restore_task(tmp_path, backbone.shared)
    jax.tree.map(
        np.testing.assert_array_equal,
        kept,
        materialize(backbone.shared, found.task.delta),
    )
    params = getattr(backbone.shared, "params", backbone.shared)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    if method.after:
        following = method.after(backbone, small)
        again = adaptation(following, method, source).run(0)
        jax.tree.map(
            np.testing.assert_array_equal,
            kept,
            materialize(following.shared, small),
        )
        later = materialize(following.shared, compact(again.task.delta))
        assert not np.array_equal(
            later["stem"]["conv"]["kernel"], kept["stem"]["conv"]["kernel"]
        )


def test_stages_change_the_delta_between_them(backbone, source):
    seen = []

    def change(delta):
        seen.append({type(n).__name__ for _, n in iter_nodes(delta)})
        return delta

    method = fine_tuning(RESNET, classes=2)._replace(
        stages=(Stage(0.5), Stage(0.25, change=change), Stage(0.25, 0.1, change))
    )
    adaptation(backbone, method, source).run(0)
    assert seen == [{"Replace"}] * 2
    with pytest.raises(ValueError, match=r"add up to 1, found \[0.5\]"):
        adaptation(backbone, method._replace(stages=(Stage(0.5),)), source)
    with pytest.raises(ValueError, match="4 steps are too few for"):
        short = (Stage(0.1), Stage(0.9))
        adaptation(backbone, method._replace(stages=short), source, epochs=1)


def test_a_run_of_two_stages_goes_on_where_it_stopped(backbone, source, tmp_path):
    from ftn_jax.resume import StateFolder

    method = METHODS["svd_adapters"](RESNET, classes=2, rank=2)
    run = adaptation(backbone, method, source)
    whole = run.run(0)

    class Stop(Exception):
        pass

    def interrupt(step, means):  # logged at the end of each stage
        if step == run.steps:
            raise Stop

    folder = StateFolder(tmp_path / "state")
    with pytest.raises(Stop):
        run.run(0, folder=folder, on_log=interrupt)
    found = run.run(0, folder=folder)
    jax.tree.map(np.testing.assert_array_equal, found.task, whole.task)


def test_the_penalty_sees_how_much_is_done(backbone, source):
    seen = []

    def penalty(delta, done):
        jax.debug.callback(lambda x: seen.append(float(x)), done)
        return 0.0 * delta["head"]["bias"].value.sum()

    method = fine_tuning(RESNET, classes=2)._replace(
        penalty=penalty, stages=(Stage(0.5), Stage(0.5))
    )
    adaptation(backbone, method, source, epochs=2).run(0)
    jax.effects_barrier()
    assert sorted({*seen}) == pytest.approx([n / 8 for n in range(8)])


@pytest.mark.parametrize("name", KNOBS)
def test_a_size_fits_its_budget(name, backbone):
    whole = backbone_size(backbone)
    knob = KNOBS[name]

    def size(value):
        method = METHODS[name](RESNET, classes=2, **{knob.name: value})
        return planned_size(backbone, method)

    sizes = []
    for value in knob.values[:12]:
        try:
            sizes.append(size(value))
        except ValueError:  # more than a small layer takes
            break
    for share in (0.25, 0.4):
        found = fit_to(backbone, METHODS[name], name=name, share=share)[knob.name]
        errors = [abs(n - share * whole) for n in sizes]
        assert knob.values.index(found) == errors.index(min(errors))
    with pytest.raises(ValueError, match=f"{name} at its smallest.*Raise the budget"):
        fit_to(backbone, METHODS[name], name=name, share=1e-4)


def shapes(name, **options):
    model = RESNETS[name](**options)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def plan(method, shared):
    rules = method.rules_for(shared)
    make = partial(make_delta, rules=rules)
    return jax.eval_shape(make, jax.random.key(0), shared)


@pytest.mark.parametrize(
    ("placement", "params"),
    [
        ("all", 645_216),
        ("early", 30_720),
        ("mid", 122_880),
        ("late", 491_520),
    ],
)
def test_adapters_of_resnet26_are_counted_as_published(placement, params):
    """Rebuffi et al. (arXiv 1803.10082): 1/9 of the 3x3 kernels."""
    method = parallel_adapters(RESNET, classes=10, placement=placement)
    groups = count(plan(method, shapes("resnet26"))).by_group
    assert groups["adapters"] == params


def test_placements_are_those_of_the_paper():
    assert set(PLACEMENTS) == {"all", "early", "mid", "late", "half"}
    shared = shapes("resnet26")
    half = parallel_adapters(RESNET, classes=10, placement="half")
    nodes = [p for p, n in iter_nodes(plan(half, shared)) if n.group == "adapters"]
    assert len(nodes) == 12 and all("/conv2/" in p for p in nodes)


def test_a_method_for_a_network_without_what_it_needs_is_refused():
    from ftn_jax.method import Layers

    dense = {"a": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
    layers = Layers("a/kernel", None, "head/kernel")
    method = parallel_adapters(layers, classes=2)
    with pytest.raises(ValueError, match="no leaf fits"):
        make_delta(jax.random.key(0), dense, method.rules_for(dense))
    with pytest.raises(ValueError, match="ssf scales the norms"):
        METHODS["ssf"](layers, classes=2)


def test_stored_size_counts_bits_as_a_32nd():
    from ftn_jax.nodes import Piggyback

    node = Piggyback.init(jax.random.key(0), jnp.ones((64, 32)))
    node = node.replace(mask=node.mask.at[0].set(0.0))
    assert stored_size({"w": node}) == 2048
    assert stored_size(compact({"w": node})) == 64
    assert isinstance(METHODS["piggyback"](RESNET, classes=2), Method)
