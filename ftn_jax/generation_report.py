"""What a study of a generator came to: a table, and pictures from its saved tasks."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftn_jax.checkpoint import restore_task
from ftn_jax.generation import HELD_OUT, Images, Study
from ftn_jax.invert import in_range
from ftn_jax.latents import beside, from_file, make_latents, tables
from ftn_jax.pictures import draw_curves, draw_grid
from ftn_jax.sweep import slug
from ftn_jax.train import Task


def psnr_table(study: Study, domains: Sequence[Images], methods: Sequence[str]) -> str:
    """Lay out mean PSNR in dB: training images, then held-out ones."""
    found = {(r.method, r.task): r for r in study.results.rows if r.seed == study.seed}
    names = [d.name for d in domains]
    lines = [
        "| method | parameters | share of the generator | "
        + " | ".join([*names, "mean"])
        + " |",
        "|---|--:|--:|" + "--:|" * (len(names) + 1),
    ]
    for method in methods:
        row = found[method, names[0]]
        pairs = [
            [found[method, name + part].value for name in names]
            for part in ("", HELD_OUT)
        ]
        columns = [*zip(*pairs, strict=True), tuple(np.mean(x) for x in pairs)]
        lines.append(
            f"| {method} | {row.task_params:,} | "
            f"{row.task_params / row.shared_params:.1%} | "
            + " | ".join(f"{train:.1f} / {held_out:.1f}" for train, held_out in columns)
            + " |"
        )
    return "\n".join(lines) + "\n"


def draw_study(
    study: Study,
    domains: Sequence[Images],
    methods: Sequence[str],
    *,
    columns: int = 10,
    between: int = 8,
) -> None:
    """Draw originals and reconstructions, training curves, and interpolations.

    Args:
        study: with all rows filled.
        domains: its domains.
        methods: names of its rows.
        columns: images in a row.
        between: images of an interpolation.
    """
    workdir = study.workdir
    for domain in domains:
        curves = {}
        for label, images in (
            (domain.name, domain.train),
            (domain.name + HELD_OUT, domain.held_out),
        ):
            rows = {f"{label}: originals": in_range(images[:columns])}
            for method in methods:
                task, about = _restore(study, method, label)
                rows[method] = study.drawer(study.generator.params, task)[:columns]
                if label == domain.name:
                    of = " (mean of all)" if len(about["fitted"]) > 1 else ""
                    curves[method + of] = about["curve"]
            draw_grid(rows, workdir / f"grid_{slug(label)}.png")
        draw_curves(
            curves,
            workdir / f"curves_{slug(domain.name)}.png",
            y="mean PSNR of training images, dB",
            title=domain.name,
        )
    for method in methods:
        rows = {d.name: _walk(study, method, d.name, between) for d in domains}
        draw_grid(rows, workdir / f"walk_{slug(method)}.png")


def _restore(study: Study, method: str, label: str) -> tuple[Task, Any]:
    """Open a fitted set of images; return what its file tells of it, too."""
    saved = restore_task(study.place(method, label), study.generator.params)
    return from_file(saved.task), saved.metadata


def _walk(study: Study, method: str, label: str, steps: int) -> np.ndarray:
    """Walk from the first training image's latents to the second one's."""
    task, _ = _restore(study, method, label)
    share = jnp.linspace(0, 1, steps)[:, None]
    between = {
        name: (1 - share) * table[:1] + share * table[1:2]
        for name, table in tables(task.delta).items()
    }
    there = beside(task.delta["generator"], make_latents(**between))
    return study.drawer(
        study.generator.params, Task(there, task.model_state), batch_size=steps
    )
