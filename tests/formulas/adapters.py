"""Adapters, RCM and latent Tucker, written from their equations in float64."""

import jax.numpy as jnp
import numpy as np

from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter
from ftn_jax.nodes.adapter_svd import FactoredAdapter
from ftn_jax.nodes.rcm import RCM
from ftn_jax.nodes.tucker import Tucker


def f64(x):
    return np.asarray(x, np.float64)


def parallel(w, node):
    """W'[tap] = W[tap] + alpha, entry by entry."""
    merged = np.array(w, np.float64)
    for i, o in np.ndindex(*node.alpha.shape):
        merged[(*node.tap, i, o)] += float(node.alpha[i, o])
    return merged


def factored(w, node):
    """alpha = sum_k beta[:, k] gamma[k, :]."""
    merged = np.array(w, np.float64)
    for k in range(node.beta.shape[1]):
        merged[node.tap] += np.outer(f64(node.beta[:, k]), f64(node.gamma[k]))
    return merged


def outputs_last(w, node):
    """The weight as rows of outputs."""
    inputs = w.ndim - 1 if node.inputs is None else node.inputs
    return f64(w).reshape(-1, int(np.prod(w.shape[inputs:])))


def series(w, node):
    """W' = W (I + alpha)."""
    rows = outputs_last(w, node)
    return (rows @ (np.eye(rows.shape[1]) + f64(node.alpha))).reshape(w.shape)


def rcm(w, node):
    """W' = (W U) Wt^T, row o of Wt is g[o] v[o] / |v[o]|."""
    bank = outputs_last(w, node) @ f64(node.u)
    mixed = np.zeros_like(bank)
    for o, v in enumerate(f64(node.v)):
        row = v if node.g is None else float(node.g[o]) * v / np.sqrt((v**2).sum())
        mixed[:, o] = bank @ row
    return mixed.reshape(w.shape)


def tucker(w, node):
    """W' = (K x0 F0 x1 F1 ...)[block, conv], one axis after the other."""
    whole = f64(node.core)
    for axis, factor in enumerate(node.factors):
        whole = np.moveaxis(np.tensordot(f64(factor), whole, axes=(1, axis)), 0, axis)
    return whole[node.index][tuple(slice(n) for n in w.shape)]


def beside(kind, name, make):
    """Arrays for weights that have them; inits refuse the others."""
    return lambda w: {kind: {name: make(w)}} if w.ndim > 1 else {kind: {}}


def beta_of(w):
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.normal(size=(w.shape[-2], 2)), jnp.float32)


def basis_of(w):
    square = np.random.default_rng(6).normal(size=(w.shape[-1], w.shape[-1]))
    q, _ = np.linalg.qr(square)
    return jnp.asarray(q, jnp.float32)


def stack_of(w):
    """Two blocks of two kernels; w is the first of the second block."""
    rng = np.random.default_rng(7)
    stack = jnp.asarray(rng.normal(size=(2, 2, *w.shape)), jnp.float32)
    return stack.at[1, 0].set(jnp.asarray(w, jnp.float32))


def start_tucker(key, w, extra):
    stack = extra["tucker"]
    return Tucker.init(key, w, share="stage", index=(1, 0), stack=stack)


def start_in_a_corner(key, w, extra):
    return ParallelAdapter.init(key, w, tap=(0,) * (w.ndim - 2), dropout=0.5)


FORMULAS = {
    "ParallelAdapter": parallel,
    "SeriesAdapter": series,
    "FactoredAdapter": factored,
    "SharedBasisAdapter": factored,
    "RCM": rcm,
    "Tucker": tucker,
}
EXTRAS = {
    "SharedBasisAdapter": beside("adapter_basis", "beta", beta_of),
    "RCM": beside("pca", "u", basis_of),
    "Tucker": beside("tucker", "core", stack_of),
}
STARTS = {"Tucker": start_tucker}
STARTS_ELSEWHERE: dict[str, str] = {}
RANDOM = {}
VARIANTS = {
    "ParallelAdapter-tap": ("ParallelAdapter", start_in_a_corner),
    "SeriesAdapter-inputs": (
        "SeriesAdapter",
        lambda key, w, extra: SeriesAdapter.init(key, w, inputs=1),
    ),
    "FactoredAdapter-share": (
        "FactoredAdapter",
        lambda key, w, extra: FactoredAdapter.init(key, w, rank=0.5),
    ),
    "RCM-no-norms": (
        "RCM",
        lambda key, w, extra: RCM.init(key, w, extra=extra, normalize=False),
    ),
}
