"""Which leaves each method of the papers touches: rules by name, each with its source.

A backbone is described by a few patterns (`Layers`), so that a preset serves any
network: ours follow `RESNET`; for a network of your own write a `Layers` of its paths.
"""

from collections.abc import Callable

from ftn_jax.method import Layers, Method
from ftn_jax.presets.adapters import (
    PLACEMENTS,
    factored_adapters,
    parallel_adapters,
    rcm,
    series_adapters,
    svd_adapters,
)
from ftn_jax.presets.basic import (
    bias_only,
    bn_head,
    feature_extractor,
    fine_tuning,
    ftn,
)
from ftn_jax.presets.low_rank import dora, kadaptation, lora, ssf, svft, tucker
from ftn_jax.presets.masks import ba2, packnet, piggyback, taps, wtpb
from ftn_jax.presets.patterns import RESNET

METHODS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (
        feature_extractor,
        bn_head,
        bias_only,
        ftn,
        lora,
        dora,
        kadaptation,
        svft,
        ssf,
        tucker,
        parallel_adapters,
        series_adapters,
        svd_adapters,
        factored_adapters,
        rcm,
        piggyback,
        wtpb,
        ba2,
        taps,
        packnet,
        fine_tuning,
    )
}
"""Every preset by name: `(layers, *, classes, **options) -> Method`."""

__all__ = ["METHODS", "PLACEMENTS", "RESNET", "Layers", "Method"]
__all__ += list(METHODS)
