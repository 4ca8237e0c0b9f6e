"""The experiments on generators run, are not repeated, and refuse bad input."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import ftn_jax.invert
from experiments import biggan32, seasons
from ftn_jax.models import BigGAN
from ftn_jax.pretrained import export_biggan, load_biggan

pytestmark = pytest.mark.long

MODEL = BigGAN((8, 8), num_classes=3, chunk=4, shared_dim=4, attention=())


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    z, y = jnp.zeros((1, MODEL.dim_z)), jnp.zeros((1,), jnp.int32)
    found = jax.jit(MODEL.init)(jax.random.key(0), z, y)
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    save_file(export_biggan(found["params"], found["batch_stats"], MODEL), path)
    return path


@pytest.mark.slow
def test_pretraining_writes_a_generator_and_pictures_and_goes_on(tmp_path):
    cfg = replace(biggan32.Config.tiny(), workdir=tmp_path)
    model, (params, _) = load_biggan(biggan32.main(cfg))
    assert model.channels == (8, 8) and model.num_classes == 26
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert np.isfinite(params["output"]["conv"]["kernel"]).all()
    longer = replace(cfg, steps=6)
    _, (first, _) = load_biggan(biggan32.main(longer))
    _, (whole, _) = load_biggan(
        biggan32.main(replace(longer, workdir=tmp_path / "whole"))
    )
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.abs(first["first"]["kernel"] - params["first"]["kernel"]).max() > 0


def test_tiny_run_writes_everything_and_is_not_repeated(
    generator, tmp_path, monkeypatch
):
    cfg = replace(
        seasons.Config.tiny(),
        workdir=tmp_path,
        generator=str(generator),
        methods=("latents", "ftn", "joint"),
        alone_rates=(1e-6, 0.5),
    )
    first = seasons.main(cfg).rows
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert len(on_disk["rows"]) == len(first) == 12  # 3 rows, 2 domains, twice
    assert {r.task for r in first} == {
        "digits",
        "digits (held out)",
        "stripes",
        "stripes (held out)",
    }
    assert all(np.isfinite(r.value) and r.metric == "psnr" for r in first)
    (row,) = (r for r in first if (r.method, r.task) == ("latents only", "digits"))
    slow, fast = row.details["candidates"]
    assert (slow["rates"], fast["rates"]) == ({"latents": 1e-6}, {"latents": 0.5})
    assert slow["psnr"] < fast["psnr"] and row.details["rates"] == fast["rates"]
    assert len(list((tmp_path / "tasks").glob("*/*/seed0/manifest.json"))) == 12
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
    with pytest.raises(ValueError, match="label 99: the generator has 3 classes"):
        seasons.main(replace(cfg, label=99))
    with pytest.raises(ValueError, match=r"no rates for \['FTN R="):
        seasons.main(replace(cfg, factor_rates=(), workdir=tmp_path / "none"))
