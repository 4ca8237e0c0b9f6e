"""Task files that earlier releases wrote open, and mean what they meant."""

from pathlib import Path

import jax
import numpy as np
import pytest
from golden_tasks import backbone, flat

from ftn_jax import materialize, restore_extras, restore_task
from ftn_jax.manifest import FORMAT_VERSION, TaskFileError, read_manifest

SETS = sorted((Path(__file__).parent / "golden").iterdir())


def test_there_is_a_set_of_every_format():
    """Format 1 lacked an entry, and nothing of what lies beside a backbone."""
    versions = {read_manifest(s / "task")["format_version"] for s in SETS}
    assert versions == {*range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("place", SETS, ids=lambda path: path.name)
def test_golden_tasks_open(place):
    shared = backbone()
    if (place / "extras").exists():
        shared = restore_extras(place / "extras", shared)
    saved = restore_task(place / "task", shared)
    assert saved.name == "golden" and saved.class_names == ("ash", "beech", "oak")
    mean = saved.task.model_state["batch_stats"]["bn"]["mean"]
    assert mean.dtype == "bfloat16" and mean.tolist() == [0, 1, 2, 3]
    expected = np.load(place / "expected.npz")
    params = flat(materialize(shared, saved.task.delta))
    assert {*params} == {*expected}
    base = flat(backbone())
    for path, w in params.items():
        np.testing.assert_allclose(w, expected[path], rtol=1e-5, atol=1e-6)
    for path in ("conv/kernel", "dense/kernel", "bn/scale"):
        assert np.abs(params[path] - base[path]).max() > 1e-3


@pytest.mark.parametrize("place", SETS, ids=lambda path: path.name)
def test_golden_tasks_refuse_another_backbone(place):
    shared = jax.tree.map(lambda w: w, backbone())
    shared["conv"]["kernel"] = shared["conv"]["kernel"].at[0, 0, 0, 0].add(1e-6)
    with pytest.raises(TaskFileError, match="first leaf that differs is conv/kernel"):
        restore_task(place / "task", shared)
