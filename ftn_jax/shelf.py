"""Rows of a table from the shelf of methods: which, of what size, at what rates."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ftn_jax.method import Backbone
from ftn_jax.nodes.cp import CPInit
from ftn_jax.presets import METHODS
from ftn_jax.presets.budget import KNOBS, fit_to, planned_groups
from ftn_jax.sweep import ChooseOn, Contender

MethodName = Literal[
    "all",
    "feature_extractor",
    "bn_head",
    "bias_only",
    "ftn",
    "lora",
    "dora",
    "kadaptation",
    "svft",
    "ssf",
    "tucker",
    "parallel_adapters",
    "series_adapters",
    "svd_adapters",
    "factored_adapters",
    "rcm",
    "piggyback",
    "wtpb",
    "ba2",
    "taps",
    "packnet",
    "fine_tuning",
]
# What a preset needs to be told; where the papers say so, their values.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "factored_adapters": {"rank": 0.5},
}
LABELS = {
    "bn_head": "BN + head",
    "lora": "LoRA",
    "dora": "DoRA",
    "kadaptation": "KAdaptation",
    "svft": "SVFT",
    "ssf": "SSF",
    "tucker": "latent Tucker",
    "rcm": "RCM",
    "wtpb": "WTPB",
    "ba2": "BA2",
    "taps": "TAPS",
    "packnet": "PackNet",
    "fine_tuning": "fine-tuning",
}


@dataclass(frozen=True)
class Shelf:
    """Settings of the rows, to be among those of an experiment."""

    methods: tuple[MethodName, ...] = (
        "feature_extractor",
        "bn_head",
        "ftn",
        "fine_tuning",
    )
    """Rows of the table: names of ftn_jax.presets, or all of them."""
    budget: float | None = None
    """Give every method that comes in sizes the one nearest to this share of the
    backbone (0.05), norms included; default: its published size."""
    ranks: tuple[int, ...] = (1, 10)
    """Ranks of the FTN rows, without a budget."""
    inits: tuple[CPInit, ...] = ("taps",)
    """Inits of the FTN rows; see CP.init."""
    rates: tuple[float, ...] = (8e-3,)
    """SGD's peak rate on norms and head, without factors; several are candidates."""
    factor_rates: tuple[float, ...] = (5e-3,)
    """Adam's peak rate on factors (FTN, LoRA, ...); several are candidates."""
    ftn_rate: float = 8e-3
    """SGD's peak rate on norms and head, beside factors and masks."""
    mask_rates: tuple[float, ...] = (1e-4,)
    """Adam's peak rate on masks and switches; several are candidates."""
    adapter_rates: tuple[float, ...] = (1e-1,)
    """SGD's peak rate on residual adapters; several are candidates."""
    adapter_decay: float = 5e-4
    """Weight decay of residual adapters, which shrinks them to the backbone."""
    baseline_decay: float = 0.0
    """Weight decay of rows without factors, masks or adapters, on all they train."""
    fine_tuning_rates: tuple[float, ...] = (5e-3,)
    """SGD's peak rate on whole weights (fine-tuning, TAPS, PackNet); several are
    candidates."""
    choose_fine_tuning_on: ChooseOn | None = None
    """Where rates of whole weights are chosen, which differ more from domain to domain:
    on each, or on the first; default: where all others are."""


def contenders(cfg: Shelf, backbone: Backbone) -> dict[str, Contender]:
    """List the rows of the table: each method's rules and candidate rates."""
    names = [name for name in METHODS if {name, "all"} & {*cfg.methods}]
    rows: dict[str, Contender] = {}

    def add(label: str, name: str, **options: Any) -> None:
        rows[label] = contender(cfg, backbone, name, **options)

    for name in names:
        label = LABELS.get(name, name.replace("_", " "))
        if name == "ftn":
            for init in cfg.inits:
                ranks = cfg.ranks
                if cfg.budget is not None:
                    fit = fit_to(
                        backbone, METHODS[name], name=name, share=cfg.budget, init=init
                    )
                    ranks = (fit["rank"],)
                for rank in ranks:
                    add(f"FTN R={rank}, {init}", name, rank=rank, init=init)
            continue
        options = OPTIONS.get(name, {})
        if cfg.budget is not None:
            # Adapters cut to a low rank have the size of those that start with it.
            knob = {"svd_adapters": "factored_adapters"}.get(name, name)
            if knob in KNOBS:
                options = fit_to(backbone, METHODS[knob], name=knob, share=cfg.budget)
        size = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in options.items())
        add(f"{label}, {size}" if size else label, name, **options)
    return rows


def contender(cfg: Shelf, backbone: Backbone, name: str, **options: Any) -> Contender:
    """Make a row: a method of the shelf, with its rates and weight decay."""
    method = partial(METHODS[name], backbone.layers, **options)
    groups = planned_groups(backbone, method(classes=2))
    decay = {"adapters": cfg.adapter_decay} if "adapters" in groups else {}
    if not groups - {"norm", "head", "weights"}:
        decay = dict.fromkeys(groups, cfg.baseline_decay)
    return Contender(
        lambda classes: method(classes=classes),
        candidates(cfg, groups),
        decay,
        choose_on=cfg.choose_fine_tuning_on if "weights" in groups else None,
        details={"rank": options["rank"]} if name == "ftn" else {},
    )


def candidates(cfg: Shelf, groups: set[str]) -> list[dict[str, float]]:
    """List the rates to try for a delta of these optimizer groups."""
    rest = groups & {"norm", "head"}
    own = groups - rest
    if not own:
        return [dict.fromkeys(rest, rate) for rate in cfg.rates]
    if "weights" in own:
        return [dict.fromkeys(groups, rate) for rate in cfg.fine_tuning_rates]
    rates = {
        "factors": cfg.factor_rates,
        "masks": cfg.mask_rates,
        "adapters": cfg.adapter_rates,
    }
    (group,) = own
    base = dict.fromkeys(rest, cfg.ftn_rate)
    return [base | {group: rate} for rate in rates[group]]
