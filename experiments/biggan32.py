"""Pretrain a small BigGAN on real images, to have a generator to adapt.

    python -m experiments.biggan32 --data DIR --domain cifar10_jpeg

Hinge loss, spectral normalization in both networks, averaged weights: the published
recipe, at 32 px with few channels. Writes `generator.safetensors` (kernels folded,
names of the authors' PyTorch code, read by `ftn_jax.pretrained.load_biggan`), a
picture of its images by class, and the curves of both losses. Cost at the defaults:
see docs/generation.md. Expected: coloured shapes that resemble the classes; this is
a few minutes of what the published networks had days for.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from ftn_jax.atomic import write_atomic
from ftn_jax.command import launch, progress_bar
from ftn_jax.data import (
    CenterCrop,
    Compose,
    Domain,
    Flip,
    Resize,
    ResizeShort,
    ToRGB,
    Transform,
    digest,
    find_domains,
    load_domain,
    prefetch,
    train_batches,
)
from ftn_jax.data.embedded import embedded_source
from ftn_jax.fit import fit
from ftn_jax.gan import Gan, GanState
from ftn_jax.invert import RANGE
from ftn_jax.models import BigGAN, BigGANDiscriminator
from ftn_jax.pictures import draw_curves, draw_grid
from ftn_jax.pretrained import export_biggan
from ftn_jax.resume import StateFolder
from ftn_jax.trial import short_hash

Fit = Literal["none", "squash", "crop"]


@dataclass(frozen=True)
class Config:
    """Settings of the pretraining."""

    data: Path | None = None
    """Folder of domains (`NAME.npz`); without it, drawn capital letters stand in."""
    domain: str = "cifar10_jpeg"
    """The domain in it to learn."""
    workdir: Path = Path("runs/biggan32")
    """Folder for the generator, the picture and the curves."""
    channels: tuple[int, ...] = (96, 64, 32, 16)
    """Of the generator's 4x4 features and of each block: three blocks make 32 px."""
    chunk: int = 20
    """Length of one chunk of the latent vector, of which there is one more than
    blocks."""
    shared_dim: int = 32
    """Length of a class vector."""
    judge: tuple[int, ...] = (16, 32, 64)
    """Channels of the discriminator's blocks, each of which halves the resolution."""
    attention: tuple[int, ...] = (16,)
    """Resolutions (px) with self-attention, in both networks."""
    steps: int = 1500
    """Generator steps."""
    batch_size: int = 32
    """Images in a discriminator step."""
    d_steps: int = 1
    """Discriminator steps for each generator step."""
    rates: tuple[float, float] = (4e-4, 8e-4)
    """Adam's learning rates of generator and discriminator."""
    averaging: float = 0.995
    """Share of the averaged weights that stays in a step."""
    flip: bool = True
    """Mirror half of the images."""
    fit: Fit = "none"
    """How images of another size become the generator's: squash, or crop the middle."""
    seed: int = 0
    """Of both networks, the latent vectors and the order of images."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/biggan32_tiny"),
            channels=(8, 8),
            judge=(8,),
            chunk=4,
            shared_dim=4,
            attention=(),
            steps=4,
            batch_size=8,
            fit="squash",
        )


def to_size(fit: Fit, resolution: int) -> tuple[Transform, ...]:
    """Return the steps that bring images to a size, in colour."""
    steps: dict[str, tuple[Transform, ...]] = {
        "none": (),
        "squash": (Resize(resolution, resolution),),
        "crop": (ResizeShort(resolution), CenterCrop(resolution)),
    }
    return (*steps[fit], ToRGB())


def main(cfg: Config) -> Path:
    """Train, save, draw; return the generator's file."""
    domain = load_source(cfg)
    classes = domain.num_classes
    generator = BigGAN(
        cfg.channels,
        num_classes=classes,
        chunk=cfg.chunk,
        shared_dim=cfg.shared_dim,
        attention=cfg.attention,
    )
    gan = Gan(
        generator,
        BigGANDiscriminator(
            cfg.judge, (True,) * len(cfg.judge), classes, attention=cfg.attention
        ),
        rates=cfg.rates,
        d_steps=cfg.d_steps,
        averaging=cfg.averaging,
    )
    state = train(cfg, gan, domain)
    params, batch_stats = gan.finish(state)
    path = cfg.workdir / "generator.safetensors"
    write_atomic(path, save(export_biggan(params, batch_stats, generator)))
    draw_samples(generator, params, batch_stats, domain, cfg.workdir / "samples.png")
    print(f"generator and pictures: {cfg.workdir}")
    return path


def load_source(cfg: Config) -> Domain:
    """Read the domain to learn, or draw the stand-in."""
    if cfg.data is None:
        return embedded_source(cfg.seed)
    return load_domain(find_domains(cfg.data, [cfg.domain])[cfg.domain])


def train(cfg: Config, gan: Gan, domain: Domain) -> GanState:
    """Train both players; go on from the last saved state where there is one."""
    size = gan.generator.resolution
    check_size(domain, size, cfg.fit)
    flip = (Flip(),) if cfg.flip else ()
    transform = Compose((*flip, *to_size(cfg.fit, size), RANGE))
    batch = cfg.batch_size * cfg.d_steps
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("workdir", "steps")}
    name = short_hash(sorted(settings.items()), digest(domain.train))
    folder = StateFolder(cfg.workdir / "state" / name)
    state: Any = gan.start(jax.random.key(cfg.seed))
    state, progress = folder.restore_with_progress(state) or (state, {})
    curves: dict[str, list[tuple[float, float]]] = {"d_loss": [], "g_loss": []}
    with progress_bar("pretraining", steps=cfg.steps, batch_size=batch) as show:

        def on_log(step: int, means: dict[str, float]) -> None:
            show(step, means)
            for key, points in curves.items():
                points.append((step, means[key]))

        state = fit(
            jax.jit(gan.step, donate_argnums=1),
            None,
            state,
            lambda start: prefetch(
                train_batches(
                    domain.train,
                    batch_size=batch,
                    transform=transform,
                    seed=cfg.seed,
                    start_step=start,
                )
            ),
            steps=cfg.steps,
            on_log=on_log,
            save=folder.save,
            progress=progress,
        )
    folder.save(state, wait=True)
    folder.close()
    if curves["d_loss"]:
        draw_curves(curves, cfg.workdir / "losses.png", y="hinge loss")
    return state


def check_size(domain: Domain, size: int, fit: Fit) -> None:
    """Refuse images of another size than the generator's, unless they are fitted.

    Raises:
        ValueError: with both sizes, and what to do.
    """
    for part in (domain.train, domain.test):
        found = part[0].image.shape
        if fit == "none" and found[:2] != (size, size):
            raise ValueError(
                f"{domain.name}: images of {found[0]} x {found[1]} px, the generator "
                f"draws {size} x {size}: choose --fit squash or --fit crop"
            )


def draw_samples(
    generator: BigGAN, params: Any, batch_stats: Any, domain: Domain, path: Path
) -> None:
    """Draw ten images of each of the first ten classes."""
    names = domain.class_names[:10]
    z = jax.random.normal(jax.random.key(0), (10, generator.dim_z))
    draw = jax.jit(generator.apply)
    variables = {"params": params, "batch_stats": batch_stats}
    rows = {
        name: np.asarray(draw(variables, z, jnp.full((10,), label)))
        for label, name in enumerate(names)
    }
    draw_grid(rows, path)


if __name__ == "__main__":
    launch(Config, main)
