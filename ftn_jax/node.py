"""The class of everything that a task adds to one weight, and its kinds of fields."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, dataclass_transform

import jax
from jaxtyping import Array, Float, Key


def static(**options: Any) -> Any:
    """Declare a node field that is configuration, not data (hashable, never traced)."""
    return field(metadata={"kind": "static"}, **options)


def frozen(**options: Any) -> Any:
    """Declare arrays that the task owns and saves, but that no gradient reaches."""
    return field(metadata={"kind": "frozen"}, **options)


def tied(**options: Any) -> Any:
    """Declare trained arrays that all nodes of one `share` label have in common.

    The first of them in tree order holds the arrays, the others hold `None`;
    `materialize` hands them round before it merges.
    """
    return field(metadata={"kind": "tied"}, **options)


def beside(kind: str) -> Any:
    """Declare frozen arrays that lie beside the backbone, common to all tasks.

    The field is `None` in a task's delta. `materialize` fills it from
    `extras[kind][path][name of the field]`, see `ftn_jax.Extended`; for nodes with a
    `share` label the label stands in the path's place.
    """
    return field(default=None, metadata={"kind": "beside", "beside": kind})


def register(cls: type[Any], data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    """Make a dataclass a pytree that is rebuilt without running its `__init__`.

    Tree operations put placeholders, shapes and stacked arrays where arrays were;
    the checks of building an object must not see them.
    """

    def flatten(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children = [(jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in data]
        return children, tuple(getattr(x, n) for n in meta)

    def unflatten(aux: Any, children: Any) -> Any:
        x = object.__new__(cls)
        x.__dict__.update(zip(meta + data, (*aux, *children), strict=True))
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(static, frozen, tied, beside),
)
class Node(ABC):
    """What one task adds to one weight; subclass it to add a method.

    A subclass declares its trained arrays as annotated fields, its configuration as
    `static()` fields, and other arrays as `frozen()`, `tied()` or `beside()` fields;
    it defines `merge(w)`. Subclassing is the registration: the class becomes a frozen
    dataclass, a pytree, and a type that task files can hold.

    By convention it also has `init(key, w, ...)`, a class method that checks its
    arguments and copies whatever it keeps of `w` (a node that held one of shared's
    own buffers would delete the backbone when a training step donates its state). An
    init with a parameter `extra` is given what lies beside the backbone for its path,
    a mapping from kind to arrays by name; one with a parameter `keys` a function from
    any path to the key that a node there would be given.

    Attributes:
        group: which optimizer trains the node's arrays; declare it as a `static()`
            field to let each instance choose.
        share: label of the nodes that have their `tied()` fields in common; declare
            it as a `static()` field.
        reads_weight: whether `merge` depends on the weight's values; if not, a task
            file opens on a backbone that differs in that leaf alone.
        types: every node type by name.
        data_fields: names of the fields that hold arrays.
        static_fields: names of the fields that hold configuration.
        frozen_fields: those of `data_fields` that the task does not train.
        tied_fields: those of `data_fields` that a share label has in common.
        beside_fields: those of `data_fields` that lie beside the backbone, with their
            kind.
    """

    group: str = "factors"
    share: str | None = None
    reads_weight: ClassVar[bool] = True
    types: ClassVar[dict[str, type["Node"]]] = {}
    data_fields: ClassVar[tuple[str, ...]] = ()
    static_fields: ClassVar[tuple[str, ...]] = ()
    frozen_fields: ClassVar[tuple[str, ...]] = ()
    tied_fields: ClassVar[tuple[str, ...]] = ()
    beside_fields: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(frozen=True, eq=False)(cls)
        kinds = {f.name: dict(f.metadata) for f in fields(cls)}  # pyright: ignore[reportArgumentType]

        def of(*wanted: str) -> tuple[str, ...]:
            return tuple(n for n, m in kinds.items() if m.get("kind", "data") in wanted)

        cls.data_fields = of("data", "frozen", "tied", "beside")
        cls.static_fields = of("static")
        cls.frozen_fields = of("frozen", "beside")
        cls.tied_fields = of("tied")
        cls.beside_fields = {n: kinds[n]["beside"] for n in of("beside")}
        for name in {"group", "share"} & {*cls.data_fields}:
            raise TypeError(f"{cls.__name__}: declare `{name} = static(...)`")
        old = Node.types.get(cls.__name__, cls)
        names = [f"{c.__module__}.{c.__qualname__}" for c in (old, cls)]
        if names[0] != names[1]:  # redefining a class in a notebook is fine
            raise TypeError(
                f"two node types of one name: {names[0]} and {names[1]}; task files "
                "store this name, so rename one of them"
            )
        Node.types[cls.__name__] = cls
        register(cls, cls.data_fields, cls.static_fields)

    @abstractmethod
    def merge(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the task's weight for the frozen weight `w`."""

    def perturb(self, key: Key[Array, ""]) -> "Node":
        """Return the node that one training step runs with (dropout); default self."""
        return self

    def compact(self) -> "Node | None":
        """Return the node to keep when training is over: same merge, fewer bytes.

        `None` stands for a node that changes nothing. Default: the node itself.
        """
        return self

    def reads(self) -> dict[str, Any]:
        """Return the arrays beside the backbone that `merge` depends on, by name.

        A task file keeps their fingerprint. The node is complete: `materialize` has
        filled its fields.
        """
        return {name: getattr(self, name) for name in self.beside_fields}

    def replace(self, **values: Any) -> Self:
        """Return a copy with other arrays in some fields, without any check."""
        node: Any = object.__new__(type(self))
        node.__dict__.update(self.__dict__ | values)
        return node


def is_node(x: Any) -> bool:
    """Tell whether `x` is a node (for `jax.tree` functions' `is_leaf`)."""
    return isinstance(x, Node)
