"""Task files as earlier releases wrote them; what they must still mean.

`python tests/golden_tasks.py DIR` writes a set of the present format: the task, the
extras that it reads, and the merged weights (`expected.npz`). Sets are never written
anew: a new format adds one, `tests/golden/formatN`.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ftn_jax import Task, compact, extend, make_delta, materialize, save_task
from ftn_jax.extras import save_extras
from ftn_jax.nodes import CP, SVFT, Kronecker, LoRA, Piggyback, Replace
from ftn_jax.nodes.svft import svd_bases
from ftn_jax.paths import path_name

SIZES = {
    "conv/kernel": (3, 3, 2, 4),
    "bn/scale": (4,),
    "dense/kernel": (4, 6),
    "proj/kernel": (6, 4),
    "masked/kernel": (4, 5),
    "svft/kernel": (5, 4),
    "head/kernel": (4, 7),
}
RULES = {
    "conv/kernel": partial(CP.init, rank=2, init="normal"),
    "bn/.*": Replace.init,
    "dense/kernel": partial(LoRA.init, rank=2, alpha=3.0),
    "proj/kernel": partial(Kronecker.init, n=2),
    "masked/kernel": partial(Piggyback.init, init="uniform"),
    "svft/kernel": SVFT.init,
    "head/kernel": partial(Replace.init, group="head", shape=(..., 3)),
}


def backbone():
    """Draw the weights from numpy, whose streams do not change."""
    rng = np.random.default_rng(0)
    tree = {}
    for path, size in SIZES.items():
        room, leaf = path.split("/")
        value = jnp.asarray(rng.normal(size=size), jnp.float32)
        tree.setdefault(room, {})[leaf] = value
    return tree


def flat(tree):
    """Arrays by path, as numpy."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(x) for path, x in leaves}


def main(directory):
    shared = backbone()
    extended = extend(shared, svd=svd_bases(shared, "svft/kernel"))
    delta = make_delta(jax.random.key(0), extended, RULES)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    # The mask's real values decide its bits; those of the packed form stay.
    delta = compact(
        {
            room: {
                k: node.replace(
                    **{
                        n: jax.tree.map(draw, getattr(node, n))
                        for n in node.data_fields
                        if n not in node.frozen_fields
                    }
                )
                for k, node in nodes.items()
            }
            for room, nodes in delta.items()
        }
    )
    state = {"batch_stats": {"bn": {"mean": jnp.arange(4, dtype=jnp.bfloat16)}}}
    save_extras(directory / "extras", extended)
    save_task(
        directory / "task",
        Task(delta, state),
        shared=extended,
        name="golden",
        class_names=("ash", "beech", "oak"),
        metadata={"accuracy": 0.5},
    )
    np.savez(directory / "expected.npz", **flat(materialize(extended, delta)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
