"""What a task stores and what its backbone has, as the papers count."""

import re
from typing import Any

import jax

from ftn_jax.core import iter_nodes, split_extras
from ftn_jax.method import Backbone
from ftn_jax.paths import path_name


def stored_size(delta: Any) -> int:
    """Count what a finished task keeps beside its head, in words of 32 bits.

    For factors, norms and weights this is the number of parameters; a mask of one bit
    for each weight counts a 32nd of it.
    """
    arrays = [
        x
        for _, node in iter_nodes(delta)
        if node.group != "head"
        for x in jax.tree.leaves(node)
    ]
    return -(-sum(x.size * x.dtype.itemsize for x in arrays) // 4)


def backbone_size(backbone: Backbone) -> int:
    """Count the backbone's parameters, its own head left out."""
    params, _ = split_extras(backbone.shared)
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not re.fullmatch(backbone.layers.head, path_name(path))
    )
