"""Golden counts: which layers of BigGAN-128 carry factors."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ftn_jax import count, make_delta
from ftn_jax.models import biggan, biggan_deep
from ftn_jax.presets.biggan import (
    generator_fine_tuning,
    generator_ftn,
    has_attention,
)

ALL_OFF = {
    "norms": "frozen",
    "first": "frozen",
    "embedding": False,
    "output_norm": False,
}


def shapes(model):
    z, y = jnp.zeros((1, model.dim_z)), jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), z, y)["params"]


@pytest.fixture(scope="module")
def biggan_128():
    return shapes(biggan(128))


def counted(shared, rules):
    start = partial(make_delta, jax.random.key(0), rules=rules)
    return count(jax.eval_shape(start, shared))


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"rank": 50}, 3_929_870),
        ({"rank": 50, "output_norm": False}, 3_929_678),
        ({"rank": 20}, 3_271_340),
        ({"rank": 50, "attention": False, "output": False}, 3_873_870),
        ({"rank": 50, "embedding": False}, 3_801_870),
        ({"rank": 50, **ALL_OFF}, 1_097_550),
        ({"rank": 50, **ALL_OFF, "attention": False, "output": False}, 1_041_550),
        ({"rank": 50, **ALL_OFF, "norms": "factors"}, 1_097_550 + 887_200),
        # The first layer's bias (24,576) is trained whole in any case.
        (
            {"rank": 50, **ALL_OFF, "first": "factors"},
            1_097_550 + 1_229_800 + 24_576,
        ),
        (
            {"rank": 50, **ALL_OFF, "norms": "factors", "linear_rank": 1},
            1_097_550 + 887_200 // 50,
        ),
    ],
)
def test_counts_of_biggan_128(biggan_128, options, total):
    assert counted(biggan_128, generator_ftn(**options)).total == total


def test_groups_are_what_the_paper_gives_rates_for(biggan_128):
    by_group = counted(biggan_128, generator_ftn(rank=50)).by_group
    assert by_group == {"factors": 1_097_550, "linear": 2_832_320}
    assert counted(biggan_128, generator_fine_tuning()).total == 70_433_988


def test_presets_fit_other_generators():
    plain = shapes(biggan(32, width=4, attention=(), num_classes=2))
    assert not has_attention(plain)
    with pytest.raises(ValueError, match="match no leaf.*attention"):
        counted(plain, generator_ftn(rank=1))
    assert counted(plain, generator_ftn(rank=1, attention=False)).total > 0
    deep = shapes(biggan_deep(128, width=8, num_classes=2))
    assert has_attention(deep)
    factors = counted(deep, generator_ftn(rank=1)).by_path
    # Bottlenecks of four convolutions, ten blocks; self-attention and the output.
    assert sum("/conv" in p and "bias" not in p for p in factors) == 41
