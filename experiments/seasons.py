"""Adapt a BigGAN generator to new image domains: invert it and train a delta together.

    python -m experiments.seasons --data TRANSIENT_ATTRIBUTES --generator G_ema.pth
    python -m experiments.seasons --data DIR --domains flowers5 gtsrb pacs_cartoon \\
        --generator runs/biggan32/generator.safetensors

Every image gets a latent vector, fitted together with what the domain adds to the
frozen generator: nothing (latents alone), FTN's factors and linear layers, or a copy of
all weights, for one domain or for all together. Held-out images are inverted
afterwards, the adapted generator fixed. Without `--generator` one is pretrained first
(`experiments.biggan32`); without `--data` drawn domains stand in.

Expected, from the FTN paper (NeurIPS submission, Table 4): FTN's PSNR near that of one
generator for each season, at a small share of its parameters. The paper reports
training images only; its exponent p, class vectors, rate of the latents, start of the
latents, mode of BatchNorm and rules for seasons are not given, so they are flags. Its
weights and images are not to be had without a network, so that run was not made here;
docs/generation.md has a table of three domains at 32 px, and the flags that made it.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from experiments import biggan32
from ftn_jax.command import launch
from ftn_jax.data import Compose, Domain, find_domains, load_domain
from ftn_jax.data.embedded import embedded_targets
from ftn_jax.data.transient import SeasonRules, describe_counts, load_seasons
from ftn_jax.generation import Contender, Generator, Images, Start, Study
from ftn_jax.generation_report import draw_study, psnr_table
from ftn_jax.invert import Inversion
from ftn_jax.latents import GROUP
from ftn_jax.nodes.cp import CPInit
from ftn_jax.presets.biggan import (
    Linear,
    generator_fine_tuning,
    generator_ftn,
    has_attention,
)
from ftn_jax.pretrained import load_biggan
from ftn_jax.results import Results

MethodName = Literal["latents", "ftn", "joint", "each"]


@dataclass(frozen=True)
class Config:
    """Settings of the adaptation; the defaults are the paper's where it has any."""

    workdir: Path = Path("runs/seasons")
    """Folder for the table, the pictures and the saved tasks."""
    data: Path | None = None
    """Transient Attributes (a folder with `annotations/`), or a folder of domains."""
    domains: tuple[str, ...] = ()
    """Which domains of the folder; default: all of them, or the four seasons."""
    generator: str | None = None
    """Weights: the authors' `G_ema.pth`, or `generator.safetensors` of biggan32."""
    pretrain: biggan32.Config = field(default_factory=biggan32.Config)
    """How to pretrain a generator where no weights are given."""
    methods: tuple[MethodName, ...] = ("latents", "ftn", "joint", "each")
    """Latents alone; FTN; one generator trained on all domains; one for each."""
    ranks: tuple[int, ...] = (20, 50)
    """Ranks of FTN's factors."""
    init: CPInit | None = None
    """How factors start; the paper's is xavier, the default see `CP.init`."""
    norms: Linear = "whole"
    """The linear layers of the BatchNorms: trained whole, by factors, or frozen."""
    first: Linear = "whole"
    """The first linear layer, likewise."""
    linear_rank: int = 2
    """Rank of factors on linear layers, where they have any."""
    embedding: bool = True
    """Train the class embedding."""
    class_vectors: bool = False
    """Fit a class vector for each image too; if not, all are of the class `label`."""
    label: int = 0
    """The class of all images, where they have no class vectors."""
    max_images: int | None = None
    """At most so many training images of each domain."""
    held_out: int = 64
    """Held-out images of each domain that are inverted at the end."""
    steps: int = 600
    """Optimizer steps; of the generator for all domains: for each domain."""
    held_out_steps: int = 200
    """Steps of inverting held-out images, the generator fixed."""
    batch_size: int = 64
    """Images per step."""
    factor_rates: tuple[float, ...] = (0.05,)
    """Adam's peak rates of factors (default: the paper's); of several, for each domain
    by itself, short runs choose the one that comes nearest to the training images."""
    linear_rate: float = 1e-3
    """Adam's peak rate of linear layers (the paper's)."""
    weight_rates: tuple[float, ...] = (1e-3,)
    """Likewise of a generator that is trained whole."""
    alone_rates: tuple[float, ...] = (0.05,)
    """Likewise of latents alone."""
    choose_steps: int = 60
    """Steps of the short runs."""
    latent_rate: float = 0.05
    """Adam's peak rate of latents beside a delta, and of held-out images' (the paper
    gives none)."""
    warmup_steps: int = 20
    """Steps in which all rates rise from zero (the paper gives none)."""
    z_std: float = 1.0
    """Standard deviation of the latents' start; 1 is how the generator was trained."""
    p: float = 2.0
    """Exponent of the loss, the mean of |x - G(z)|^p."""
    frozen_stats: bool = True
    """BatchNorm keeps the generator's running statistics."""
    patience: int = 0
    """Stop after so many looks (every 20 steps) without a gain; 0 never stops."""
    min_gain: float = 0.02
    """What counts as a gain of the training PSNR, dB."""
    fit: biggan32.Fit = "none"
    """How images of another size become the generator's: squash, or crop the middle."""
    season_rule: Literal["largest", "threshold"] = "largest"
    """An image belongs to its highest season, or to every one above the threshold."""
    season_threshold: float = 0.0
    """Least score of a season, in the annotations' unit."""
    daytime: str = "daylight"
    """Attribute that an image needs; empty for none."""
    daytime_threshold: float = 0.5
    """Least score of it."""
    test_list: str | None = "holdout_split/test.txt"
    """File of the held-out images below the data folder; None: a tenth at random."""
    seed: int = 0
    """Of the deltas, the latents and the order of images."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/seasons_tiny"),
            pretrain=biggan32.Config.tiny(),
            domains=("digits", "stripes"),
            ranks=(2,),
            max_images=8,
            held_out=8,
            steps=4,
            choose_steps=2,
            warmup_steps=1,
            held_out_steps=2,
            batch_size=4,
            fit="squash",
        )


def main(cfg: Config) -> Results:
    """Fill the table, print it, draw the pictures."""
    generator = load_generator(cfg)
    domains = load_images(cfg, generator.model.resolution)
    results = Results(
        cfg.workdir,
        experiment="seasons",
        config=asdict(cfg),
        free=("workdir", "methods", "ranks", "domains"),
    )
    study = Study(
        generator,
        results,
        recipe(cfg, cfg.steps, {}),
        held_out=recipe(cfg, cfg.held_out_steps, {GROUP: cfg.latent_rate}),
        start=Start(cfg.z_std, cfg.class_vectors, cfg.label),
        choose_steps=cfg.choose_steps,
        seed=cfg.seed,
    )
    rows = contenders(cfg, generator)
    study.fill(domains, rows)
    table = psnr_table(study, domains, [*rows])
    (cfg.workdir / "results.md").write_text(table)
    draw_study(study, domains, [*rows])
    print(f"\n{table}\ntable, pictures and saved tasks: {cfg.workdir}")
    return results


def recipe(cfg: Config, steps: int, rates: dict[str, float]) -> Inversion:
    """Return how to fit; a row's rates replace these."""
    return Inversion(
        steps=steps,
        batch_size=cfg.batch_size,
        rates=rates,
        warmup_steps=cfg.warmup_steps,
        p=cfg.p,
        frozen_stats=cfg.frozen_stats,
        patience=cfg.patience,
        min_gain=cfg.min_gain,
    )


def contenders(cfg: Config, generator: Generator) -> dict[str, Contender]:
    """List the rows of the table: rules of the delta, and candidate rates."""
    latents = {GROUP: cfg.latent_rate}
    whole = (
        generator_fine_tuning(),
        [latents | {"linear": rate} for rate in cfg.weight_rates],
    )
    rows = {}
    for method in cfg.methods:
        if method == "latents":
            rows["latents only"] = Contender(
                {}, [{GROUP: rate} for rate in cfg.alone_rates]
            )
        elif method == "joint":
            rows["one generator for all"] = Contender(*whole, together=True)
        elif method == "each":
            rows["one generator each"] = Contender(*whole)
        else:
            for rank in cfg.ranks:
                rules = generator_ftn(
                    rank=rank,
                    init=cfg.init,
                    norms=cfg.norms,
                    first=cfg.first,
                    linear_rank=cfg.linear_rank,
                    embedding=cfg.embedding and not cfg.class_vectors,
                    attention=has_attention(generator.params),
                )
                rates = [
                    latents | {"factors": rate, "linear": cfg.linear_rate}
                    for rate in cfg.factor_rates
                ]
                rows[f"FTN R={rank}"] = Contender(rules, rates)
    return rows


def load_generator(cfg: Config) -> Generator:
    """Read the weights, or pretrain a generator in the workdir."""
    path = Path(cfg.generator or cfg.workdir / "pretrained" / "generator.safetensors")
    if cfg.generator is None and not path.exists():
        biggan32.main(replace(cfg.pretrain, workdir=path.parent))
    model, (params, batch_stats) = load_biggan(cfg.generator or path)
    return Generator(model, params, {"batch_stats": batch_stats})


def load_images(cfg: Config, resolution: int) -> list[Images]:
    """Read the domains' images, resized where the settings say so."""
    if cfg.data is None:
        found = {d.name: d for d in embedded_targets(cfg.seed)}
    elif (cfg.data / "annotations").is_dir():
        rules = SeasonRules(
            cfg.season_rule, cfg.season_threshold, cfg.daytime, cfg.daytime_threshold
        )
        found = load_seasons(cfg.data, rules, test_list=cfg.test_list)
        print(describe_counts(found))
    else:
        paths = find_domains(cfg.data, cfg.domains or None)
        found = {name: load_domain(path) for name, path in paths.items()}
    if unknown := sorted({*cfg.domains} - {*found}):
        raise ValueError(f"--domains {unknown}: unknown, known are {sorted(found)}")
    return [_images(cfg, found[n], resolution) for n in cfg.domains or found]


def _images(cfg: Config, domain: Domain, resolution: int) -> Images:
    biggan32.check_size(domain, resolution, cfg.fit)
    domain = domain.limited(train=cfg.max_images, test=cfg.held_out)
    transform = Compose(biggan32.to_size(cfg.fit, resolution))
    rng = np.random.default_rng(0)  # asked for, but no step draws from it
    parts = (
        np.stack([transform(rng, source[i].image) for i in range(len(source))])
        for source in (domain.train, domain.test)
    )
    return Images(domain.name, *parts)


if __name__ == "__main__":
    launch(Config, main)
