"""A small backbone, its task, and a look into the folder that holds it."""

import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import (
    Task,
    make_delta,
)
from ftn_jax.manifest import checksum
from ftn_jax.nodes import CP, Replace

RULES = {
    "conv/kernel": partial(CP.init, rank=2, init="normal", scale=0.1 + 0.2),
    "scalar|conv/bias": Replace.init,
    "head/kernel": partial(Replace.init, group="head", shape=(..., 3)),
}
DESCRIPTION = {
    "name": "leaves é",
    "class_names": ("ash", "beech", "oak"),
    "preprocessing": [{"name": "resize", "size": [8, 8], "antialias": True}],
    "metadata": {"accuracy": 0.1 + 0.2, "nested": {"seeds": [1, 2]}, "none": None},
}


def backbone():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return {
        "conv": {"kernel": draw(3, 3, 3, 4), "bias": draw(4)},
        "head": {"kernel": draw(4, 10)},
        "scalar": draw(),
    }


def task(seed=0):
    rng = np.random.default_rng(seed)
    state = {
        "batch_stats": {
            "stem": {"bn": {"mean": jnp.asarray(rng.normal(size=4), jnp.float32)}},
            "steps": jnp.asarray(seed + 7, jnp.int32),
        },
        "cache": {"low": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)},
    }
    return Task(make_delta(jax.random.key(seed), backbone(), RULES), state)


def apply(params, model_state, batch, *, train, key=None):
    x = jax.lax.conv_general_dilated(
        batch["image"],
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean = model_state["batch_stats"]["stem"]["bn"]["mean"]
    x = jnp.tanh(x.mean((1, 2)) + (params["conv"]["bias"] - mean)[None])
    return x @ params["head"]["kernel"] * params["scalar"], model_state


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder, change):
    manifest = manifest_of(folder)
    manifest = change(manifest) or manifest
    if manifest.get("format_version", 3) >= 3:  # else: a file of an earlier format
        manifest["checksum"] = checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def tensors_of(folder):
    return folder / manifest_of(folder)["tensors"]["file"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)
