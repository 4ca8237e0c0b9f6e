"""One node for a weight of all layers, for networks that scan over their layers."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, static

STACK = "blocks"
"""Name of a stack of layers; alone they are `blocks_0`, `blocks_1`, ..."""

_Init = Callable[..., Node]


class Stacked(Node):
    """Merge each layer's weight by its own node: `W'[i] = node_i.merge(W[i])`.

    `inner` is a node of any type whose arrays have a leading axis of layers. What the
    layers have in common by a share label has none, and lies once in `inner`; a label
    that differs from layer to layer has `{}` for the layer's number. Group, labels and
    kinds of fields are those of the inner node, whose arrays are attributes of this
    one too.

    `stacked_rules` makes these nodes from rules for single layers, and task files hold
    the nodes of the single layers: a task opens on either form of the network.

    Attributes:
        inner: the layers' nodes, stacked.
        layers: how many there are.
        place: path of a layer's weight, `{}` for its number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from ftn_jax import make_delta
        >>> from ftn_jax.nodes import CP
        >>> from ftn_jax.nodes.stacked_rules import stacked_rules
        >>> shared = {"blocks": {"fc": {"kernel": jnp.ones((3, 8, 4))}}}
        >>> rules = {r"blocks_\\d+/fc/kernel": partial(CP.init, rank=2)}
        >>> delta = make_delta(jax.random.key(0), shared, stacked_rules(shared, rules))
        >>> [f.shape for f in delta["blocks"]["fc"]["kernel"].inner.factors]
        [(3, 8, 2), (3, 4, 2)]
    """

    inner: Node
    layers: int = static()
    place: str = static()

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        w: Float[Array, "layers ..."],
        *,
        inits: Sequence[_Init],
        place: str,
        keys: Callable[[str], Key[Array, ""]],
    ) -> "Stacked":
        """Start every layer as its own node would start in the network not scanned.

        Args:
            key: not used; each layer has the key of its own path.
            w: the weights of all layers; only their shapes and dtype are used.
            inits: each layer's `init(key, w)`.
            place: path of a layer's weight, `{}` for its number.
            keys: from a path to the key of a node there.

        Raises:
            ValueError: if there is not one init for each layer, one of them reads what
                lies beside the backbone, or the layers' nodes differ in more than
                their numbers.
        """
        if w.ndim < 1 or len(inits) != w.shape[0]:
            raise ValueError(
                f"{len(inits)} inits for layers of the shape {w.shape}, expected one "
                "for each entry of the first axis"
            )
        for init in inits:
            wanted = inspect.signature(init).parameters.get("extra")
            if wanted and wanted.default is inspect.Parameter.empty:
                raise ValueError(
                    "a node that starts from what lies beside the backbone cannot be "
                    "stacked; adapt the network with separate layers (unstack_layers)"
                )
        paths = [place.replace("{}", str(i)) for i in range(len(inits))]
        pairs = enumerate(zip(inits, paths, strict=True))
        return cls.of([init(keys(p), w[i]) for i, (init, p) in pairs], place=place)

    @classmethod
    def of(cls, nodes: Sequence[Node], *, place: str) -> "Stacked":
        """Stack the nodes of all layers; the reverse of `nodes`.

        Raises:
            ValueError: if they differ in type, configuration or shapes, or their share
                labels in more than the layer's number.
        """
        label = _label([node.share for node in nodes])
        first = nodes[0]
        common = first.tied_fields if label and "{}" not in label else ()
        bare = [n.replace(**dict.fromkeys(common)) for n in nodes]
        if label:
            bare = [n.replace(share=label) for n in bare]
        found = [jax.tree.map(jnp.shape, n) for n in bare]
        for i, shapes in enumerate(found):
            if jax.tree.structure(bare[i]) != jax.tree.structure(bare[0]) or (
                jax.tree.leaves(shapes) != jax.tree.leaves(found[0])
            ):
                raise ValueError(
                    f"layer {i} has the node {bare[i]}, layer 0 {bare[0]}: layers that "
                    "are stacked need nodes of one type, configuration and rank"
                )
        inner = jax.tree.map(lambda *x: jnp.stack(x), *bare)
        inner = inner.replace(**{n: getattr(first, n) for n in common})
        return cls(inner, layers=len(nodes), place=place)

    def nodes(self) -> list[Node]:
        """Return the layers' nodes; what they have in common is with the first."""
        common, bare = self._split()
        found = []
        for i in range(self.layers):
            node = jax.tree.map(lambda x, i=i: x[i], bare)
            own = common if i == 0 else {}
            label = {"share": numbered(self.share, i)} if self.share else {}
            found.append(node.replace(**own, **label))
        return found

    def paths(self) -> list[str]:
        """Return the paths of the layers' weights in the network not scanned."""
        return [numbered(self.place, i) for i in range(self.layers)]

    def merge(self, w: Float[Array, "layers ..."]) -> Float[Array, "layers ..."]:
        """Return the weights of all layers, in w's dtype.

        Raises:
            ValueError: if there are other layers than nodes, or a node does not fit.
        """
        if w.ndim < 1 or w.shape[0] != self.layers:
            raise ValueError(
                f"nodes of {self.layers} layers for weights of the shape {w.shape}"
            )
        common, bare = self._split()
        return jax.vmap(lambda node, w: node.replace(**common).merge(w))(bare, w)

    def perturb(self, key: Key[Array, ""]) -> "Stacked":
        """Return the node that one training step runs with, each layer by its key."""
        if type(self.inner).perturb is Node.perturb:
            return self
        common, bare = self._split()
        keys = jax.random.split(key, self.layers)
        drawn = jax.vmap(lambda node, key: node.perturb(key))(bare, keys)
        return self.replace(inner=drawn.replace(**common))

    def compact(self) -> "Node | None":
        """Return the layers' compact nodes, where these can be stacked too."""
        if type(self.inner).compact is Node.compact:
            return self
        small = [node.compact() for node in self.nodes()]
        if all(node is None for node in small):
            return None
        kept = [node for node in small if node is not None]
        if len({jax.tree.structure(n) for n in small}) > 1 or len(kept) < len(small):
            return self
        return Stacked.of(kept, place=self.place)

    def replace(self, **values: Any) -> "Stacked":
        """Return a copy with other arrays, by the names of the inner node's fields."""
        own = {n: values.pop(n) for n in ("inner", "layers", "place") if n in values}
        if values:
            own["inner"] = own.get("inner", self.inner).replace(**values)
        return super().replace(**own)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if isinstance(inner, Node) and name in inner.data_fields:
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _split(self) -> tuple[dict[str, Any], Node]:
        """Return the arrays common to all layers, and the node without them."""
        if not self.share or "{}" in self.share:
            return {}, self.inner
        names = self.inner.tied_fields
        common = {n: getattr(self.inner, n) for n in names}
        return common, self.inner.replace(**dict.fromkeys(names))


def _of_inner(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


# What a node tells of itself, this one tells of the node inside it.
for _name in (
    "group",
    "share",
    "reads_weight",
    "frozen_fields",
    "tied_fields",
    "beside_fields",
):
    setattr(Stacked, _name, _of_inner(_name))


def numbered(name: str | None, layer: int) -> str:
    """Put a layer's number in the place of `{}`."""
    return (name or "").replace("{}", str(layer))


def _label(labels: Sequence[str | None]) -> str | None:
    """Return the layers' one share label, or their pattern of labels."""
    first = labels[0]
    if all(label == first for label in labels):
        return first
    pattern = re.sub(rf"\b{STACK}_0\b", f"{STACK}_{{}}", first or "")
    if any(label != numbered(pattern, i) for i, label in enumerate(labels)):
        raise ValueError(
            f"share labels of stacked layers are one, or differ as {STACK}_0, "
            f"{STACK}_1, ...; found {[*labels]}"
        )
    return pattern
