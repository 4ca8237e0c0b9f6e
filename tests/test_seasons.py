"""The experiments on generators run, are not repeated, and refuse bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest

import ftn_jax.invert
from experiments import biggan32, seasons
from ftn_jax.pretrained import load_biggan


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    place = tmp_path_factory.mktemp("generator")
    return biggan32.main(replace(biggan32.Config.tiny(), workdir=place))


def test_pretraining_writes_a_generator_and_pictures(generator):
    model, (params, _) = load_biggan(generator)
    assert model.channels == (8, 8) and model.num_classes == 26
    assert (generator.parent / "samples.png").stat().st_size > 1000
    assert np.isfinite(params["output"]["conv"]["kernel"]).all()


def test_tiny_run_writes_everything_and_is_not_repeated(
    generator, tmp_path, monkeypatch
):
    cfg = replace(seasons.Config.tiny(), workdir=tmp_path, generator=str(generator))
    first = seasons.main(cfg).rows
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert len(on_disk["rows"]) == len(first) == 16  # 4 rows, 2 domains, twice
    assert {r.task for r in first} == {
        "digits",
        "digits (held out)",
        "stripes",
        "stripes (held out)",
    }
    assert all(np.isfinite(r.value) and r.metric == "psnr" for r in first)
    assert len(list((tmp_path / "tasks").glob("*/*/seed0/manifest.json"))) == 16
    assert not (tmp_path / "state").exists()
    for name in ("grid_digits", "curves_stripes", "walk_ftn_r_2"):
        assert (tmp_path / f"{name}.png").stat().st_size > 500, name
    table = (tmp_path / "results.md").read_text()
    assert "| latents only | 0 | 0.0% |" in table and "one generator for all" in table

    def never(*args, **options):
        raise AssertionError("a finished row was fitted again")

    monkeypatch.setattr(ftn_jax.invert.Inverter, "run", never)
    assert seasons.main(cfg).rows == first


def test_other_sizes_and_names_are_refused(generator, tmp_path):
    cfg = replace(seasons.Config.tiny(), workdir=tmp_path, generator=str(generator))
    with pytest.raises(ValueError, match="24 x 24 px, the generator draws 8 x 8"):
        seasons.main(replace(cfg, fit="none"))
    with pytest.raises(ValueError, match=r"--domains \['autumn'\]: unknown, known are"):
        seasons.main(replace(cfg, domains=("autumn",)))
    with pytest.raises(ValueError, match="label 99: the generator has 26 classes"):
        seasons.main(replace(cfg, label=99))
