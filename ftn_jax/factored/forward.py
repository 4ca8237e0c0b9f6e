"""Run `(shared, delta)` without forming the gradient of any full kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Key

from ftn_jax.apply import Apply
from ftn_jax.core import complete, materialize, split_extras
from ftn_jax.factored import linen, nnx
from ftn_jax.factored.factors import Factors
from ftn_jax.factored.hooks import Branch, Chain, Companion
from ftn_jax.factored.plan import Choose, Planned, candidates, decide
from ftn_jax.factored.probe import probe
from ftn_jax.forward import cast, refuse_explicit
from ftn_jax.paths import path_name


@dataclass(frozen=True)
class Factored:
    """A `Forward` that gives `merged`'s numbers for less work.

    A low-rank node needs no gradient of its full kernel, which is as much work as a
    forward pass. Its factors' gradient comes along the low-rank path: a convolution's
    inputs taken to `rank` channels, shifted over the taps, contracted with the
    outputs' gradient. Forward, the merged kernels run, or, where kernels are large
    and images small, the low-rank path beside the frozen ones.

    The network is any Flax Linen or NNX one, unchanged. Weights that it uses in
    another way than Flax's Conv, Dense and DenseGeneral layers do are materialized
    with their ordinary gradient, and so are nodes that are no sum of outer products:
    the numbers are `merged`'s in any case. To find out, the network is traced once
    more, without being run; jit the step. There is reverse-mode differentiation only
    (no `jax.jvp`), and where kernels are merged it is refused to differentiate a
    gradient by the factors. In a `jax.shard_map` of your own, cast the delta to
    varying first (`jax.lax.pcast`), as `make_train_step` does, and sum its gradient.

    Attributes:
        choose: `"auto"`: for each weight the cheapest way by counted work; `"chain"`,
            `"branch"` or `"kernel"` (see `Planned`) wherever there is a choice; or a
            function `(path, work) -> str`.
        strict: raise where a full gradient is formed for want of a hook or of a
            low-rank form.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from ftn_jax import make_delta
        >>> from ftn_jax.apply import from_linen
        >>> from ftn_jax.nodes import LoRA
        >>> model, x = nn.Dense(64), jnp.ones((32, 64))
        >>> shared = model.init(jax.random.key(0), x)["params"]
        >>> rules = {"kernel": lambda key, w: LoRA.init(key, w, rank=2)}
        >>> delta = make_delta(jax.random.key(1), shared, rules)
        >>> apply = from_linen(model, train_options={}, eval_options={})
        >>> (row,) = Factored().plan(apply, shared, delta, {}, {"image": x})
        >>> row.path, row.op, row.choice, row.work.kernel.flops > row.work.branch.flops
        ('kernel', 'dot', 'branch', True)
    """

    choose: Choose = "auto"
    strict: bool = False

    def __call__(
        self,
        apply: Apply,
        shared: Any,
        delta: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
        compute_dtype: Any = None,
    ) -> tuple[Any, Any]:
        """Return the outputs and the new mutable state, as `merged` does.

        Raises:
            ValueError: if `strict`, naming the weights whose full gradient is formed;
                or if the batch is split over mesh axes of the type Explicit.
        """
        refuse_explicit(batch)
        run = partial(_run, apply, train=train)
        arguments = model_state, cast(batch, compute_dtype), key
        plan, factors = self._plan(run, shared, delta, arguments, compute_dtype)
        if self.strict:
            _refuse(plan)
        beside = {row.path for row in plan if row.choice == "branch"}
        nodes = [
            None if path in beside else node
            for path, _, node in complete(shared, delta)
        ]
        nodes = jax.tree.structure(split_extras(shared)[0]).unflatten(nodes)
        params = cast(materialize(shared, nodes), compute_dtype)
        # The factors' gradient comes beside the kernel's: it must not count twice.
        params = jax.tree_util.tree_map_with_path(
            lambda p, w: jax.lax.stop_gradient(w) if path_name(p) in factors else w,
            params,
        )
        companions = {
            path: Branch(f) if path in beside else Chain(f)
            for path, f in factors.items()
        }
        return run(params, companions, *arguments)

    def plan(
        self,
        apply: Apply,
        shared: Any,
        delta: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        *,
        train: bool = True,
        key: Key[Array, ""] | None = None,
        compute_dtype: Any = None,
    ) -> list[Planned]:
        """List what happens to each weight that has a node; nothing is run.

        The arguments are a call's; any array may be a `jax.ShapeDtypeStruct`.
        """
        plan: list[Planned] = []

        def look(shared: Any, delta: Any, *arguments: Any) -> None:
            run = partial(_run, apply, train=train)
            plan.extend(self._plan(run, shared, delta, arguments, compute_dtype)[0])

        jax.eval_shape(
            lambda *trees: look(*trees[:3], cast(trees[3], compute_dtype), key),
            *(shared, delta, model_state, batch),
        )
        return plan

    def _plan(
        self,
        run: Callable[..., Any],
        shared: Any,
        delta: Any,
        arguments: tuple[Any, ...],
        compute_dtype: Any,
    ) -> tuple[list[Planned], dict[str, Factors]]:
        entries = complete(shared, delta)
        paths = candidates(entries)
        reached = {}
        if paths:
            params = jax.eval_shape(
                lambda *trees: cast(materialize(*trees), compute_dtype), shared, delta
            )
            reached = probe(run, params, *arguments, paths=paths)
        return decide(entries, reached, self.choose)


def _run(
    apply: Apply,
    params: Any,
    companions: Mapping[str, Companion],
    *arguments: Any,
    train: bool,
) -> tuple[Any, Any]:
    """Run the network with companions beside its kernels."""
    model_state, batch, key = arguments
    if nnx.is_state(params):
        context = nnx.hooked(companions)
    else:
        params, context = linen.lay_beside(params, companions), linen.hooked()
    with context:  # inside the traced function: a compiled one does not know of it
        return apply(params, model_state, batch, train=train, key=key)


def _refuse(plan: list[Planned]) -> None:
    if left := [f"{row.path} ({row.why})" for row in plan if row.wasteful]:
        raise ValueError(
            "strict: the full gradient of these weights would be formed: "
            f"{'; '.join(left)}; leave out strict, or give them other nodes"
        )


factored = Factored()
"""The `Forward` with its defaults: `make_train_step(apply, tx, forward=factored)`."""
