"""`ftn`: every command, on a real network's task and on files of earlier formats."""

import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_tasks import flat
from safetensors.numpy import load_file, save_file
from saved import tensors_of

from ftn_jax import Task, make_delta, materialize, restore_task, save_task, tool
from ftn_jax.models import RESNETS
from ftn_jax.nodes import CP, Replace
from ftn_jax.pretrained import export_resnet

RULES = {
    r"layer.*conv\d/kernel": partial(CP.init, rank=2, init="xavier"),
    r".*bn\d*/(scale|bias)": Replace.init,
    "head/kernel": partial(Replace.init, group="head", shape=(..., 3)),
    "head/bias": partial(Replace.init, group="head", shape=(3,)),
}
MODEL = RESNETS["cifar_resnet8"]()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a backbone's checkpoint and two of its tasks."""
    place = tmp_path_factory.mktemp("tool")
    image = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.1, 1, s.shape), s.dtype), shapes
    )
    shared, stats = variables["params"], variables["batch_stats"]
    save_file(export_resnet(shared, stats, MODEL), place / "base.safetensors")
    for n, name in enumerate(("one", "two")):
        delta = make_delta(jax.random.key(n), shared, RULES)
        state = jax.tree.map(lambda x, n=n: x + n, stats)
        save_task(
            place / name,
            Task(delta, {"batch_stats": state}),
            shared=shared,
            name=name,
            class_names=("ash", "beech", "oak"),
        )
    return place


def run(*args):
    return tool.main([*map(str, args)])


def base(place):
    return "--weights", place / "base.safetensors", "--backbone", "cifar_resnet8"


def shared_of(place):
    from ftn_jax.export import load_backbone

    path = place / "base.safetensors"
    return load_backbone(path, name="cifar_resnet8", classes=None).params


def test_inspect(place, capsys):
    assert run("inspect", place / "one") == 0
    told = capsys.readouterr().out
    assert "one: " in told and "layer1_0/conv1/kernel" in told and "CP" in told
    assert run("inspect", place / "one", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class_names"] == ["ash", "beech", "oak"]
    assert found["parameters"] == sum(n["parameters"] for n in found["nodes"])
    assert found["by_group"]["head"] == 64 * 3 + 3


def test_verify(place, tmp_path, capsys):
    assert run("verify", place / "one", place / "two", *base(place)) == 0
    assert run("verify", place / "one") == 0
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", place / "one", broken], check=True)
    content = tensors_of(broken).read_bytes()
    tensors_of(broken).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert run("verify", place / "one", broken) == 1
    told = capsys.readouterr()
    assert f"{place / 'one'}: whole" in told.out and "is damaged" in told.err


@pytest.mark.parametrize("naming", ["safetensors", "flax", "torchvision"])
def test_merge_writes_the_network_that_the_task_runs_with(place, tmp_path, naming):
    out = tmp_path / "whole.safetensors"
    assert run("merge", place / "one", out, *base(place), "--naming", naming) == 0
    shared = shared_of(place)
    saved = restore_task(place / "one", shared)
    expected = {
        "params": materialize(shared, saved.task.delta),
        "batch_stats": saved.task.model_state["batch_stats"],
    }
    model = MODEL.clone(num_classes=3)
    if naming == "flax":
        from flax.serialization import from_bytes

        found = from_bytes(expected, out.read_bytes())
        chex.assert_trees_all_equal(found, expected)
    elif naming == "safetensors":
        chex.assert_trees_all_equal(load_file(out), flat(expected))
    else:
        from ftn_jax.pretrained import load_resnet

        found = load_resnet(out, model)
        chex.assert_trees_all_equal(found._asdict(), expected)
    # The negative control: the task moved the backbone's weights.
    name = "layer1_0"
    moved = (
        expected["params"][name]["conv1"]["kernel"] - shared[name]["conv1"]["kernel"]
    )
    assert np.abs(moved).max() > 1e-3


def test_a_merged_file_is_a_backbone_again(place, tmp_path):
    out = tmp_path / "whole.safetensors"
    run("merge", place / "one", out, *base(place))
    assert run("merge", place / "two", tmp_path / "x", "--weights", out) == 2
    save_task(
        tmp_path / "own",
        Task({"params": None}, {}),
        shared={"params": jnp.ones(2)},
        name="own",
    )
    assert run("verify", tmp_path / "own", "--weights", out) == 1


def test_diff(place, capsys):
    assert run("diff", place / "one", place / "one") == 0
    assert run("diff", place / "one", place / "two") == 1
    told = capsys.readouterr().out
    assert "the same" in told and "name: 'one' and 'two'" in told
    assert "layer1_0/conv1/kernel: values, by up to" in told
    assert "model_state batch_stats/" in told


def test_sum_adds_updates(place, tmp_path, capsys):
    out = tmp_path / "sum"
    both = (place / "one", place / "two")
    code = run("sum", *both, "--out", out, "--weights", 0.5, -2, "--take", 1)
    assert code == 0
    shared = shared_of(place)
    one, two, total = (restore_task(path, shared).task for path in (*both, out))
    room = lambda t: materialize(shared, t.delta)["layer2_0"]["conv1"]["kernel"]  # noqa: E731
    w = shared["layer2_0"]["conv1"]["kernel"]
    expected = w + 0.5 * (room(one) - w) - 2 * (room(two) - w)
    np.testing.assert_allclose(room(total), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - w).max() > 1e-2
    chex.assert_trees_all_equal(total.model_state, two.model_state)
    assert run("sum", *both, "--out", out, "--weights", 1) == 2
    assert run("sum", *both, "--out", out, "--rank", 1) == 0
    assert "of the update lost" in capsys.readouterr().out
    low = restore_task(out, shared).task.delta["layer2_0"]["conv1"]["kernel"]
    assert low.rank == 1 < total.delta["layer2_0"]["conv1"]["kernel"].rank == 4


def test_prune(place, tmp_path, capsys):
    out = tmp_path / "pruned"
    assert run("prune", place / "one", "--drop", "layer1_.*/kernel", "--out", out) == 0
    shared = shared_of(place)
    params = materialize(shared, restore_task(out, shared).task.delta)
    for layer, same in (("layer1_0", True), ("layer2_0", False)):
        kernels = [t[layer]["conv1"]["kernel"] for t in (params, shared)]
        assert np.array_equal(*kernels) is same
    assert run("prune", place / "one", "--drop", "nothing", "--out", out) == 2
    assert run("prune", place / "one", "--drop", "head/bias", "--out", out) == 2
    assert run("prune", place / "one", "--drop", "head/(", "--out", out) == 2
    told = capsys.readouterr().err
    assert "'head/(' is no regular expression: missing )" in told
    assert "'nothing' matches none" in told and "has no hash of them" in told


def test_convert(place, tmp_path):
    out = tmp_path / "low"
    assert run("convert", place / "one", out, *base(place), "--dtype", "bfloat16") == 0
    shared = shared_of(place)
    task = restore_task(out, shared).task
    assert {x.dtype for x in jax.tree.leaves(task.delta)} == {jnp.dtype("bfloat16")}


def test_bad_input_is_said_in_a_line(place, tmp_path, capsys):
    assert run("inspect", tmp_path / "nowhere") == 2
    pth = tmp_path / "base.pth"
    pth.write_bytes(pickle.dumps({"conv": Payload(tmp_path / "executed")}))
    weights = ("--weights", pth, "--backbone", "cifar_resnet8")
    assert run("merge", place / "one", tmp_path / "out", *weights) == 2
    told = capsys.readouterr().err
    assert "nowhere holds no task" in told
    assert "base.pth: " in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()
    pickle.loads(pth.read_bytes())  # the payload was a live one
    assert (tmp_path / "executed").exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_module_is_the_command(place):
    done = subprocess.run(
        [sys.executable, "-m", "ftn_jax", "inspect", place / "one"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ,
    )
    assert done.returncode == 0 and "one: " in done.stdout, done.stderr
