"""LoRA, DoRA, KAdaptation, SVFT and SSF written out in float64."""

import math

import jax.numpy as jnp
import numpy as np

from ftn_jax.nodes.kronecker import Kronecker
from ftn_jax.nodes.lora import LoRA
from ftn_jax.nodes.scale import Scale
from ftn_jax.nodes.svft import SVFT


def lora_formula(w, node):
    a, b = np.array(node.a, np.float64), np.array(node.b, np.float64)
    merged = np.array(w, np.float64)
    if node.form == "conv":  # both flat in the same order
        merged.flat += node.scale * (a @ b).ravel()
        return merged
    numbers = iter((b @ a).ravel())  # torch's order: out, in, row, column
    height, width, c_in, c_out = w.shape
    for o in range(c_out):
        for i in range(c_in):
            for y in range(height):
                for x in range(width):
                    merged[y, x, i, o] += node.scale * next(numbers)
    return merged


def dora_formula(w, node):
    """m V / |V| column by column, m the pretrained norm and what was added to it."""
    a, b, more = (np.array(x, np.float64) for x in (node.a, node.b, node.magnitude))
    start = np.array(w, np.float64).reshape(len(a), -1)
    v = start + node.scale * sum(np.outer(a[:, r], b[r]) for r in range(len(b)))
    columns = [
        (math.hypot(*start[:, j]) + more[j]) * v[:, j] / math.hypot(*v[:, j])
        for j in range(v.shape[1])
    ]
    return np.stack(columns, axis=1).reshape(w.shape)


def kronecker_formula(w, node):
    u, v, *slow = (np.array(x, np.float64) for x in (node.u, node.v, *node.slow))
    update = 0
    for i in range(len(u)):
        outer = slow[0][i] if len(slow) == 1 else np.outer(slow[0][i], slow[1][i])
        update = update + np.kron(outer, u[i] @ v[i])
    return np.array(w, np.float64) + node.scale * update.reshape(w.shape)


def svft_formula(w, node):
    u, vt, m = (np.array(x, np.float64) for x in (node.u, node.vt, node.m))
    k, b = len(vt), node.off_diagonals
    gate = 1.0 if node.gate is None else 1 / (1 + math.exp(-float(node.gate)))
    if node.places is not None:
        places = np.array(node.places).T
    else:
        offsets = sorted(range(-b, b + 1), key=lambda d: (abs(d), -d))
        places = [(i, i + d) for d in offsets for i in range(k) if 0 <= i + d < k]
    update = np.zeros((len(u), vt.shape[1]))
    for (i, j), coefficient in zip(places, m, strict=True):
        update += gate * coefficient * np.outer(u[:, i], vt[j])
    return np.array(w, np.float64) + update.reshape(w.shape)


def scale_formula(w, node):
    merged = np.array(w, np.float64)
    gamma = np.array(node.gamma, np.float64)
    for index in np.ndindex(*w.shape):
        merged[index] *= gamma[index[w.ndim - gamma.ndim :]]
        if node.beta is not None:
            merged[index] += float(node.beta[index])
    return merged


FORMULAS = {
    "LoRA": lora_formula,
    "DoRA": dora_formula,
    "Kronecker": kronecker_formula,
    "SVFT": svft_formula,
    "Scale": scale_formula,
}


def small_kronecker(key, w, extra=None, **options):
    """As many terms as a small weight allows; a scale that keeps them comparable."""
    n = math.gcd(math.prod(w.shape[:-1]), w.shape[-1]) if w.ndim > 1 else 1
    return Kronecker.init(key, w, n=n, rank=2, scale=0.5, slow_bound=0.5, **options)


STARTS = {"Kronecker": small_kronecker}


def svd_beside(w):
    """Bases of the weight (inputs, outputs); traceable, unlike `svd_bases`."""
    if w.ndim < 2:
        return {}
    matrix = jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32))
    arrays = jnp.linalg.svd(matrix.reshape(-1, w.shape[-1]), full_matrices=False)
    return {"svd": dict(zip(("u", "s", "vt"), arrays, strict=True))}


def random_svft(node, rng):
    """Coefficients as large as singular values are; the gate around one half."""
    m = jnp.asarray(8 * rng.normal(size=node.m.shape), node.m.dtype)
    if node.gate is None:
        return node.replace(m=m)
    return node.replace(m=m, gate=jnp.asarray(rng.normal(), node.gate.dtype))


EXTRAS = {"SVFT": svd_beside}
STARTS_ELSEWHERE: dict[str, str] = {}
RANDOM = {"SVFT": random_svft}

VARIANTS = {
    "LoRA-reshape": (
        "LoRA",
        lambda key, w, extra: LoRA.init(key, w, rank=2, form="reshape", alpha=1),
    ),
    "Kronecker-full": (
        "Kronecker",
        lambda key, w, extra: small_kronecker(key, w, factorised=False),
    ),
    "SVFT-banded-gate": (
        "SVFT",
        lambda key, w, extra: SVFT.init(key, w, off_diagonals=1, gate=True),
    ),
    "SVFT-random": ("SVFT", lambda key, w, extra: SVFT.init(key, w, random=6)),
    "Scale-shift": ("Scale", lambda key, w, extra: Scale.init(key, w, shift=True)),
}
