"""Latent Tucker: which kernels make a stack, filling it up, and cutting it."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from weights import weight

from ftn_jax import extend, make_delta, materialize
from ftn_jax.nodes.tucker import orthogonality
from ftn_jax.nodes.tucker_core import tucker_cores, tucker_groups, tucker_rules

from .convolution import draw, gap
from .stages import PATTERN, network, perturbed


@pytest.fixture(scope="module")
def shared():
    return network()


def test_groups_follow_numbers_not_letters():
    tree = network(dict.fromkeys([f"layer1_{b}" for b in range(11)], (1, 1, 2, 2)))
    found = tucker_groups(tree, PATTERN)
    assert found == {
        "layer1": [[f"layer1_{b}/conv{c}/kernel" for c in (1, 2)] for b in range(11)]
    }
    core = tucker_cores(tree, found)["layer1"]["core"]
    assert core.shape == (11, 2, 1, 1, 2, 2)
    np.testing.assert_array_equal(core[10, 1], tree["layer1_10"]["conv2"]["kernel"])


# Narrower kernels -----------------------------------------------------------------


def test_narrower_kernels_are_filled_up(key):
    shared = network({"layer1_0": (3, 3, 4, 4), "layer1_1": (3, 3, 4, 4)})
    shared["layer1_0"]["conv1"]["kernel"] = jnp.asarray(draw(3, 3, 2, 4, seed=9))
    found = tucker_groups(shared, PATTERN)
    with pytest.raises(ValueError, match=r"^layer1: .*conv1/kernel.*\(3, 3, 2, 4\)"):
        tucker_cores(shared, found)
    cores = tucker_cores(shared, found, pad=True)
    core = np.asarray(cores["layer1"]["core"])
    assert not core[0, 0, :, :, 2:].any() and core[0, 0, :, :, :2].any()
    extended = extend(shared, tucker=cores)
    delta = make_delta(key, extended, tucker_rules(found, cores))
    chex.assert_trees_all_equal(materialize(extended, delta), shared)
    merged = materialize(extended, perturbed(delta))["layer1_0"]["conv1"]["kernel"]
    assert merged.shape == (3, 3, 2, 4) and gap(merged, core[0, 0, :, :, :2]) > 1e-2
    wide = {"a": jnp.ones((3, 3, 4, 4)), "b": jnp.ones((1, 1, 4, 4))}
    with pytest.raises(ValueError, match=r"^g: kernels of one shape.*\(1, 1, 4, 4\)"):
        tucker_cores(wide, {"g": [["a", "b"]]}, pad=True)


# Cutting the core -----------------------------------------------------------------


def test_cutting_at_full_rank_keeps_the_base(shared, key):
    found = tucker_groups(shared, PATTERN)
    cores = tucker_cores(shared, found, ranks=(1.0,) * 6)
    assert {*cores["layer2"]} == {"core", *(f"source_{i}" for i in range(6))}
    extended = extend(shared, tucker=cores)
    delta = make_delta(key, extended, tucker_rules(found, cores))
    chex.assert_trees_all_close(materialize(extended, delta), shared, atol=1e-5)
    assert float(orthogonality(delta)) < 1e-9


def test_cutting_changes_the_base_by_what_it_leaves_out(shared, key):
    found = tucker_groups(shared, PATTERN)
    cores = tucker_cores(shared, found, ranks=(None, None, None, None, 2, 0.5))
    assert cores["layer1"]["core"].shape == (3, 2, 3, 3, 2, 2)
    assert cores["layer2"]["core"].shape == (2, 2, 3, 3, 2, 4)
    assert {*cores["layer2"]} == {"core", "source_4", "source_5"}
    extended = extend(shared, tucker=cores)
    delta = make_delta(key, extended, tucker_rules(found, cores))
    params = materialize(extended, delta)
    stack = np.asarray(tucker_cores(shared, found)["layer2"]["core"], np.float64)
    best = stack
    for axis, k in ((4, 2), (5, 4)):
        rows = np.moveaxis(stack, axis, 0).reshape(8, -1)
        u = np.linalg.svd(rows, full_matrices=False)[0][:, :k]
        best = np.moveaxis(np.tensordot(u @ u.T, best, (1, axis)), 0, axis)
    for b, block in enumerate(found["layer2"]):
        for c, path in enumerate(block):
            name, conv_name, _ = path.split("/")
            assert gap(params[name][conv_name]["kernel"], best[b, c]) < 1e-5
            assert gap(stack[b, c], best[b, c]) > 1e-1
    own = delta["layer2_0"]["conv1"]["kernel"].factors
    assert [f.shape for f in own[4:]] == [(8, 2), (8, 4)]
    assert own[4].unsafe_buffer_pointer() != (
        cores["layer2"]["source_4"].unsafe_buffer_pointer()
    )


def test_groups_refuse(shared):
    with pytest.raises(ValueError, match=r"none named \['conv', 'label'\]"):
        tucker_groups(shared, r"layer1_(?P<block>\d)/.*")
    with pytest.raises(ValueError, match="matches no path.*has the leaves"):
        tucker_groups(shared, PATTERN.replace("kernel", "kernal"))
    with pytest.raises(ValueError, match="conv1/kernel and layer1_0/conv2/kernel one"):
        tucker_groups(shared, PATTERN.replace(r"conv(?P<conv>\d)", "(?P<conv>conv).*"))
    ragged = {k: dict(v) for k, v in shared.items()}
    del ragged["layer1_2"]["conv2"]
    with pytest.raises(ValueError, match=r"^layer1: every block .*'2': \['1'\]"):
        tucker_groups(ragged, PATTERN)


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ([], {}, r"same number of convs, found \[\]"),
        ([["a"], ["a", "b"]], {}, r"same number of convs, found \[1, 2\]"),
        ([["a", "z"]], {}, r"found no \['z'\] in shared.*\[a, b, v\]"),
        ([["a", "v"]], {}, "one number of axes"),
        ([["v"]], {}, "one number of axes >= 2"),
        ([["a", "b"]], {"ranks": (1, 2)}, r"one entry for each.*found \(1, 2\)"),
        ([["a", "b"]], {"ranks": (0,) * 6}, "rank must be an integer >= 1"),
    ],
)
def test_cores_refuse(grid, options, message):
    shared = {"a": weight("conv2d"), "b": weight("conv2d"), "v": weight("bias")}
    with pytest.raises(ValueError, match="^g: .*" + message):
        tucker_cores(shared, {"g": grid}, **options)
