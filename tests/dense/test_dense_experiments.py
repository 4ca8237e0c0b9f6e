"""The dense experiments on files of the real formats, all tasks end to end."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from ftn_jax.data.scenes import write_nyud


def load(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.slow
def test_four_tasks_from_files_of_the_published_format(tmp_path):
    module = load("nyud")
    cfg = replace(
        module.Config.tiny(),
        data=write_nyud(tmp_path, train=8, val=4, size=(20, 28)),  # below the crop
        tasks=module.TASKS,
        methods=("bn", "rcm", "single"),
        workdir=tmp_path / "runs",
        joint=True,
    )
    rows = module.main(cfg).rows
    assert [row.task for row in rows[::3]] == [*module.TASKS]
    assert {row.metric for row in rows} == {
        "mIoU",
        "image_rmse_with_gaps",
        "mean_angle",
        "odsF",
    }
    table = (tmp_path / "runs" / "results.md").read_text()
    assert table.count("\n") == 6 and "| the mean, everywhere | – | " in table
    assert len((tmp_path / "runs" / "joint.md").read_text().splitlines()) == 5
    pictures = {p.stem for p in (tmp_path / "runs").glob("pictures_*.png")}
    assert pictures == {f"pictures_{task}" for task in module.TASKS}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nyud", {"tasks": ("colour",)}, r"--tasks \['colour'\]: unknown"),
        ("nyud", {"backbone": "alexnet"}, "--backbone alexnet: unknown"),
        ("nyud", {"classes": 30}, "--classes 30: NYUD has 41 classes, or 40"),
        ("edges", {"methods": ("magic",)}, "--methods magic: unknown"),
        ("edges", {"backbone": "alexnet"}, "--backbone alexnet: unknown"),
        ("edges", {"data": Path("absent.npz")}, "absent.npz: no such file"),
        ("nyud", {"data": Path("absent")}, "train.txt: missing"),
    ],
)
def test_bad_settings_are_named(name, change, message, tmp_path):
    module = load(name)
    with pytest.raises((ValueError, OSError), match=message):
        module.main(replace(module.Config.tiny(), workdir=tmp_path, **change))


def test_both_readings_of_sixty_epochs():
    module = load("nyud")
    paper = module.Config()
    assert module.epochs(paper, 795) == 60
    published = replace(paper, schedule="published_iterations")
    assert module.epochs(published, 795) == 201  # 19,875 steps of 99 full batches
    assert module.epochs(replace(paper, epochs=3), 795) == 3
