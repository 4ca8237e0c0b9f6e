"""One file for each family of methods; subclassing `Node` is the registration."""

from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter
from ftn_jax.nodes.adapter_svd import FactoredAdapter, SharedBasisAdapter
from ftn_jax.nodes.cp import CP
from ftn_jax.nodes.kronecker import Kronecker
from ftn_jax.nodes.lora import DoRA, LoRA
from ftn_jax.nodes.mask import AffineMask, Piggyback
from ftn_jax.nodes.packnet import PackNet
from ftn_jax.nodes.rcm import RCM
from ftn_jax.nodes.replace import Replace
from ftn_jax.nodes.scale import Scale
from ftn_jax.nodes.stacked import Stacked
from ftn_jax.nodes.svft import SVFT
from ftn_jax.nodes.switch import ChannelSwitch
from ftn_jax.nodes.taps import TAPS
from ftn_jax.nodes.tucker import Tucker

__all__ = [
    "CP",
    "RCM",
    "SVFT",
    "TAPS",
    "AffineMask",
    "ChannelSwitch",
    "DoRA",
    "FactoredAdapter",
    "Kronecker",
    "LoRA",
    "PackNet",
    "ParallelAdapter",
    "Piggyback",
    "Replace",
    "Scale",
    "SeriesAdapter",
    "SharedBasisAdapter",
    "Stacked",
    "Tucker",
]
