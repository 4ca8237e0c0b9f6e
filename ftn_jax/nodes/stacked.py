"""One node for the same weight of all layers, where a network scans over its layers."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ftn_jax.node import Node, is_node, static
from ftn_jax.paths import path_name

STACK = "blocks"
"""Name of a stack of layers: its leaf `blocks/fc/kernel` is that of `blocks_0/fc/...`,
`blocks_1/fc/...` on a leading axis."""

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
        >>> from ftn_jax import make_delta
        >>> from ftn_jax.nodes import CP
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
            label = {"share": _numbered(self.share, i)} if self.share else {}
            found.append(node.replace(**own, **label))
        return found

    def paths(self) -> list[str]:
        """Return the paths of the layers' weights in the network not scanned."""
        return [_numbered(self.place, i) for i in range(self.layers)]

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
        if is_node(inner) and name in type(inner).data_fields:
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


def stacked_rules(
    shared: Any, rules: Mapping[str, _Init | None]
) -> dict[str, _Init | None]:
    """Make rules for single layers fit a network that scans over them.

    Args:
        shared: the backbone's tree of arrays or shapes; leaves below a key `blocks`
            are stacked layers. Without one the rules are returned as they are.
        rules: for the network not scanned: `blocks_0/fc/kernel`, ...

    Returns:
        Rules for `make_delta`; each leaf of a stack has one of its own.

    Raises:
        ValueError: if some layers of a stack have a node and others have none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    found: dict[str, _Init | None] = {}
    plain, inside = [], set()
    for key_path, w in leaves:
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            plain.append(path)
            continue
        names = [_numbered(place, i) for i in range(w.shape[0])]
        hits = [[p for p in rules if re.fullmatch(p, name)] for name in names]
        inside |= {p for h in hits for p in h}
        inits = [rules[h[0]] if h else None for h in hits]
        chosen = [init for init in inits if init is not None]
        if chosen and len(chosen) < len(inits):
            without = [n for n, i in zip(names, inits, strict=True) if i is None]
            raise ValueError(
                f"{path}: layers of one stack need a node each or none at all, found "
                f"none for {without}; adapt the network with separate layers "
                "(unstack_layers)"
            )
        if chosen:
            found[re.escape(path)] = partial(Stacked.init, inits=chosen, place=place)
        elif any(hits):
            found[re.escape(path)] = None
    if len(plain) == len(leaves):
        return dict(rules)
    for pattern, init in rules.items():
        outside = any(re.fullmatch(pattern, path) for path in plain)
        if outside or pattern not in inside:  # one that fits nothing shall be told of
            found[pattern] = init
    return found


def layer_leaves(shared: Any) -> dict[str, Any]:
    """List the leaves by path as in the network not scanned."""
    found = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(shared):
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            found[path] = w
        else:
            found |= {_numbered(place, i): w[i] for i in range(w.shape[0])}
    return found


def stack_entries(
    shared: Any, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Bring arrays by path and name, made for single layers, to the paths of `shared`.

    For what lies beside the backbone: `extend(shared, svd=stack_entries(shared, ...))`.
    """
    found: dict[str, dict[str, Any]] = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(shared):
        path = path_name(key_path)
        place = layer_place(path)
        if place is None:
            if path in entries:
                found[path] = dict(entries[path])
            continue
        own = [entries.get(_numbered(place, i)) for i in range(w.shape[0])]
        layers = [x for x in own if x is not None]
        if len(layers) == len(own):
            found[path] = {n: jnp.stack([x[n] for x in layers]) for n in layers[0]}
    return found


def layer_place(path: str) -> str | None:
    """Return the path of a layer's leaf for that of a stack's, else None.

    Example:
        >>> layer_place("blocks/fc/kernel")
        'blocks_{}/fc/kernel'
    """
    before, found, rest = f"/{path}".rpartition(f"/{STACK}/")
    return f"{before}/{STACK}_{{}}/{rest}".lstrip("/") if found else None


def _numbered(name: str | None, layer: int) -> str:
    return (name or "").replace("{}", str(layer))


def _label(labels: Sequence[str | None]) -> str | None:
    """Return the layers' one share label, or their pattern of labels."""
    first = labels[0]
    if all(label == first for label in labels):
        return first
    pattern = re.sub(rf"\b{STACK}_0\b", f"{STACK}_{{}}", first or "")
    if any(label != _numbered(pattern, i) for i, label in enumerate(labels)):
        raise ValueError(
            f"share labels of stacked layers are one, or differ as {STACK}_0, "
            f"{STACK}_1, ...; found {[*labels]}"
        )
    return pattern
