"""What the contract must know of each family of nodes, one module for each.

FORMULAS: type -> `(w, complete node) -> merged weight` in float64 numpy.
STARTS: type -> `(key, w, extra) -> node`, where `init(key, w[, rank=2])` does not do.
EXTRAS: type -> `w -> {kind: {name: array}}`, what lies beside the backbone for w.
STARTS_ELSEWHERE: type -> why its default start is not the pretrained weight.
STARTS_WITHIN_ROUNDING: type -> why its start is the pretrained weight but for
    rounding.
RANDOM: type -> `(node, rng) -> node`, where normal numbers make no sensible node.
VARIANTS: name -> (type, start), options that go through the whole contract too.
"""

import importlib
import pkgutil
from typing import Any

_families = [
    importlib.import_module(f"{__name__}.{found.name}")
    for found in pkgutil.iter_modules(__path__)
]


def _table(name: str) -> dict[str, Any]:
    return {k: v for f in _families for k, v in getattr(f, name, {}).items()}


FORMULAS = _table("FORMULAS")
STARTS = _table("STARTS")
EXTRAS = _table("EXTRAS")
STARTS_ELSEWHERE = _table("STARTS_ELSEWHERE")
STARTS_WITHIN_ROUNDING = _table("STARTS_WITHIN_ROUNDING")
RANDOM = _table("RANDOM")
VARIANTS = _table("VARIANTS")
