"""Residual adapters and their relatives: 1x1 kernels beside or behind frozen ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ftn_jax.compress import factor_adapters
from ftn_jax.core import Init, extend, split_extras
from ftn_jax.method import Backbone, Layers, Method, Stage
from ftn_jax.nodes.adapter import ParallelAdapter
from ftn_jax.nodes.adapter_series import SeriesAdapter
from ftn_jax.nodes.adapter_svd import FactoredAdapter
from ftn_jax.nodes.rcm import RCM, weight_bases
from ftn_jax.nodes.replace import Replace
from ftn_jax.presets.patterns import head_rules, is_spatial, norm_rules, select

PLACEMENTS = {
    "all": ".*",
    "early": "layer1_.*",
    "mid": "layer2_.*",
    "late": "layer3_.*",
    "half": r".*conv2/.*",
}
"""Where adapters stand (Rebuffi et al., arXiv 1803.10082), on our ResNets."""


def parallel_adapters(
    layers: Layers, *, classes: int, placement: str = "all", **options: Any
) -> Method:
    """Add a 1x1 adapter beside every 3x3 convolution; train BatchNorm and a head.

    Source: Rebuffi et al. (arXiv 1803.10082), the stem included as in its code;
    weight decay of the group "adapters" shrinks them towards the backbone (0.002 for
    small data sets, 5e-4, 1e-4 for large ones).

    Args:
        layers: the backbone's paths.
        classes: of the head.
        placement: a name of `PLACEMENTS` or a regular expression of whole paths.
        options: passed to `ParallelAdapter.init` (`dropout`, `init`).
    """
    init = partial(ParallelAdapter.init, **options)
    return _spatial(layers, classes, placement, init)


def series_adapters(
    layers: Layers, *, classes: int, placement: str = "all", **options: Any
) -> Method:
    """Put a residual 1x1 adapter behind every 3x3 convolution.

    Source: Rebuffi et al. (arXiv 1705.08045), without the inner BatchNorm of
    its code. Arguments as `parallel_adapters`, options of `SeriesAdapter.init`.
    """
    init = partial(SeriesAdapter.init, **options)
    return _spatial(layers, classes, placement, init)


def svd_adapters(
    layers: Layers, *, classes: int, rank: int | float = 0.5, share: float = 0.7
) -> Method:
    """Train parallel adapters, cut each to a low rank, and train its two factors.

    Source: Rebuffi et al. (arXiv 1803.10082), per-task compression. The
    joint compression over tasks is `ftn_jax.compress.compress_jointly`.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        rank: K, or its share of min(C_in, C_out).
        share: of the steps before compressing.
    """

    def change(delta: Any) -> Any:
        return factor_adapters(delta, rank=rank).delta

    stages = (Stage(share), Stage(1 - share, change=change))
    return parallel_adapters(layers, classes=classes)._replace(stages=stages)


def factored_adapters(layers: Layers, *, classes: int, rank: int | float) -> Method:
    """Train the two factors of low-rank parallel adapters from the start.

    Source: the form of Rebuffi et al. (arXiv 1803.10082) after compression, without
    the full adapters before.
    """
    init = partial(FactoredAdapter.init, rank=rank)
    return _spatial(layers, classes, "all", init)


def rcm(
    layers: Layers,
    *,
    classes: int,
    bases: Callable[[Backbone, str], Any] | None = None,
    **options: Any,
) -> Method:
    """Reparameterize every 3x3 kernel as a fixed filter bank and a task's modulator.

    The shortcuts' 1x1 kernels are copied whole, as in the original.

    Source: RCM (arXiv 2007.12540).

    Args:
        layers: the backbone's paths.
        classes: of the head.
        bases: `(backbone, pattern) -> {path: {"u": (C_out, C_out)}}`. Default: the
            weights' left singular vectors; the paper's are the principal directions
            of the responses to its source images, see `ftn_jax.responses`.
        options: passed to `RCM.init`.
    """

    def prepare(backbone: Backbone) -> Backbone:
        params, _ = split_extras(backbone.shared)
        pattern = select(params, layers.all_kernels, is_spatial)
        if bases is None:
            found = weight_bases(params, pattern)
        else:
            found = bases(backbone, pattern)
        return backbone._replace(shared=extend(backbone.shared, pca=found))

    def rules(shared: Any) -> dict[str, Init | None]:
        kernels = select(shared, layers.all_kernels)
        spatial = select(shared, layers.all_kernels, is_spatial)
        found: dict[str, Init | None] = {spatial: partial(RCM.init, **options)}
        if {*kernels.split("|")} - {*spatial.split("|")}:
            found[kernels] = partial(Replace.init, group="weights")
        return found | norm_rules(layers) | head_rules(layers, classes)

    return Method(rules, classes, prepare=prepare)


def _spatial(layers: Layers, classes: int, placement: str, init: Init) -> Method:
    within = PLACEMENTS.get(placement, placement)

    def rules(shared: Any) -> dict[str, Init | None]:
        pattern = f"(?={within}$)({layers.all_kernels})"
        found: dict[str, Init | None] = {select(shared, pattern, is_spatial): init}
        return found | norm_rules(layers) | head_rules(layers, classes)

    return Method(rules, classes)
