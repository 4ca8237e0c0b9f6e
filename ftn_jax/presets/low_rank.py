"""Low-rank and spectral updates of the kernels, each with BatchNorm and a new head.

The originals adapt transformers (LoRA, KAdaptation, SVFT, SSF) or pretrain the
factors with the backbone (Tucker). On a convolutional network these presets stand
where FTN does, on every kernel but the stem's, so that only the factors differ.
"""

from functools import partial
from typing import Any

from ftn_jax.core import Init, extend, split_extras
from ftn_jax.method import Backbone, Layers, Method
from ftn_jax.nodes.kronecker import Kronecker
from ftn_jax.nodes.lora import DoRA, LoRA
from ftn_jax.nodes.scale import scale_rules
from ftn_jax.nodes.svft import SVFT, svd_bases
from ftn_jax.nodes.tucker import orthogonality
from ftn_jax.nodes.tucker_core import tucker_cores, tucker_groups, tucker_rules
from ftn_jax.presets.patterns import head_rules, norm_rules, select


def lora(layers: Layers, *, classes: int, rank: int, **options: Any) -> Method:
    """Add LoRA to the kernels; train BatchNorm and a new head.

    Source: LoRA (arXiv 2106.09685); a convolution as k x k to R channels and then
    1 x 1, or by `form="reshape"` as in the authors' code.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        rank: of every update.
        options: passed to `LoRA.init`.
    """
    return _kernels(layers, classes, partial(LoRA.init, rank=rank, **options))


def dora(layers: Layers, *, classes: int, rank: int, **options: Any) -> Method:
    """Add DoRA to the kernels; train BatchNorm and a new head.

    Source: DoRA (arXiv 2402.09353). Options are those of `DoRA.init`.
    """
    return _kernels(layers, classes, partial(DoRA.init, rank=rank, **options))


def kadaptation(
    layers: Layers, *, classes: int, n: int = 8, rank: int = 1, **options: Any
) -> Method:
    """Add sums of Kronecker products with slow factors common to all kernels.

    Source: KAdaptation (arXiv 2203.16329); n = 32 in its ViT, which must
    divide every kernel's inputs and outputs.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        n: number and size of the slow factors.
        rank: of the fast factors.
        options: passed to `Kronecker.init`.
    """
    init = partial(Kronecker.init, n=n, rank=rank, share="kernels", **options)
    return _kernels(layers, classes, init)


def svft(layers: Layers, *, classes: int, **options: Any) -> Method:
    """Train coefficients over the kernels' singular directions, BatchNorm and a head.

    The bases lie beside the backbone, computed once.

    Source: SVFT (arXiv 2405.19597). Options are those of `SVFT.init`:
    `off_diagonals` for its banded form, `random` for its random one.
    """

    def prepare(backbone: Backbone) -> Backbone:
        params, _ = split_extras(backbone.shared)
        bases = svd_bases(params, layers.kernels)
        return backbone._replace(shared=extend(backbone.shared, svd=bases))

    method = _kernels(layers, classes, partial(SVFT.init, **options))
    return method._replace(prepare=prepare)


def ssf(layers: Layers, *, classes: int, **options: Any) -> Method:
    """Scale and shift the output of every norm; keep the statistics; train a head.

    Source: SSF (arXiv 2210.08823). On a network whose every convolution is
    followed by a norm this reaches all that SSF after the convolution would.
    Options are those of `Scale.init`.
    """
    if layers.norms is None:
        raise ValueError("ssf scales the norms; these layers name none")
    norms = layers.norms

    def rules(shared: Any) -> dict[str, Init | None]:
        paths = select(shared, norms)
        places = {path.rpartition("/")[0] for path in paths.split("|")}
        scaled = scale_rules(split_extras(shared)[0], "|".join(places), **options)
        return {**scaled, **head_rules(layers, classes)}

    return Method(rules, classes, frozen_stats=True)


STAGES = r"(?P<label>layer\d+)_(?P<block>\d+)/conv(?P<conv>\d+)/kernel"


def tucker(
    layers: Layers, *, classes: int, weight: float = 1e-3, stages: str = STAGES
) -> Method:
    """Train the factors of each stage's latent Tucker form, BatchNorm and a new head.

    Kernels of a stage that are smaller than the others (its first) are filled up with
    zeros in the core.

    Source: Bulat et al. (arXiv 1904.06345), on a plain checkpoint: the
    stacked kernels are the core, the factors start at the identity.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        weight: of the penalty that keeps the factors orthogonal.
        stages: pattern with groups named label, block and conv; see `tucker_groups`.
    """

    def prepare(backbone: Backbone) -> Backbone:
        params, _ = split_extras(backbone.shared)
        cores = tucker_cores(params, tucker_groups(params, stages), pad=True)
        return backbone._replace(shared=extend(backbone.shared, tucker=cores))

    def rules(shared: Any) -> dict[str, Init | None]:
        params, extras = split_extras(shared)
        if "tucker" not in extras:
            raise ValueError("no cores beside the backbone: call the method's prepare")
        nodes = tucker_rules(tucker_groups(params, stages), extras["tucker"])
        return {**nodes, **norm_rules(layers), **head_rules(layers, classes)}

    return Method(
        rules,
        classes,
        penalty=lambda delta, done: orthogonality(delta, weight=weight),
        prepare=prepare,
    )


def _kernels(layers: Layers, classes: int, init: Init) -> Method:
    rules = {layers.kernels: init} | norm_rules(layers) | head_rules(layers, classes)
    return Method(rules, classes)
