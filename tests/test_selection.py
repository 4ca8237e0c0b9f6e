"""The best epoch is kept, by held-out data or by test data, whole run or not."""

import importlib
import os
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from toy import setup

import ftn_jax.adapt
from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.presets import METHODS
from ftn_jax.resume import StateFolder
from ftn_jax.selection import Best

pytestmark = pytest.mark.long

multi_domain = importlib.import_module("experiments.multi_domain")


@pytest.fixture(scope="module")
def parts():
    """An adaptation of four epochs, and who judges it."""
    cfg = multi_domain.Config.tiny()
    backbone, (domain,) = (
        multi_domain.load_backbone(cfg),
        multi_domain.load_domains(cfg),
    )
    train, test = multi_domain.transforms(cfg)
    method = METHODS["bn_head"](backbone.layers, classes=10)
    recipe = Recipe(4, 32, dict.fromkeys(("norm", "head"), 3e-2))
    adaptation = Adaptation(backbone, method, recipe, domain.train, transform=train)
    return adaptation, Evaluator(backbone, classes=10, transform=test), domain


def test_the_best_epoch_is_returned_also_after_an_interruption(
    parts, tmp_path, monkeypatch
):
    adaptation, evaluator, domain = parts
    seen = {}

    class Watching(Best):
        def see(self, state):
            super().see(state)
            seen[int(state.step)] = (
                self._score(state.task)["loss"],
                jax.tree.map(np.asarray, state.task),
            )

    def best(folder, wanted):
        def score(task):
            return evaluator.score(task, domain.test)

        def better(new, old):
            return abs(new["loss"] - wanted) < abs(old["loss"] - wanted)

        return Watching(score, better, folder)

    adaptation.run(0, best=best(None, 0.0))
    assert [*seen] == [4, 8, 12, 16]  # 128 images
    wanted, task = seen[8]  # the second epoch shall be the best
    whole = adaptation.run(0, best=best(None, wanted))
    assert int(whole.step) == 8
    for x, y in zip(jax.tree.leaves(whole.task), jax.tree.leaves(task), strict=True):
        np.testing.assert_array_equal(x, y)

    real = ftn_jax.adapt.train_batches

    def interrupting(*args, **options):
        for n, batch in enumerate(real(*args, **options), options.get("start_step", 0)):
            if n == 13:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            yield batch

    folder = StateFolder(tmp_path / "run")
    monkeypatch.setattr(ftn_jax.adapt, "train_batches", interrupting)
    with pytest.raises(KeyboardInterrupt):
        adaptation.run(0, folder=folder, best=best(folder.of("best"), wanted))
    monkeypatch.setattr(ftn_jax.adapt, "train_batches", real)
    seen.clear()
    again = adaptation.run(0, folder=folder, best=best(folder.of("best"), wanted))
    # Batches are made ahead of the steps: the run stopped in the third epoch, or when
    # it was just through, and a state that was reached is looked at again.
    assert seen and {*seen} <= {12, 16}
    for x, y in zip(
        jax.tree.leaves(whole.task), jax.tree.leaves(again.task), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_the_best_is_on_disk_before_the_run_goes_on(tmp_path):
    """Else a kill could leave a later state, and no trace of the best before it."""
    _, state, _ = setup()
    folder = StateFolder(tmp_path / "best")
    best = Best(lambda task: {"loss": 1.0}, lambda new, old: False, folder)
    best.see(state)
    assert StateFolder(tmp_path / "best").restore(state) is not None
    best.close()


def test_a_row_says_which_step_was_selected(tmp_path):
    cfg = replace(
        multi_domain.Config.tiny(),
        methods=("feature_extractor",),
        rates=(2.0,),
        epochs=3,
        max_train=64,
    )
    found = {}
    for select in ("last", "best_on_validation", "best_on_test"):
        (row,) = multi_domain.main(
            replace(cfg, workdir=tmp_path / select, select=select)
        ).rows
        assert row.details["select"] == select
        found[select] = row
    assert found["last"].details["selected_step"] is None
    assert found["best_on_test"].details["selected_step"] in (1, 2, 3)
    assert found["best_on_test"].value >= found["last"].value
    validation = {s: row.details["validation"]["accuracy"] for s, row in found.items()}
    assert validation["best_on_validation"] >= validation["last"]


def test_no_validation_data_to_select_by(tmp_path):
    cfg = replace(
        multi_domain.Config.tiny(),
        workdir=tmp_path,
        select="best_on_validation",
        validation=0.0,
    )
    with pytest.raises(ValueError, match="digits has no validation data to select"):
        multi_domain.main(cfg)
