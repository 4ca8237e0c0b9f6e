"""The pages for networks of others run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ftn_jax import materialize

pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[1] / "docs" / "plug_in.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "plug_in.md", "exec"), names)
        if "Hybrid(classes=10)" in block:
            pretrained = jax.tree.map(np.array, names["shared"])
            linen = names["shared"]
    promised = re.findall(r"print\([^#]*# ([{(].*[})])", "".join(blocks))
    printed = capsys.readouterr().out
    assert len(promised) == 2 and all(line in printed for line in promised)

    for losses in (names["losses"], names["nnx_losses"]):
        assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, linen, pretrained)

    # The NNX task, read back, is the task that was trained; and not its start.
    task, again, shared = names["state"].task, names["again"].task, names["shared"]
    for found, kept in zip(jax.tree.leaves(again), jax.tree.leaves(task), strict=True):
        if jax.numpy.issubdtype(kept.dtype, jax.dtypes.prng_key):
            found, kept = jax.random.key_data(found), jax.random.key_data(kept)
        np.testing.assert_array_equal(found, kept)
    outputs = [
        names["apply"](params, again.model_state, names["batch"], train=False)[0]
        for params in (materialize(shared, again.delta), shared)
    ]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text())
    assert not [link for link in links if not (PAGE.parent / link).exists()]
