"""Convolutions written out, random arrays, and how far two results are apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ONES = ((1, 1), (1, 1))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(
    x: Any,
    w: Any,
    *,
    stride: int = 1,
    padding: Any = "VALID",
    dilation: int = 1,
    groups: int = 1,
) -> np.ndarray:
    found = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(w),
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )
    return np.asarray(found)


def gap(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
