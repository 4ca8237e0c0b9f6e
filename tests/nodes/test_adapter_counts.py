"""Published parameter counts of the adapters, RCM and latent Tucker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax import count, extend, make_delta
from ftn_jax.compress import joint_bases
from ftn_jax.models import RESNETS, ResNet
from ftn_jax.nodes import Replace
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter
from ftn_jax.nodes.adapter_svd import SharedBasisAdapter
from ftn_jax.nodes.rcm import RCM
from ftn_jax.nodes.tucker_core import tucker_cores, tucker_groups, tucker_rules
from ftn_jax.paths import path_name

CONVS = ".*conv\\d*/kernel"
# The networks of the NYUD table train their 1x1 shortcuts and BatchNorms by task.
OWN = {"fully": partial(Replace.init, group="weights"), "norms": Replace.init}


def shapes_of(model):
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


@pytest.fixture(scope="module")
def resnet26():
    return shapes_of(RESNETS["resnet26"](None))


@pytest.fixture(scope="module")
def resnet18():
    return shapes_of(RESNETS["resnet18"](None))


@pytest.fixture(scope="module")
def bottleneck26():
    return shapes_of(ResNet((2, 2, 2, 2), num_classes=None, bottleneck=True))


def kernels(shared):
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    return {path_name(p): w for p, w in leaves if w.ndim == 4}


def size(shared):
    return sum(w.size for w in kernels(shared).values())


def own(shared, rules):
    """What a task owns under these rules, by shapes alone."""
    key = jax.random.key(0)
    return count(jax.eval_shape(lambda s: make_delta(key, s, rules), shared)).total


def test_adapters_on_resnet26(resnet26):
    base = size(resnet26)
    assert base == 5_806_944
    parallel = own(resnet26, {CONVS: ParallelAdapter.init})
    assert parallel == 645_216
    spatial = sum(w.size for w in kernels(resnet26).values() if w.shape[0] == 3)
    assert 9 * parallel == spatial == base
    assert f"{1 + 9 * parallel / base:.2f}" == "2.00"
    norms = own(resnet26, {".*bn\\d*/(scale|bias)": Replace.init})
    assert norms == 7_744
    assert f"{1 + 9 * (parallel + norms) / base:.2f}" == "2.01"
    series = own(resnet26, {CONVS: SeriesAdapter.init})
    assert series == 689_152 and f"{series / base:.3f}" == "0.119"


@pytest.mark.parametrize(
    ("layers", "adapters", "growth"),
    [
        ("layer1", 30_720, "1.05"),
        ("layer2", 122_880, "1.19"),
        ("layer3", 491_520, "1.76"),
    ],
    ids=["early", "mid", "late"],
)
def test_adapters_in_a_part_of_the_network(resnet26, layers, adapters, growth):
    found = own(resnet26, {f"{layers}_.*{CONVS}": ParallelAdapter.init})
    assert found == adapters
    # Table 1 of arXiv 1803.10082 prints 2x for all three.
    assert f"{1 + 9 * found / size(resnet26):.2f}" == growth


def test_adapters_in_half_of_the_convolutions(resnet26):
    found = own(resnet26, {".*/conv2/kernel": ParallelAdapter.init})
    assert f"{1 + 9 * found / size(resnet26):.2f}" == "1.53"  # printed as 1.5x


def test_joint_compression_on_resnet26(resnet26):
    """K is half the channels; 3 / 2 is 1 for the stem, hence the odd number."""
    weights = kernels(resnet26)
    # One of each shape: kernels of one shape have bases of one size.
    delta = {
        str(w.shape): ParallelAdapter(jnp.zeros(w.shape[-2:]), tap=(1, 1))
        for w in weights.values()
    }
    by_shape = joint_bases([delta], rank=0.5)
    bases = {path: by_shape[str(w.shape)] for path, w in weights.items()}
    shared = sum(beta["beta"].size for beta in bases.values())
    assert shared == 311_811
    assert bases["stem/conv/kernel"]["beta"].shape == (3, 1)
    extended = extend(weights, adapter_basis=bases)
    task = own(extended, {".*": SharedBasisAdapter.init})
    assert task == 322_592
    growth = [1 + (shared + n * task) / size(resnet26) for n in (10, 9)]
    assert [f"{g:.2f}" for g in growth] == ["1.61", "1.55"]


def test_nyud_rows_on_resnet18(resnet18):
    """Four tasks; the table's figures are truncated, not rounded."""
    base = size(resnet18)
    assert base == 11_166_912
    spatial = "(?!.*shortcut).*conv\\d*/kernel"
    by_task = {
        ".*shortcut/conv/kernel": OWN["fully"],
        ".*bn\\d*/(scale|bias)": OWN["norms"],
    }
    rest = own(resnet18, by_task)
    assert rest == 172_032 + 9_600

    def total(task, inner=0):
        return int((base + 4 * (task + inner)) / 1e4) / 100

    pca = {
        path: {"u": jax.ShapeDtypeStruct(w.shape[-1:] * 2, w.dtype)}
        for path, w in kernels(resnet18).items()
        if "shortcut" not in path
    }
    rcm = own(extend(resnet18, pca=pca), {spatial: RCM.init} | by_task)
    assert rcm == 1_396_736 + 3_904 + rest and total(rcm) == 17.49
    rows = own(extend(resnet18, pca=pca), {spatial: partial(RCM.init, normalize=False)})
    assert rcm - rows == 3_904 + rest
    series = own(resnet18, {spatial: SeriesAdapter.init} | by_task)
    inner = 2 * 3_904  # scale and bias of the BatchNorm inside the released adapter
    assert series == 1_396_736 + rest and total(series, inner) == 17.51
    parallel = own(resnet18, {spatial: ParallelAdapter.init} | by_task)
    assert parallel == 1_220_800 + rest and total(parallel) == 16.77


def test_astmt_adapters(resnet18, bottleneck26):
    """One of C x C in each residual block, on its last 3x3 convolution."""
    found = own(resnet18, {"layer.*/conv2/kernel": ParallelAdapter.init})
    assert found == 696_320
    total = size(resnet18) + 4 * (found + 9_600)
    assert int(total / 1e4) / 100 == 13.99
    assert size(bottleneck26) == 13_915_328
    found = own(bottleneck26, {"layer.*/conv2/kernel": ParallelAdapter.init})
    assert found == 696_320


STAGES = r"(?P<label>layer\d)_(?P<block>\d)/conv(?P<conv>\d)/kernel"


def test_latent_tucker_on_resnet26(resnet26):
    """All eight convolutions of each stage, the first one filled up with zeros."""
    groups = tucker_groups(resnet26, STAGES)
    assert {k: (len(g), len(g[0])) for k, g in groups.items()} == {
        f"layer{s}": (4, 2) for s in (1, 2, 3)
    }
    make = partial(tucker_cores, groups=groups, pad=True)
    cores = jax.eval_shape(make, resnet26)
    extended = extend(resnet26, tucker=cores)
    found = own(extended, tucker_rules(groups, cores))
    closed = sum(2 * c**2 + 9 + 9 + 4 + 16 for c in (64, 128, 256))
    assert found == closed == 172_146
    base = size(resnet26)
    share = own(resnet26, {CONVS: ParallelAdapter.init}) / base
    assert (f"{found / base:.1%}", f"{share:.1%}") == ("3.0%", "11.1%")
    norms = 7_744
    growth = [1 + 9 * found / base, 1 + 9 * (found + norms) / base]
    assert [f"{g:.2f}" for g in growth] == ["1.27", "1.28"]
    with pytest.raises(ValueError, match="layer1: kernels of one shape.*pad=True"):
        jax.eval_shape(partial(tucker_cores, groups=groups), resnet26)


def test_latent_tucker_without_the_first_blocks(resnet26):
    """No kernel is filled up: three blocks of a stage, 9 + 4 and not 16 + 4."""
    groups = tucker_groups(resnet26, STAGES.replace(r"<block>\d", r"<block>[1-3]"))
    cores = jax.eval_shape(partial(tucker_cores, groups=groups), resnet26)
    found = own(extend(resnet26, tucker=cores), tucker_rules(groups, cores))
    assert found == 172_146 - 3 * (16 - 9)
    assert np.prod(cores["layer3"]["core"].shape) == 3 * 2 * 9 * 256**2
