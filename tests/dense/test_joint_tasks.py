"""Dense tasks on one backbone: every method, and all tasks in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.core import count, make_delta, materialize
from ftn_jax.data import Compose, Normalize
from ftn_jax.data.joint import JointCrop, JointPad
from ftn_jax.data.scenes import scenes
from ftn_jax.dense import JointTasks, depth, normals
from ftn_jax.dense.network import dense_backbone
from ftn_jax.method import Backbone
from ftn_jax.models import ResNet, resnet18
from ftn_jax.models.deeplab import DeepLab
from ftn_jax.presets import METHODS, RESNET, bn_head, fine_tuning, ftn
from ftn_jax.presets.budget import plan
from ftn_jax.presets.dense import decoder_only, dense_layers
from ftn_jax.train import Task

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def network():
    model = ResNet((1, 1), num_classes=3, width=8, stem="3x3")

    def make(outputs):
        options = {"high": "layer2", "width": 8, "low_width": 4, "rates": (2,)}
        return DeepLab(model, outputs, **options)

    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return dense_backbone(make, variables, RESNET)


def task(network, method, seed=0):
    shared = network.backbone.shared
    delta = make_delta(jax.random.key(seed), shared, method.rules_for(shared))
    return Task(delta, network.backbone.model_state)


def shaken(found, seed):
    """Move every array, so that outputs are far from zero."""
    leaves, treedef = jax.tree.flatten(found.delta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return Task(treedef.unflatten(moved), found.model_state)


@pytest.mark.parametrize(
    "name", ["bn_head", "ftn", "fine_tuning", "series_adapters", "rcm", "lora"]
)
def test_presets_make_a_decoder_for_each_task(network, name):
    layers, shared = network.backbone.layers, network.backbone.shared
    options = {"rank": 2} if name in ("ftn", "lora") else {}
    method = METHODS[name](layers, classes=3, **options)
    backbone = method.prepare(network.backbone) if method.prepare else network.backbone
    delta = make_delta(
        jax.random.key(0), backbone.shared, method.rules_for(backbone.shared)
    )
    sizes = count(delta).by_group
    decoder = sum(x.size for x in jax.tree.leaves(shared["decoder"]))
    assert sizes["head"] == decoder + 2 * 9  # two more outputs of 8 inputs and a bias
    params = materialize(backbone.shared, delta)
    assert params["decoder"]["out"]["kernel"].shape == (1, 1, 8, 3)
    assert np.std(params["decoder"]["refine1"]["conv"]["kernel"]) == pytest.approx(
        0.01, rel=0.2
    )
    assert (params["decoder"]["low"]["bn"]["scale"] == 1).all()


@pytest.fixture(scope="module")
def data():
    return scenes(8, size=(16, 24)), Compose((JointPad(16, 24), Normalize()))


def adaptation(network, data, method, **options):
    rates = {"head": 5e-2, "norm": 1e-2, "factors": 5e-3, "weights": 1e-3}
    recipe = Recipe(epochs=20, batch_size=4, rates=rates, adam=("factors", "head"))
    random = Compose((JointCrop(16, 24), Normalize()))
    return Adaptation(
        options.pop("backbone", network.backbone),
        method,
        recipe,
        data[0],
        transform=random,
        **options,
    )


def test_a_decoder_alone_trains_and_the_backbone_keeps_its_statistics(network, data):
    layers, backbone = network.backbone.layers, network.backbone
    method = decoder_only(layers, classes=1, frozen=network.frozen)
    measure = depth(metric="rmse")
    evaluator = Evaluator(
        backbone, classes=1, transform=data[1], batch_size=4, measure=measure
    )
    run = adaptation(
        network, data, method, backbone=method.prepare(backbone), measure=measure
    )
    start = evaluator.score(run.start(0).task, data[0])
    state = run.run(0)
    end = evaluator.score(state.task, data[0])
    assert end["rmse"] < 0.7 * start["rmse"]
    old = backbone.model_state["batch_stats"]
    new = state.task.model_state["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, new["backbone"], old["backbone"])
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), new["decoder"], old["decoder"]
    )
    assert all(jax.tree.leaves(moved))
    # With its own norms the statistics of the backbone move too.
    own = adaptation(network, data, bn_head(layers, classes=1), measure=measure)
    moved = own.run(0).task.model_state["batch_stats"]["backbone"]
    assert not np.array_equal(
        jax.tree.leaves(moved)[0], jax.tree.leaves(old["backbone"])[0]
    )


def test_all_tasks_in_one_program_give_what_separate_passes_give(network, data):
    layers = network.backbone.layers
    image = jnp.asarray(data[0].images[:2], jnp.float32) / 255
    make = {
        "depth": (ftn(layers, classes=1, rank=2), 1),
        "normals": (bn_head(layers, classes=3), 2),
    }
    tasks = {n: shaken(task(network, m), seed) for n, (m, seed) in make.items()}
    applies = {n: network.backbone.network(make[n][0].classes) for n in make}
    joint = JointTasks(applies, network.backbone.shared, tasks)
    outputs = joint({"image": image})
    for name, own in tasks.items():
        params = materialize(network.backbone.shared, own.delta)
        alone, _ = applies[name](params, own.model_state, {"image": image}, train=False)
        largest = np.abs(alone).max()
        np.testing.assert_allclose(outputs[name], alone, atol=1e-5 * largest)
        assert largest > 1e-2
    assert outputs["depth"].shape[-1] == 1 and outputs["normals"].shape[-1] == 3
    with pytest.raises(ValueError, match="expected the same names"):
        JointTasks(applies, network.backbone.shared, {})


def test_equal_parts_are_computed_once(network, data):
    """Decoders alone share the whole backbone; own networks share nothing."""
    layers, shared = network.backbone.layers, network.backbone.shared
    batch = {"image": jnp.asarray(data[0].images[:2], jnp.float32)}

    def share(method, change):
        tasks = {n: task(network, method, seed) for seed, n in enumerate("abcd")}
        tasks = {n: change(t, i) for i, (n, t) in enumerate(tasks.items())}
        applies = dict.fromkeys(tasks, network.backbone.network(1))
        four = JointTasks(applies, shared, tasks).flops(batch)
        one = JointTasks({"a": applies["a"]}, shared, {"a": tasks["a"]}).flops(batch)
        return four / (4 * one)

    alone = decoder_only(layers, classes=1, frozen=network.frozen)
    decoders = share(alone, shaken)
    separate = share(fine_tuning(layers, classes=1), shaken)
    assert separate == pytest.approx(1, abs=0.01)
    assert decoders < 0.75


def test_the_published_parameters_of_four_tasks():
    """Table 3 of FTN, in millions, decoders and the shortcuts' norms left out."""
    model, image = resnet18(), jnp.zeros((1, 64, 64, 3))
    net = DeepLab(model, 41)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    layers = dense_layers(RESNET)
    backbone = Backbone(lambda n: None, shapes, {}, layers)
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["backbone"])
        if leaf.ndim == 4
    )
    assert kernels == 11_166_912
    for rank, printed in ((1, 11.23), (10, 11.54), (20, 11.89), (30, 12.24)):
        groups = count(plan(backbone, ftn(layers, classes=41, rank=rank))).by_group
        assert groups == {
            "factors": rank * 8_723,
            "norm": 9_600,
            "head": 5_436_809,
        }
        without_shortcuts = groups["norm"] - 1_792
        total = kernels + 4 * (groups["factors"] + without_shortcuts)
        assert total // 10_000 / 100 == printed  # they truncate


def test_a_backbone_of_another_shape_is_refused(network):
    model = resnet18(width=8)
    image = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    with pytest.raises(ValueError, match=r"bn1/bias: found \(8,\), expected \(64,\)"):
        dense_backbone(lambda n: DeepLab(resnet18(), n), variables, RESNET)


def test_normals_train(network, data):
    method = ftn(network.backbone.layers, classes=3, rank=2)
    measure = normals()
    run = adaptation(network, data, method, measure=measure)
    evaluator = Evaluator(
        network.backbone, classes=3, transform=data[1], batch_size=4, measure=measure
    )
    start = evaluator.score(run.start(0).task, data[0])["mean_angle"]
    assert evaluator.score(run.run(0).task, data[0])["mean_angle"] < 0.8 * start
