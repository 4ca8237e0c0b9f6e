"""The transformer table: one pretrained ViT, several domains, few parameters each.

    python -m experiments.clip_transfer --weights clip_vit_b32.safetensors --data DIR

With `--weights` (a file or a hub name) the defaults are the papers': CLIP ViT-B/32 at
224 px without augmentation, batches of 64, 100 epochs, R = 4, one learning rate for all
that is trained, chosen on a fifth of the training images from 5e-6 and the powers of
ten from 1e-6 to 1e-1 (PEViT's grid), by SGD with momentum (the papers do not name the
optimizer). `--embeddings DIR` starts each head at DIR/DOMAIN.npz, text embeddings of
its classes, as the papers' baselines do.

Without `--weights` a small ViT is trained first, on `--pretrain-data` or on drawn
capital letters, by AdamW with warm-up, and adapted to the domains of `--data` or to
drawn ones: some minutes on two CPU cores.

DIR holds one `.npz` file or image folder for each domain, see
`experiments.multi_domain`. Beside the other experiments' table, `transformer.md` has
the FLOPs of one training step as compiled and the seconds of an epoch after compiling.

Expected parameters on ViT-B/32: FTN Q+V 81,024, FTN O 40,512, LoRA 147,456, SVFT
55,296 (FTN, arXiv 2310.06124, Table 3, prints 147.2K for LoRA), KAdaptation 50,176
(prints 80.7K).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save

from ftn_jax import materialize
from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.apply import Apply, from_linen
from ftn_jax.atomic import write_atomic
from ftn_jax.command import launch, progress_bar
from ftn_jax.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Domain,
    Normalize,
    RandomCrop,
    ResizeShort,
    Step,
    ToRGB,
    find_domains,
    load_domain,
    steps_per_epoch,
)
from ftn_jax.data.embedded import embedded_source, embedded_targets
from ftn_jax.method import Backbone, Method
from ftn_jax.models import VITS, ViT, vit_tiny_cifar
from ftn_jax.presets.budget import planned_groups
from ftn_jax.presets.text_head import head_from_embeddings
from ftn_jax.presets.vit import VIT, VIT_METHODS, fine_tuning
from ftn_jax.pretrained import load_vit
from ftn_jax.results import Results
from ftn_jax.resume import StateFolder
from ftn_jax.step_cost import StepCost, cost_table, measure_step
from ftn_jax.sweep import Contender, sweep
from ftn_jax.tables import report
from ftn_jax.trial import short_hash

MethodName = Literal[
    "linear_probe",
    "layer_norm",
    "bias_only",
    "ftn_o",
    "ftn_qv",
    "ftn_attention",
    "ftn_attention_mlp",
    "lora_qv",
    "kadaptation_qv",
    "svft_all",
    "ssf_all",
    "fine_tuning",
]
LABELS = {
    "linear_probe": "feature extractor",
    "layer_norm": "LayerNorm",
    "bias_only": "biases",
    "ftn_o": "FTN O",
    "ftn_qv": "FTN Q+V",
    "ftn_attention": "FTN attention",
    "ftn_attention_mlp": "FTN attention+MLP",
    "lora_qv": "LoRA",
    "kadaptation_qv": "KAdaptation",
    "svft_all": "SVFT",
    "ssf_all": "SSF",
    "fine_tuning": "fine-tuning",
}
NORMALIZE = {
    "clip": Normalize(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    "imagenet": Normalize(IMAGENET_MEAN, IMAGENET_STD),
    "half": Normalize((0.5,) * 3, (0.5,) * 3),
}


class Protocol(NamedTuple):
    """What a flag that is not given means, with and without weights."""

    backbone: str
    image_px: int
    normalization: Literal["clip", "imagenet", "half"]
    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    rates: tuple[float, ...]
    own_rates: tuple[float, ...]
    fine_tuning_rates: tuple[float, ...]


PAPER = Protocol(
    *("clip_vit_b32", 224, "clip", 100, 64, "sgd"),
    rates=(1e-6, 5e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    own_rates=(),
    fine_tuning_rates=(),
)
SMALL = Protocol(
    *("small", 24, "half", 10, 64, "adam"),
    rates=(3e-3, 1e-2),
    own_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    fine_tuning_rates=(1e-4, 3e-4, 1e-3),
)


@dataclass(frozen=True)
class Config:
    """Settings of the transformer table; None stands for the protocol's."""

    workdir: Path = Path("runs/clip_transfer")
    """Folder for the tables, the picture, the saved tasks and a small backbone."""
    weights: str | None = None
    """Checkpoint (.safetensors, .npz, .pth) or hub name; None trains a small ViT."""
    data: Path | None = None
    """Folder of the domains; None for drawn ones."""
    domains: tuple[str, ...] = ()
    """Names of the domains; all if empty."""
    methods: tuple[MethodName, ...] = (
        "linear_probe",
        "ftn_o",
        "ftn_qv",
        "lora_qv",
        "kadaptation_qv",
        "svft_all",
        "fine_tuning",
    )
    """Rows of the table: names of ftn_jax.presets.vit."""
    embeddings: Path | None = None
    """Folder of text embeddings (DOMAIN.npz or .safetensors) that heads start at."""
    embeddings_scale: float = 100.0
    """What these are multiplied by, once normalised."""
    feature_norm: bool = False
    """Put a BatchNorm without scale and bias before the head, as PEViT does."""
    shots: int | None = None
    """Use so many training images of each class; None for all."""
    rank: int = 4
    """Rank of FTN and LoRA."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of init, data order and augmentation; the table gives mean and std."""
    validation: float = 0.2
    """Share of the training images that chooses the rates."""
    backbone: str | None = None
    """Name in ftn_jax.models.VITS, or "small"; clip_vit_b32 with weights."""
    width: int = 96
    """Channels of a small ViT, a multiple of 3."""
    depth: int = 4
    """Blocks of a small ViT."""
    image_px: int | None = None
    """Height and width of the images; 224 with weights, else 24."""
    normalization: Literal["clip", "imagenet", "half"] | None = None
    """Mean and std of the pixels; half is 0.5 and 0.5. clip with weights, else half."""
    epochs: int | None = None
    """Passes over the training images; 100 with weights, else 10."""
    batch_size: int | None = None
    """Images per step; 64."""
    optimizer: Literal["sgd", "adam"] | None = None
    """Of all that is trained; sgd with weights, else adam."""
    rates: tuple[float, ...] | None = None
    """Candidate peak rates of heads and norms."""
    own_rates: tuple[float, ...] | None = None
    """Candidates of what methods add; heads then have the first of rates. Empty: one
    rate for both."""
    fine_tuning_rates: tuple[float, ...] | None = None
    """The same for whole weights."""
    weight_decay: float = 0.0
    """Of all that is trained."""
    crop_padding: int = 0
    """Training images are cropped at random after padding by so many pixels."""
    max_train: int | None = None
    """Use at most so many training images of each domain, balanced over classes."""
    max_test: int | None = None
    """Use at most so many test images of each domain."""
    pretrain_data: Path | None = None
    """Domain (.npz or image folder) of a small ViT's pretraining; None draws one."""
    pretrain_epochs: int = 20
    """Passes over it."""
    pretrain_rate: float = 1e-3
    """AdamW's peak rate there, after two epochs of warm-up."""
    pretrain_decay: float = 0.05
    """AdamW's weight decay there."""
    pretrain_limit: int | None = None
    """Use at most so many images of it."""
    bf16: bool = False
    """Compute in bfloat16; factors, norms and optimizer stay in float32."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/clip_transfer_tiny"),
            domains=("digits",),
            methods=("linear_probe", "ftn_qv", "fine_tuning"),
            width=24,
            depth=2,
            epochs=1,
            rates=(3e-3,),
            own_rates=(3e-3,),
            fine_tuning_rates=(1e-3,),
            max_train=128,
            max_test=64,
            pretrain_epochs=3,
            pretrain_limit=128,
        )


def protocol(cfg: Config) -> Protocol:
    """Fill in what was not asked for."""
    plain = PAPER if cfg.weights else SMALL
    given = {name: getattr(cfg, name) for name in Protocol._fields}
    return plain._replace(**{k: v for k, v in given.items() if v is not None})


def build(cfg: Config, classes: int) -> ViT:
    """Build the network."""
    p = protocol(cfg)
    options = {"image_px": p.image_px, "feature_norm": cfg.feature_norm}
    if p.backbone == "small":
        return vit_tiny_cifar(classes, width=cfg.width, depth=cfg.depth, **options)
    if p.backbone not in VITS:
        raise ValueError(
            f"--backbone {p.backbone}: unknown, known are {sorted([*VITS, 'small'])}"
        )
    return VITS[p.backbone](classes, **options)


def transforms(cfg: Config, crop_padding: int) -> tuple[Compose, Compose]:
    """Make the training and the evaluation transform."""
    p = protocol(cfg)
    resize: list[Step] = [ResizeShort(p.image_px), CenterCrop(p.image_px)]
    last: list[Step] = [ToRGB(), NORMALIZE[p.normalization]]
    random: list[Step] = []
    if crop_padding:
        random = [RandomCrop(p.image_px, padding=crop_padding)]
    return Compose(resize + random + last), Compose(resize + last)


def load_domains(cfg: Config) -> list[Domain]:
    """Read the domains that were asked for, at the sizes asked for."""
    if cfg.data is not None:
        found = find_domains(cfg.data, cfg.domains or None)
        domains = [load_domain(path) for path in found.values()]
    else:
        drawn = {d.name: d for d in embedded_targets()}
        if unknown := sorted({*cfg.domains} - {*drawn}):
            raise ValueError(
                f"--domains {unknown}: without --data these are {[*drawn]}"
            )
        domains = [drawn[name] for name in cfg.domains or drawn]
    limited = []
    for domain in domains:
        shots = cfg.shots and cfg.shots * domain.num_classes
        sizes = [n for n in (shots, cfg.max_train) if n is not None]
        train = min(sizes) if sizes else None
        limited.append(domain.limited(train=train, test=cfg.max_test))
    return limited


def load_backbone(cfg: Config) -> Backbone:
    """Read the network's weights, or train a small one."""
    if cfg.weights:
        model = build(cfg, classes=1)  # each task has a head of its own
        params, stats = load_vit(cfg.weights, model, new_head=True)
    else:
        model, params, stats = pretrained(cfg)
    state = {"batch_stats": stats} if stats else {}
    return Backbone(_network(model), params, state, VIT)


def _network(model: ViT) -> Callable[[int], Apply]:
    return lambda classes: from_linen(model.clone(num_classes=classes))


def pretrained(cfg: Config) -> tuple[ViT, Any, Any]:
    """Train the backbone on the source domain, or read it from the workdir."""
    place = cfg.pretrain_data
    source = embedded_source() if place is None else load_domain(place)
    source = source.limited(train=cfg.pretrain_limit, test=cfg.max_test)
    model, p = build(cfg, source.num_classes), protocol(cfg)
    image = jnp.zeros((1, *model.image_shape))
    fresh = jax.jit(model.init)(jax.random.key(0), image)
    stats = fresh.get("batch_stats", {})
    settings = [(k, v) for k, v in asdict(cfg).items() if k.startswith("pretrain")]
    name = short_hash(model, settings, p.batch_size, p.normalization)
    path = cfg.workdir / f"backbone_{name}.safetensors"
    if not path.exists():
        plain = model.clone(feature_norm=False)
        start = Backbone(_network(plain), fresh["params"], {}, VIT)
        train_transform, eval_transform = transforms(cfg, p.image_px // 8)
        groups = ("weights", "head")
        adaptation = Adaptation(
            start,
            fine_tuning(VIT, classes=source.num_classes),
            Recipe(
                epochs=cfg.pretrain_epochs,
                batch_size=p.batch_size,
                rates=dict.fromkeys(groups, cfg.pretrain_rate),
                warmup_epochs=min(2, cfg.pretrain_epochs / 2),
                weight_decay={"weights": cfg.pretrain_decay},
                adam=groups,
                compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
            ),
            source.train,
            transform=train_transform,
        )
        with progress_bar(
            "pretraining", steps=adaptation.steps, batch_size=p.batch_size
        ) as on_log:
            folder = StateFolder(path.with_suffix(".state"))
            task = adaptation.run(0, folder=folder, on_log=on_log).task
        evaluator = Evaluator(
            start, classes=source.num_classes, transform=eval_transform
        )
        accuracy = evaluator.score(task, source.test)["accuracy"]
        print(f"backbone: {accuracy:.1%} on {source.name}", flush=True)
        flat = flatten_dict(materialize(start.shared, task.delta), sep="/")
        cfg.workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({k: np.asarray(x) for k, x in flat.items()}))
        folder.clear()
    flat = {k: jnp.asarray(x) for k, x in load_file(path).items()}
    return model, unflatten_dict(flat, sep="/"), stats


def contenders(
    cfg: Config, backbone: Backbone, domain: Domain | None = None
) -> dict[str, Contender]:
    """List the rows of the table: each method's rules and candidate rates.

    Args:
        cfg: the settings.
        backbone: the network.
        domain: whose text embeddings the heads start at; None for random heads.
    """
    head = None
    if domain is not None and cfg.embeddings is not None:
        files = [cfg.embeddings / f"{domain.name}{s}" for s in (".npz", ".safetensors")]
        file = next((f for f in files if f.exists()), files[0])
        head = head_from_embeddings(file, scale=cfg.embeddings_scale)
    common = math.gcd(32, build(cfg, 1).width)
    options: dict[str, dict[str, Any]] = {"kadaptation_qv": {"n": common}}
    for name in ("ftn_o", "ftn_qv", "ftn_attention", "ftn_attention_mlp", "lora_qv"):
        options[name] = {"rank": cfg.rank}
    rows = {}
    for name in (n for n in VIT_METHODS if n in cfg.methods):
        make = partial(VIT_METHODS[name], VIT, head=head, **options.get(name, {}))
        classes = domain.num_classes if domain else 2
        groups = planned_groups(backbone, make(classes=classes)._replace(prepare=None))
        decay = dict.fromkeys(groups, cfg.weight_decay) if cfg.weight_decay else {}
        rows[LABELS[name]] = Contender(
            partial(_make, make), candidates(protocol(cfg), groups), decay
        )
    return rows


def _make(make: Callable[..., Method], classes: int) -> Method:
    return make(classes=classes)


def candidates(p: Protocol, groups: set[str]) -> list[dict[str, float]]:
    """List the rates to try for a delta of these optimizer groups."""
    own = groups - {"head", "norm"}
    grid = p.fine_tuning_rates if "weights" in own else p.own_rates
    if not own or not grid:
        return [dict.fromkeys(groups, rate) for rate in p.rates]
    base = dict.fromkeys(groups, p.rates[0])
    return [base | dict.fromkeys(own, rate) for rate in grid]


def costs(
    cfg: Config, backbone: Backbone, domain: Domain, rows: dict[str, Contender]
) -> dict[str, StepCost]:
    """Measure every row's training step once, on one domain; keep it in the workdir."""
    path = cfg.workdir / "costs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, row in rows.items():
        if name not in known:
            known[name] = measure_step(
                backbone,
                row.method(domain.num_classes),
                replace(recipe(cfg), rates=row.rates[0]),
                domain.train,
                transform=transforms(cfg, cfg.crop_padding)[0],
            )
            write_atomic(path, json.dumps(known, indent=1).encode())
    return {name: StepCost(*known[name]) for name in rows}


def recipe(cfg: Config) -> Recipe:
    """Say how to train, but for the rates."""
    p = protocol(cfg)
    groups = ("head", "norm", "factors", "weights")
    return Recipe(
        epochs=p.epochs,
        batch_size=p.batch_size,
        rates={},
        adam=groups if p.optimizer == "adam" else (),
        compute_dtype=jnp.bfloat16 if cfg.bf16 else None,
    )


def main(cfg: Config) -> Results:
    """Adapt the backbone to every domain by every method; print the tables."""
    p, domains = protocol(cfg), load_domains(cfg)
    results = Results(
        cfg.workdir,
        experiment="clip_transfer",
        config=asdict(cfg),
        free=("workdir", "data", "domains", "methods", "seeds"),
    )
    backbone = load_backbone(cfg)
    train_transform, eval_transform = transforms(cfg, cfg.crop_padding)
    # Heads that start at embeddings differ from one domain to the next.
    parts = [[d] for d in domains] if cfg.embeddings else [domains]
    for part in parts:
        rows = contenders(cfg, backbone, part[0] if cfg.embeddings else None)
        sweep(
            backbone,
            part,
            rows,
            results=results,
            recipe=recipe(cfg),
            train_transform=train_transform,
            eval_transform=eval_transform,
            seeds=cfg.seeds,
            validation=cfg.validation,
            workdir=cfg.workdir,
        )
    report(results)
    first = contenders(cfg, backbone, domains[0] if cfg.embeddings else None)
    found = costs(cfg, backbone, domains[0], first)
    steps = {d.name: steps_per_epoch(d.train, batch_size=p.batch_size) for d in domains}
    text = cost_table(results.rows, found, steps)
    (cfg.workdir / "transformer.md").write_text(text)
    print(f"\n{text}")
    return results


if __name__ == "__main__":
    launch(Config, main)
