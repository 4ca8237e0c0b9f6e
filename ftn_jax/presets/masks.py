"""Methods that choose among the frozen weights, or share them out among tasks."""

from functools import partial
from typing import Any

from ftn_jax.core import Init, extend, split_extras
from ftn_jax.method import Backbone, Layers, Method, Stage
from ftn_jax.nodes.mask import AffineMask, Piggyback
from ftn_jax.nodes.packing import next_task, pack, prune, start_packing
from ftn_jax.nodes.packnet import PackNet
from ftn_jax.nodes.switch import ChannelSwitch, budget
from ftn_jax.nodes.taps import TAPS, sparsity
from ftn_jax.presets.patterns import head_rules, norm_rules


def piggyback(layers: Layers, *, classes: int, **options: Any) -> Method:
    """Mask every kernel, the stem's too; keep BatchNorm as it is; train a head.

    Source: Piggyback (arXiv 1801.06519), BatchNorm frozen as its code does
    by default. Options are those of `Piggyback.init` (`ternary`, `threshold`).
    """
    rules = {layers.all_kernels: partial(Piggyback.init, **options)}
    rules |= head_rules(layers, classes)
    return Method(rules, classes, frozen_stats=True)


def wtpb(layers: Layers, *, classes: int, **options: Any) -> Method:
    """Transform every kernel by a mask and three numbers; train BatchNorm and a head.

    Source: Mancini et al. (arXiv 1805.11119). Options of `AffineMask.init`.
    """
    rules = {layers.all_kernels: partial(AffineMask.init, **options)}
    return Method(rules | norm_rules(layers) | head_rules(layers, classes), classes)


def ba2(
    layers: Layers, *, classes: int, share: float = 0.5, weight: float = 10.0
) -> Method:
    """Switch the kernels' output channels under a budget; train BatchNorm and a head.

    Source: Berriel et al. (arXiv 1905.06242); the budget, a constraint
    there, is a penalty here.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        share: of the switches that may be on.
        weight: of the penalty above it.
    """
    rules: dict[str, Init | None] = {layers.all_kernels: ChannelSwitch.init}
    return Method(
        rules | norm_rules(layers) | head_rules(layers, classes),
        classes,
        penalty=lambda delta, done: budget(delta, share=share, weight=weight),
    )


def taps(
    layers: Layers,
    *,
    classes: int,
    weight: float = 0.3,
    warmup: float = 2 / 30,
    **options: Any,
) -> Method:
    """Give the task the kernels that it needs for itself; train BatchNorm and a head.

    Source: TAPS (arXiv 2203.16708); its code adds the penalty after 2 of
    30 epochs and tries weights of 0.1 to 1.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        weight: of the penalty on the layers' scores.
        warmup: share of the steps without it.
        options: passed to `TAPS.init`.
    """
    rules: dict[str, Init | None] = {layers.all_kernels: partial(TAPS.init, **options)}
    return Method(
        rules | norm_rules(layers) | head_rules(layers, classes),
        classes,
        penalty=lambda delta, done: sparsity(delta, weight=weight) * (done >= warmup),
    )


def packnet(
    layers: Layers, *, classes: int, base_prune: float = 0.5, task_prune: float = 0.75
) -> Method:
    """Train the positions that earlier tasks left free, prune, train again, pack.

    Tasks depend on their order. BatchNorm is frozen; each task has its head. `prepare`
    prunes the base without training it again, unless a packed state lies beside the
    backbone already (`start_packing` tells how to make one from source data).

    Source: PackNet (arXiv 1711.05769); two thirds of the steps at the full
    rate, then a third at a tenth of it, as the 20 and 10 epochs of its code.

    Args:
        layers: the backbone's paths.
        classes: of the head.
        base_prune: share of the base's weights that tasks may use.
        task_prune: share of its own positions that a task leaves to the next ones.
    """

    def prepare(backbone: Backbone) -> Backbone:
        params, extras = split_extras(backbone.shared)
        if "packnet" in extras:
            return backbone
        packed = start_packing(params, layers.all_kernels, prune=base_prune)
        return backbone._replace(shared=extend(backbone.shared, packnet=packed))

    def rules(shared: Any) -> dict[str, Init | None]:
        init = partial(PackNet.init, task=next_task(shared))
        return {layers.all_kernels: init, **head_rules(layers, classes)}

    def after(backbone: Backbone, delta: Any) -> Backbone:
        return backbone._replace(shared=pack(backbone.shared, delta))

    second = Stage(1 / 3, rate=0.1, change=partial(prune, share=task_prune))
    return Method(
        rules,
        classes,
        frozen_stats=True,
        stages=(Stage(2 / 3), second),
        prepare=prepare,
        after=after,
    )
