"""A stack of layers, each merged by its own node, here FTN's."""

from functools import partial

import jax
import numpy as np

from formulas.core import FORMULAS as CORE
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.stacked import Stacked

FACTORS = CORE["CP"]


def stacked_formula(w, node):
    layers = [FACTORS(w[i], layer) for i, layer in enumerate(node.nodes())]
    return np.stack(layers)


def start(key, w, extra=None):
    """One node for each entry of the first axis, which a vector does not have."""
    if w.ndim < 3:
        raise ValueError(f"a stack of kernels has three axes or more, found {w.shape}")
    return Stacked.init(
        key,
        w,
        inits=[partial(CP.init, rank=2)] * w.shape[0],
        place="layer_{}/w",
        keys=lambda path: jax.random.fold_in(key, len(path)),
    )


FORMULAS = {"Stacked": stacked_formula}
STARTS = {"Stacked": start}
