"""Many devices and many hosts: JAX's own meshes and shardings, chosen by one flag.

A mesh has up to three axes. `data` splits the batch; `model` splits the batch and the
backbone too, whose weights are gathered where they are used (fully sharded data
parallel); `task` gives each device tasks of its own, the backbone is common to them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftn_jax.digest import whole

Step = Callable[[Any, Any, Any], Any]  # (shared, state or task, batch) -> ...

AXES = ("task", "data", "model")
_SPLIT_ABOVE = 2**14


def parse_mesh(text: str) -> dict[str, int]:
    """Read `"data=4,model=2"` as sizes by axis.

    Raises:
        ValueError: if an axis is unknown, named twice, or has no positive size.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh {text!r}: found {part!r}, expected axes of {AXES}, each at most "
                "once and with a size: data=8, or data=4,model=2, or task=4,data=2"
            )
        sizes[name] = int(size)
    return sizes


@dataclass(frozen=True)
class Layout:
    """Where arrays lie, and how steps run there.

    Attributes:
        mesh: the devices, with axes of `AXES`.
        sync_batch_norm: BatchNorm sees the whole batch, as on one device; otherwise
            each device normalises by its own part and running statistics are averaged.
    """

    mesh: Mesh
    sync_batch_norm: bool = True

    @classmethod
    def of(cls, text: str, *, sync_batch_norm: bool = True) -> "Layout":
        """Make the mesh of a flag such as `"data=4,model=2"` of the first devices.

        Raises:
            ValueError: if the flag is wrong, there are too few devices, or a job of
                several processes would leave some of its devices out.
        """
        sizes = parse_mesh(text)
        wanted, there = prod(sizes.values()), len(jax.devices())
        if wanted > there or (wanted < there and jax.process_count() > 1):
            raise ValueError(
                f"mesh {text!r} has {wanted} devices, JAX sees {there} (on a CPU, "
                f"JAX_NUM_CPU_DEVICES={wanted} makes as many)"
            )
        mesh = jax.make_mesh(
            tuple(sizes.values()),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
            devices=jax.devices()[:wanted],
        )
        return cls(mesh, sync_batch_norm)

    @classmethod
    def for_run(
        cls, mesh: str | None, *, local_batch_norm: bool = False
    ) -> "Layout | None":
        """Read an experiment's flags; `None` for one process with one device.

        Raises:
            ValueError: see `of`; or if there are several processes and no mesh, or it
                has an axis of tasks.
        """
        if mesh is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"{jax.process_count()} processes run this together: say with "
                    f"--mesh how, for example --mesh data={len(jax.devices())}"
                )
            return None
        if "task" in parse_mesh(mesh):
            raise ValueError(
                f"--mesh {mesh}: experiments train one task after another; leave the "
                "axis task out (ftn_jax.parallel has it)"
            )
        return cls.of(mesh, sync_batch_norm=not local_batch_norm)

    @cached_property
    def _over_batch(self) -> tuple[str, ...]:
        return tuple(n for n in ("data", "model") if n in self.mesh.shape)

    @property
    def _over_tasks(self) -> tuple[str, ...]:
        return ("task",) if "task" in self.mesh.shape else ()

    @cached_property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device holds."""
        return NamedSharding(self.mesh, P())

    @cached_property
    def batches(self) -> NamedSharding:
        """The sharding of a batch: `(b, ...)`, or `(tasks, b, ...)` with tasks."""
        return NamedSharding(self.mesh, P(*self._over_tasks, self._over_batch or None))

    def shardings(self, tree: Any, *, stacked: bool = False) -> Any:
        """Say where each leaf lies: large ones are split over `model`, if there is one.

        A leaf is split along its longest axis that `model` divides. The same holds for
        the arrays of a task: where it replaces whole weights, they are split alike.

        Args:
            tree: of arrays or shapes.
            stacked: the leaves have a leading axis of tasks.
        """
        lead = self._over_tasks if stacked else ()
        parts = self.mesh.shape.get("model", 1)

        def place(x: Any) -> NamedSharding:
            shape = x.shape[len(lead) :]
            spec: list[str | None] = []
            able = [n for n, size in enumerate(shape) if size and size % parts == 0]
            if parts > 1 and able and prod(shape) >= _SPLIT_ABOVE:
                axis = max(able, key=lambda n: shape[n])
                spec = [None] * axis + ["model"]
            return NamedSharding(self.mesh, P(*lead, *spec))

        return jax.tree.map(place, tree)

    def place(self, tree: Any, *, stacked: bool = False) -> Any:
        """Put a backbone, or a task's state (`stacked`: of all tasks), on the mesh.

        Every process gives the same values; each keeps the parts of its own devices.
        """
        shardings = self.shardings(tree, stacked=stacked)
        return jax.tree.map(_global, tree, shardings)

    def put(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Make a batch of the rows that `rows` gives each process."""
        return {
            name: jax.make_array_from_process_local_data(self.batches, np.asarray(x))
            for name, x in batch.items()
        }

    def put_whole(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Make a batch that every process has the whole of."""
        return {name: _global(x, self.batches) for name, x in batch.items()}

    def collect(self, tree: Any) -> Any:
        """Bring what `place` spread back, whole, to each process's first device."""
        return jax.tree.map(_local, tree)

    def round_up(self, batch_size: int) -> int:
        """Return the next size that can be split over the devices."""
        return -(-batch_size // self._parts) * self._parts

    @property
    def _parts(self) -> int:
        return prod(self.mesh.shape[n] for n in self._over_batch)

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Say which part of a batch this process reads: `(index, count)`.

        Raises:
            ValueError: if the batch cannot be split over the devices.
        """
        parts = self._parts
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} cannot be split over {parts} devices: "
                f"choose a multiple of {parts}"
            )
        sharding = NamedSharding(self.mesh, P(self._over_batch or None))
        mine = sharding.addressable_devices_indices_map((batch_size,)).values()
        spans = [rows[0].indices(batch_size)[:2] for rows in mine if rows is not None]
        first, last = min(a for a, _ in spans), max(b for _, b in spans)
        return first // (last - first), batch_size // (last - first)

    def train_step(self, make: Callable[..., Step]) -> Callable[..., Any]:
        """Compile a training step for the mesh; it donates the state.

        Args:
            make: `make_train_step` with everything given but `axis_name` (`partial`).

        Returns:
            `step(shared, state, batch) -> (state, sums)`. With a `task` axis, state,
            batch and sums have a leading axis of tasks, a multiple of the mesh's.
        """
        over = () if self.sync_batch_norm else self._over_batch
        step = make(axis_name=over or None)
        tasks = self._over_tasks
        manual = {*tasks, *over}
        own = P(*tasks)

        def run(shared: Any, state: Any, batch: Any) -> Any:
            parts = self.shardings(shared)

            def inner(shared: Any, state: Any, batch: Any) -> Any:
                if "model" in manual:
                    shared = jax.tree.map(_gather, shared, parts)
                each = _each_task(step) if tasks else step
                return each(shared, state, batch)

            if manual:
                inner = jax.shard_map(
                    inner,
                    mesh=self.mesh,
                    axis_names=manual,
                    in_specs=(
                        jax.tree.map(lambda at: _only(at.spec, manual), parts),
                        own,
                        _only(self.batches.spec, manual),
                    ),
                    out_specs=(own, own),
                )
            new, sums = inner(shared, state, batch)
            at = self.shardings(state, stacked=bool(tasks))
            return (
                jax.lax.with_sharding_constraint(new, at),
                jax.lax.with_sharding_constraint(sums, NamedSharding(self.mesh, own)),
            )

        return jax.jit(run, donate_argnums=1)

    def eval_step(self, step: Step) -> Callable[..., Any]:
        """Compile an evaluation step of one task; every process gets its outputs."""
        return jax.jit(step, out_shardings=self.everywhere)


def stack(states: Sequence[Any]) -> Any:
    """Stack the states (or batches) of tasks of one shape on a leading axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *states)


def pmap_step(make: Callable[..., Step]) -> Callable[..., Any]:
    """Compile a training step for `pmap` over all devices of this process.

    Everything that goes in and comes out has a leading axis of devices (`replicate`
    gives it to the backbone and the state). BatchNorm is local to a device.

    Args:
        make: `make_train_step` with everything given but `axis_name` (`partial`).
    """
    return jax.pmap(make(axis_name="data"), axis_name="data", donate_argnums=1)


def replicate(tree: Any) -> Any:
    """Give every device a copy, on a leading axis, as `pmap` wants it."""
    devices = jax.local_devices()
    mesh = Mesh(np.asarray(devices), ("data",))
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(devices), *x.shape)), tree)
    return jax.device_put(copies, NamedSharding(mesh, P("data")))


def _each_task(step: Step) -> Step:
    """Run a device's tasks one after another: mapped together, their convolutions
    would become grouped ones, which are slow."""

    def run(shared: Any, state: Any, batch: Any) -> Any:
        (count,) = {x.shape[0] for x in jax.tree.leaves(batch)}
        if count == 1:
            one = jax.tree.map(lambda x: x[0], (state, batch))
            return jax.tree.map(lambda x: x[None], step(shared, *one))
        # XLA's CPU loops run convolutions on a slow path: unroll there.
        unroll = count if jax.default_backend() == "cpu" else 1
        body = lambda carry, x: (carry, step(shared, *x))  # noqa: E731
        return jax.lax.scan(body, None, (state, batch), unroll=unroll)[1]

    return run


def _gather(part: Any, at: NamedSharding) -> Any:
    if "model" not in at.spec:
        return part
    axis = at.spec.index("model")
    return jax.lax.all_gather(part, "model", axis=axis, tiled=True)


def _only(spec: P, names: Collection[str]) -> P:
    """Keep the axes of a spec that are mapped by hand."""

    def keep(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(n for n in entry if n in names) or None
        return entry if entry in names else None

    return P(*(keep(entry) for entry in spec))


def _local(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _local(jax.random.key_data(x))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return jnp.array(whole(x))


def _global(x: Any, sharding: NamedSharding) -> jax.Array:
    """Put a value that every process knows where it belongs."""
    if sharding.is_fully_addressable:
        # A copy: a donated state must not take the caller's buffers with it.
        return jnp.copy(jax.device_put(x, sharding))
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _global(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])
