"""Which leaves of a BigGAN generator a domain owns; the counts say which reading fits.

The paper gives totals, not layers. For BigGAN-128 at R = 50, which it says adds 3.9
million parameters, `generator_ftn`'s defaults add 3,929,870:

| part | parameters | here |
|---|--:|---|
| factors on the 15 convolutions of the blocks | 1,041,550 | `rank` |
| factors on the 4 of self-attention | 50,600 | `attention` |
| factors on the output convolution | 5,400 | `output` |
| linear layers of the BatchNorms, whole | 2,188,032 | `norms="whole"` |
| first linear layer, whole | 516,096 | `first="whole"` |
| class embedding, whole | 128,000 | `embedding` |
| scale and bias of the output's BatchNorm | 192 | `output_norm` |

Leaving out self-attention and the output convolution gives 3,873,870, which also
prints as 3.9; without the embedding it is 3,801,870. Factors on the linear layers
too (`"factors"`) cost 887,200 and 1,229,800 (the first: 20 inputs, so a rank of 50
is more than the whole); factors on convolutions alone are 1,097,550.
"""

import re
from functools import partial
from typing import Any, Literal

import jax

from ftn_jax.core import Init, Rules
from ftn_jax.nodes.cp import CP, CPInit
from ftn_jax.nodes.replace import Replace
from ftn_jax.paths import path_name

Linear = Literal["whole", "factors", "frozen"]
GROUP = "linear"
"""The optimizer group of linear layers that are trained whole."""

BLOCKS = r"block\d+/conv(\d|_sc)/kernel"
ATTENTION = r"attention\d+/(theta|phi|g|o)/kernel"
OUTPUT = r"output/conv/kernel"
NORMS = r"block\d+/bn\d/(gain|bias)/kernel"
FIRST = r"first/kernel"
FIRST_BIAS = r"first/bias"
EMBEDDING = r"embedding/embedding"
OUTPUT_NORM = r"output/bn/(scale|bias)"


def generator_ftn(
    *,
    rank: int,
    norms: Linear = "whole",
    first: Linear = "whole",
    linear_rank: int | None = None,
    embedding: bool = True,
    attention: bool = True,
    output: bool = True,
    output_norm: bool = True,
    init: CPInit | None = None,
) -> Rules:
    """Add CP factors to the convolutions; train linear layers whole, or by factors.

    Works on BigGAN and BigGAN-deep. Groups: `"factors"` and `"linear"`.

    Args:
        rank: of every convolution's factors.
        norms: what happens to the layers that give gain and bias of the BatchNorms.
        first: what happens to the first linear layer.
        linear_rank: of factors on linear layers; default `rank`.
        embedding: whether the class embedding is trained (whole).
        attention: whether self-attention's convolutions carry factors (leave it out for
            a generator without self-attention).
        output: whether the output convolution carries factors.
        output_norm: whether scale and bias of the output's BatchNorm are trained.
        init: see `CP.init`; the paper's is `"xavier"`.

    Source: FTN (arXiv 2310.06124), NeurIPS submission section 4.3 and supplement E:
    "low-rank tensors" and "linear layers"; which layers is our reading of the totals.
    """
    factors = partial(CP.init, rank=rank, init=init)
    small = partial(CP.init, rank=linear_rank or rank, init=_of_matrix(init))
    whole = partial(Replace.init, group=GROUP)
    ways: dict[str, Init | None] = {"whole": whole, "factors": small, "frozen": None}
    rules: dict[str, Init | None] = {BLOCKS: factors}
    if attention:
        rules[ATTENTION] = factors
    if output:
        rules[OUTPUT] = factors
    if norms != "frozen":
        rules[NORMS] = ways[norms]
    if first != "frozen":
        rules |= {FIRST: ways[first], FIRST_BIAS: whole}
    if embedding:
        rules[EMBEDDING] = whole
    if output_norm:
        rules[OUTPUT_NORM] = whole
    return rules


def generator_fine_tuning() -> Rules:
    """Train a copy of every weight; all are in the group `"linear"`."""
    return {".*": partial(Replace.init, group=GROUP)}


def has_attention(shared: Any) -> bool:
    """Tell whether a generator has self-attention."""
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    return any(re.fullmatch(ATTENTION, path_name(path)) for path, _ in leaves)


def _of_matrix(init: CPInit | None) -> CPInit | None:
    """Return the init of a weight without spatial axes: taps need some."""
    return "identity" if init == "taps" else init
