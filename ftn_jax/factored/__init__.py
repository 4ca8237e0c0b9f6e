"""The factored path: the same numbers as `merged`, without full kernels' gradients."""

from ftn_jax.factored.cost import Cost, Work
from ftn_jax.factored.factors import Polyadic, polyadic
from ftn_jax.factored.forward import Factored, factored
from ftn_jax.factored.plan import Planned

__all__ = ["Cost", "Factored", "Planned", "Polyadic", "Work", "factored", "polyadic"]
