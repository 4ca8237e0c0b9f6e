"""The whole shelf through the experiments: every method, order, sizes, joint SVD."""

import importlib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from ftn_jax import restore_extras, restore_task
from ftn_jax.factored.cost import Machine
from ftn_jax.presets import METHODS
from ftn_jax.sweep import slug

pytestmark = pytest.mark.long


def load(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory):
    """Bright squares in a corner: which corner is the class, per domain another."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, place in (("left", 0), ("right", 8)):
        arrays = {}
        for part, n in (("train", 48), ("test", 32)):
            labels = np.arange(n) % 2
            images = rng.integers(0, 90, (n, 16, 16, 3))
            for image, label in zip(images, labels, strict=True):
                image[8 * label : 8 * label + 8, place : place + 8] += 160
            arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def config(two_domains, workdir, **options):
    module = load("multi_domain")
    return replace(
        module.Config.tiny(),
        data=two_domains,
        workdir=workdir,
        batch_size=8,
        validation=0.0,
        **options,
    )


@pytest.mark.slow
def test_all_methods_run_and_their_files_are_found_again(two_domains, tmp_path):
    module = load("multi_domain")
    cfg = config(two_domains, tmp_path, methods=("all",), domains=("left",))
    rows = module.main(cfg).rows
    assert len(rows) == len(METHODS)
    stored = {r.method: r.details["stored_bytes"] for r in rows}
    assert stored["piggyback"] < stored["fine-tuning"] / 16
    assert stored["SSF"] < stored["RCM"] < stored["fine-tuning"]


def test_one_budget_gives_methods_one_size(two_domains, tmp_path):
    module = load("multi_domain")
    cfg = config(two_domains, tmp_path, methods=("ftn", "lora", "svft"), budget=0.1)
    backbone = module.load_backbone(cfg)
    rows = module.contenders(cfg, backbone)
    from ftn_jax.presets.budget import planned_size
    from ftn_jax.sizes import backbone_size

    shares = {
        name: planned_size(backbone, row.method(2)) / backbone_size(backbone)
        for name, row in rows.items()
    }
    assert len(shares) == 3 and all(abs(s - 0.1) < 0.03 for s in shares.values())


def test_packnet_goes_on_in_its_order(two_domains, tmp_path, monkeypatch):
    module = load("multi_domain")
    cfg = config(two_domains, tmp_path / "a", methods=("packnet",), epochs=2)
    whole = module.main(cfg).rows
    assert [r.task for r in whole] == ["left", "right"]
    # The first domain alone, then both: the second builds on what was packed.
    module.main(replace(cfg, workdir=tmp_path / "b", domains=("left",)))
    again = module.main(replace(cfg, workdir=tmp_path / "b")).rows
    assert [r.details["test_loss"] for r in again] == [
        r.details["test_loss"] for r in whole
    ]
    with pytest.raises(ValueError, match="right / PackNet measured with"):
        module.main(replace(cfg, workdir=tmp_path / "b", domains=("right",)))


def test_rates_chosen_on_the_first_domain_serve_all(two_domains, tmp_path):
    module = load("multi_domain")
    cfg = config(
        two_domains,
        tmp_path,
        methods=("bn_head",),
        rates=(1e-7, 1e-1),
        epochs=2,
    )
    rows = module.main(replace(cfg, validation=0.2, choose_on="first")).rows
    assert [r.details["candidates"] for r in rows] == [2, 1]
    assert rows[0].details["rates"] == rows[1].details["rates"]


def test_a_rank_study_chooses_a_rate_for_each_rank(two_domains, tmp_path):
    module = load("rank_sweep")
    train = config(
        two_domains, tmp_path, domains=("left",), factor_rates=(1e30, 1e-7, 1e-2)
    )
    train = replace(train, ranks=(1, 2), seeds=(0, 1), ftn_rate=1e-2)
    cfg = module.Config(workdir=tmp_path, train=train, steps=12)
    with pytest.raises(ValueError, match="left: found --train.factor-rates .* chooses"):
        module.main(cfg)
    train = replace(train, validation=0.25)
    rows = module.main(replace(cfg, train=train, workdir=tmp_path / "held")).rows
    assert [(r.seed, r.details["rank"]) for r in rows] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    for row, later in zip(rows[:2], rows[2:], strict=True):
        assert row.details["rates"]["factors"] in (1e-7, 1e-2)  # the largest diverges
        assert row.details["rates"] == later.details["rates"]
        assert row.details["validation"]["accuracy"] >= 0.5
        assert row.details["train_examples"] == 36


def test_joint_svd_shares_one_basis_among_domains(two_domains, tmp_path):
    module = load("joint_svd")
    train = config(two_domains, tmp_path / "unused", adapter_rates=(0.3,), epochs=2)
    cfg = replace(module.Config.tiny(), workdir=tmp_path, train=train, rank=0.25)
    rows = {(r.method, r.task): r for r in module.main(cfg).rows}
    assert len(rows) == 6
    backbone = load("multi_domain").load_backbone(train)
    shared = restore_extras(tmp_path / "bases", backbone.shared)
    basis = sum(x.size for x in jax.tree.leaves(shared.extras))
    full, small = rows["parallel adapters", "left"], rows["joint SVD", "left"]
    assert small.by_group["adapters"] < full.by_group["adapters"] / 2
    assert 0 < basis < full.by_group["adapters"]
    logits = {}
    for name in ("joint SVD", "joint SVD, trained again"):
        folder = tmp_path / "tasks" / "left" / slug(name) / "seed0"
        saved = restore_task(folder, shared)
        logits[name] = saved.metadata["test_logits_sha256"]
    assert len({*logits.values()}) == 2


def test_speed_measures_what_it_says(tmp_path, capsys):
    module = load("speed")
    cfg = replace(module.Config.tiny(), workdir=tmp_path)
    module.main(cfg)
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = {r["row"]: r for r in result["rows"]}
    assert rows["fine-tuning"]["times_fine_tuning"] == 1
    assert rows["BN + head"]["times_floor"] == 1
    assert rows["head only"]["flops"] < rows["BN + head"]["flops"]
    assert rows["BN + head"]["flops"] < rows["fine-tuning"]["flops"]
    merged, beside = (rows[f"FTN R=2, {w}"] for w in ("materialized", "factored"))
    assert beside["flops"] < merged["flops"]
    assert beside["params"] == merged["params"]
    assert (tmp_path / "speed.md").read_text() in capsys.readouterr().out
    with pytest.raises(ValueError, match="--methods nonsense: unknown"):
        module.main(replace(cfg, methods=("nonsense",)))


def test_layer_speed_times_every_way(tmp_path):
    module = load("layer_speed")
    cfg = replace(module.Config.tiny(), workdir=tmp_path)
    result = module.main(cfg)
    assert json.loads((tmp_path / "layer_speed.json").read_text()) == result
    rows, total = result["rows"], result["total_ms"]
    assert sum(row["count"] for row in rows) == 7  # a CIFAR ResNet-8's convolutions
    assert len({row["layer"] for row in rows}) == len(rows)
    ways = ("kernel", "chain", "branch")
    assert all({*row["added_us"]} == {*ways} and row["frozen_us"] > 0 for row in rows)
    assert total["best"] <= min(total["auto"], *(total[way] for way in ways))


def test_the_fit_finds_the_machine_that_made_the_times():
    module = load("layer_speed")
    true = Machine(matmul=1e11, elementwise=4e9, bytes=2e10, moved=3e8)
    layers = [row for row in module.plan(module.Config.tiny()) if row.work]
    rows = [
        {
            "frozen_us": 0.0,
            "added_us": {
                way: 1e6 * true.seconds(getattr(row.work, way))
                for way in row.work._fields
            },
            "work": {way: getattr(row.work, way)._asdict() for way in row.work._fields},
        }
        for row in layers
    ]
    np.testing.assert_allclose(module.fit(rows), true, rtol=1e-6)
    # A difference that noise made negative is one small number, not the whole fit.
    way = min(rows[0]["added_us"], key=rows[0]["added_us"].get)
    rows[0]["frozen_us"] = 10 * rows[0]["added_us"][way]
    rows[0]["added_us"][way] *= -1
    np.testing.assert_allclose(module.fit(rows), true, rtol=1e-6)


@pytest.mark.slow
def test_runs_speed_times_both_forms(tmp_path):
    module = load("runs_speed")
    cfg = replace(module.Config.tiny(), workdir=tmp_path)
    result = module.main(cfg)
    assert json.loads((tmp_path / "runs_speed.json").read_text()) == result
    assert {len(s) for s in result["seconds"].values()} == {cfg.rounds}
    # Two programs are compiled for two ranks, one for runs that go together.
    assert result["ratios"]["ranks"] < result["ratios"]["seeds"]
