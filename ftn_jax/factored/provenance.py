"""Follow arguments through a traced program, to where something is done with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

# Primitives that hand their operand on as it is, or in another precision.
_SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
}


class Sight(NamedTuple):
    """A place where a tag was put on an argument.

    Attributes:
        tag: its name.
        layers: leading axes that scans have taken off the argument on the way.
        shape: of what was tagged.
    """

    tag: str
    layers: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Trail:
    """What became of one argument.

    Attributes:
        sights: every place where it was tagged.
        others: what else was done with it, by name of the primitive.
    """

    sights: list[Sight] = field(default_factory=list)
    others: set[str] = field(default_factory=set)


class _Source(NamedTuple):
    """Where the value of a variable comes from, unchanged."""

    argument: int
    layers: int


def follow(
    program: ClosedJaxpr, count: int, tags: set[str]
) -> tuple[list[Trail], set[str]]:
    """Follow a program's first `count` arguments.

    An argument is followed through changes of precision, calls, checkpoints, scans
    and branches, to the `jax.ad_checkpoint.checkpoint_name` of a tag. Anything else
    is another use, known primitive or not.

    Returns:
        The trail of each, and the tags that stand on anything but an argument.
    """
    trails = [Trail() for _ in range(count)]
    walk = _Walk(trails, tags, set())
    jaxpr = program.jaxpr
    sources = [_Source(n, 0) for n in range(count)]
    walk.used(walk.through(jaxpr, [*sources, *[None] * (len(jaxpr.invars) - count)]))
    return trails, walk.strays


@dataclass(frozen=True)
class _Walk:
    trails: list[Trail]
    tags: set[str]
    strays: set[str]

    def used(self, sources: Iterable[_Source | None], by: str = "output") -> None:
        """Note down another use."""
        for source in sources:
            if source is not None:
                self.trails[source.argument].others.add(by)

    def through(
        self, jaxpr: Jaxpr, inputs: Sequence[_Source | None]
    ) -> list[_Source | None]:
        """Follow sources through one (inner) program; return those of its outputs."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def source(var: Any) -> _Source | None:
            return None if isinstance(var, Literal) else known.get(var)

        for eqn in jaxpr.eqns:
            sources = [source(v) for v in eqn.invars]
            name = eqn.primitive.name
            if name == "name" and eqn.params["name"] in self.tags:
                self._sight(eqn, *sources)
            elif name in _SAME and len(eqn.outvars) == len(sources):
                known.update(zip(eqn.outvars, sources, strict=True))
            else:
                outputs = self._inside(name, eqn, sources)
                known.update(zip(eqn.outvars, outputs, strict=True))
        return [source(v) for v in jaxpr.outvars]

    def _sight(self, eqn: Any, source: _Source | None) -> None:
        tag, shape = eqn.params["name"], eqn.invars[0].aval.shape
        if source is None:
            self.strays.add(tag)
        else:
            sight = Sight(tag, source.layers, shape)
            self.trails[source.argument].sights.append(sight)

    def _inside(
        self, name: str, eqn: Any, sources: list[_Source | None]
    ) -> list[_Source | None]:
        """Follow into an equation's inner programs, where their inputs are clear."""
        nothing: list[_Source | None] = [None] * len(eqn.outvars)
        if name == "cond":
            self.used(sources[:1], by=name)
            for branch in eqn.params["branches"]:
                self.used(self.through(branch.jaxpr, sources[1:]), by=name)
            return nothing
        if name == "scan":
            consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
            slices = [s and s._replace(layers=s.layers + 1) for s in sources]
            self.used(sources[consts : consts + carry], by=name)
            inner = sources[:consts] + [None] * carry + slices[consts + carry :]
            self.used(self.through(eqn.params["jaxpr"].jaxpr, inner), by=name)
            return nothing
        jaxpr = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        # Custom gradients are their author's: what goes in may not come along there.
        clear = isinstance(jaxpr, Jaxpr) and not name.startswith("custom_")
        if clear and len(jaxpr.invars) == len(sources):
            found = self.through(jaxpr, sources)
            if len(found) == len(nothing):
                return found
            self.used(found, by=name)
            return nothing
        self.used(sources, by=name)
        for inner in jaxprs_in_params(eqn.params):
            self.through(inner, [None] * len(inner.invars))
        return nothing
