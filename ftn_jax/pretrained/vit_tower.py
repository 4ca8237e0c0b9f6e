"""Find a Vision Transformer inside a checkpoint, by the keys alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ftn_jax.pretrained.vit_layouts import LAYOUTS, Layout

_BLOCK = re.compile(r"blocks_(\d+)")


@dataclass(frozen=True)
class Tower:
    """Point at a ViT inside a checkpoint.

    Attributes:
        layout: How its keys are named.
        prefix: What the tower's keys start with.
        root: What the keys beside the tower start with.
    """

    layout: Layout
    prefix: str
    root: str

    def absolute(self, name: str) -> str:
        """Give the key of a name that is relative to the tower."""
        if name.startswith("../"):
            return self.root + name.removeprefix("../")
        return self.prefix + name

    def key(self, path: tuple[str, ...]) -> str | None:
        """Give the key of ("params", module, ..., leaf).

        Returns:
            None if checkpoints of this layout never have it.
        """
        leaf = path[-1]
        # A token and the positions are parameters of no module.
        module = "/".join(path[1:-1]) or leaf
        name = self.layout.names.get(_BLOCK.sub("blocks", module))
        if name is None:
            return None
        if not self.layout.flax:
            leaf = "bias" if leaf == "bias" else "weight"
        number = _BLOCK.match(module)
        return self.absolute(name).format(n=number and number[1], leaf=leaf)

    def has(self, key: str, *modules: str) -> bool:
        """Tell whether a key is a leaf of one of our modules."""
        names = [self.layout.names[m] for m in modules if m in self.layout.names]
        return any(
            key.startswith(self.absolute(name.split("{leaf}")[0])) for name in names
        )

    def foreign(self, key: str) -> bool:
        """Tell whether a key is known to be of no use for a ViT."""
        inside, beside = self.layout.inside, self.layout.beside
        if key.startswith(self.prefix):
            name = key.removeprefix(self.prefix)
            return inside is not None and bool(re.match(inside, name))
        name = key.removeprefix(self.root)
        return beside is not None and bool(re.match(beside, name))

    def without_head(self) -> "Tower":
        """Give the same tower, its classifier unknown."""
        names = {k: v for k, v in self.layout.names.items() if k != "head"}
        return replace(self, layout=replace(self.layout, names=names))


def find_towers(keys: Iterable[str]) -> list[Tower]:
    """List the ViTs of a checkpoint, all of one layout: usually there is one."""
    keys = set(keys)
    for layout in LAYOUTS:
        prefixes = {
            key.removesuffix(layout.marks[0])
            for key in keys
            if key.endswith(layout.marks[0])
        }
        towers = [
            Tower(layout, prefix, _outside(prefix, layout.containers))
            for prefix in sorted(prefixes)
            if prefix == "" or prefix[-1] in "./"
        ]
        whole = [t for t in towers if {t.absolute(m) for m in layout.marks} <= keys]
        if whole:
            return whole
    return []


def _outside(prefix: str, containers: tuple[str, ...]) -> str:
    for name in containers:
        if prefix.endswith(name):
            return prefix.removesuffix(name)
    return prefix
