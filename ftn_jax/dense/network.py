"""DeepLab around a pretrained backbone, as what tasks are trained on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftn_jax.apply import Apply, from_linen
from ftn_jax.method import Backbone, Layers
from ftn_jax.paths import path_name, some
from ftn_jax.presets.dense import dense_layers


class DenseBackbone(NamedTuple):
    """A frozen network for dense tasks.

    Attributes:
        backbone: what every method takes.
        frozen: `outputs -> Apply` of the network whose backbone runs in evaluation
            mode in training too, for `decoder_only`.
    """

    backbone: Backbone
    frozen: Callable[[int], Apply]


def dense_backbone(
    make: Callable[[int], Any], variables: Mapping[str, Any], layers: Layers
) -> DenseBackbone:
    """Put a pretrained backbone under a decoder.

    The decoder's place in `shared` holds zeros: every task starts its own.

    Args:
        make: `outputs -> DeepLab`.
        variables: the backbone's `params` and `batch_stats`; what the decoder does not
            use (a head, late layers) is left out.
        layers: of the backbone alone.

    Raises:
        ValueError: if the variables lack what the network needs, or shapes differ.
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(make(1).init, jax.random.key(0), image)

    def take(collection: str, fill: Callable[[str], float]) -> Any:
        flat = {
            path_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables[collection])
        }
        wrong = []

        def leaf(path: Any, like: Any) -> Any:
            name = path_name(path)
            part, _, rest = name.partition("/")
            if part != "backbone":
                return jnp.full(like.shape, fill(name), like.dtype)
            if rest not in flat or flat[rest].shape != like.shape:
                found = flat[rest].shape if rest in flat else "nothing"
                wrong.append(f"{rest}: found {found}, expected {like.shape}")
                return None
            return jnp.asarray(flat[rest])

        tree = jax.tree_util.tree_map_with_path(leaf, shapes[collection])
        if wrong:
            raise ValueError(f"not this backbone's {collection}: {some(wrong)}")
        return tree

    params = take("params", lambda name: 0.0)
    stats = take("batch_stats", lambda name: float(name.endswith("/var")))
    backbone = Backbone(
        network=lambda outputs: from_linen(make(outputs)),
        shared=params,
        model_state={"batch_stats": stats},
        layers=dense_layers(layers),
    )
    options = {"train": True, "frozen_backbone": True}
    return DenseBackbone(
        backbone, lambda outputs: from_linen(make(outputs), train_options=options)
    )
