"""One file for each family of methods; subclassing `Node` is the registration."""

from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.replace import Replace

__all__ = ["CP", "Replace"]
