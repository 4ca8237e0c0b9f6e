"""An experiment on a mesh gives the table of one device."""

from dataclasses import replace

import pytest

from experiments import multi_domain
from ftn_jax.parallel import Layout

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "mesh", ["data=2", pytest.param("data=1,model=2", marks=pytest.mark.slow)]
)
def test_an_experiment_on_two_devices_equals_one(tmp_path, mesh, one_device):
    rows = multi_domain.main(replace(CONFIG, workdir=tmp_path, mesh=mesh)).rows
    for row, expected in zip(rows, one_device, strict=True):
        assert row.value == pytest.approx(expected.value, abs=0.02)
        for name in ("test_loss", "validation"):
            assert row.details[name] == pytest.approx(expected.details[name], rel=1e-3)
    # Rows of one device and of many belong to one table.
    again = multi_domain.main(replace(CONFIG, workdir=tmp_path)).rows
    assert again == rows


CONFIG = replace(
    multi_domain.Config.tiny(),
    methods=("ftn",),
    max_train=64,
    select="best_on_validation",
)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    return multi_domain.main(replace(CONFIG, workdir=workdir)).rows


def test_flags_that_do_not_fit_are_refused(tmp_path):
    for mesh, message in (
        ("task=2", "leave the axis task out"),
        ("data=64", "has 64 devices"),
        ("rows=2", "expected axes"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_domain.main(replace(CONFIG, workdir=tmp_path, mesh=mesh))
    with pytest.raises(ValueError, match="batch of 3 cannot be split over 2 devices"):
        multi_domain.main(
            replace(CONFIG, workdir=tmp_path / "3", mesh="data=2", batch_size=3)
        )


def test_without_a_mesh_one_device_runs():
    assert Layout.for_run(None) is None
    layout = Layout.for_run("data=2", local_batch_norm=True)
    assert layout is not None and not layout.sync_batch_norm
    assert (layout.round_up(5), layout.round_up(6)) == (6, 6)
