"""Masks, switches, TAPS and PackNet, written out entry by entry."""

import jax.numpy as jnp
import numpy as np

from ftn_jax.nodes.mask import Piggyback
from ftn_jax.nodes.packnet import PackNet


def piggyback(w, node):
    """w * 1 above the threshold, w * -1 below zero if ternary, else 0."""
    merged, mask = np.array(w, np.float64), np.asarray(node.mask)
    for i in np.ndindex(*w.shape):
        if not mask[i] > node.threshold:
            merged[i] *= -1 if node.ternary and mask[i] < 0 else 0
    return merged


def affine_mask(w, node):
    """w + k1 + (k2 + k3 * w where the mask is positive)."""
    k1, k2, k3 = np.asarray(node.scales, np.float64)
    w, mask = np.asarray(w, np.float64), np.asarray(node.mask)
    merged = w + k1
    for i in np.ndindex(*w.shape):
        if mask[i] > 0:
            merged[i] += k2 + k3 * w[i]
    return merged


def channel_switch(w, node):
    """Zero in every slice whose switch is not positive."""
    merged, switch = np.array(w, np.float64), np.asarray(node.switch)
    for i in np.ndindex(*w.shape):
        if not switch[tuple(i[a] for a in node.axes)] > 0:
            merged[i] = 0
    return merged


def taps(w, node):
    """w, plus all of the change if the score reaches the threshold."""
    merged = np.array(w, np.float64)
    return merged + np.array(node.change) if node.score >= node.threshold else merged


def packnet(w, node):
    """The task's value, an earlier task's, or zero; the bits read by hand."""
    merged = np.zeros(w.size)
    value, values, owner, mine = (
        np.asarray(x).ravel() for x in (node.value, node.values, node.owner, node.mine)
    )
    for i in range(w.size):
        if mine[i // 8] >> (7 - i % 8) & 1:
            merged[i] = value[i]
        elif 0 < owner[i] < node.task:
            merged[i] = values[i]
    return merged.reshape(w.shape)


def packed_state(w):
    """Free, the base, task 2 and task 3 in turns."""
    owner = (jnp.arange(w.size) % 4).astype(jnp.uint8).reshape(w.shape)
    turned = jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32))[..., ::-1]
    values = jnp.where(owner > 0, turned, 0)
    return {"values": values, "owner": owner}


def some_off(node, rng):
    """Turn some switches off at random: never none, never all."""
    switch = rng.normal(size=node.switch.shape)
    switch.flat[switch.argmin()], switch.flat[switch.argmax()] = -1, 1
    return node.replace(switch=jnp.asarray(switch, node.switch.dtype))


def own_layer(node, rng):
    """Any change, and a score above the threshold."""
    change = jnp.asarray(rng.normal(size=node.change.shape), node.change.dtype)
    score = jnp.asarray(rng.uniform(0.2, 1), node.score.dtype)
    return node.replace(change=change, score=score)


FORMULAS = {
    "Piggyback": piggyback,
    "AffineMask": affine_mask,
    "ChannelSwitch": channel_switch,
    "TAPS": taps,
    "PackNet": packnet,
}
STARTS = {"PackNet": lambda key, w, extra: PackNet.init(key, w, extra=extra, task=3)}
EXTRAS = {"PackNet": lambda w: {"packnet": packed_state(w)}}
STARTS_ELSEWHERE = {"PackNet": "it starts at the packed network, zero where free"}
RANDOM = {"ChannelSwitch": some_off, "TAPS": own_layer}
VARIANTS = {
    "Piggyback-ternary": (
        "Piggyback",
        lambda key, w, extra: Piggyback.init(key, w, ternary=True),
    )
}
