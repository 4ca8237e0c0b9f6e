"""The score of saying the training data's mean everywhere."""

import numpy as np
import pytest

from ftn_jax.data import Compose, Normalize
from ftn_jax.data.dense import DenseArrays
from ftn_jax.data.joint import JointPad
from ftn_jax.dense import semseg
from ftn_jax.dense.constant import constant_score


@pytest.mark.parametrize(("classes", "expected"), [(41, 0.75 / 41), (40, 1 / 40)])
def test_the_commonest_class_is_counted_as_the_measure_counts(classes, expected):
    truth = np.full((2, 8, 8), 5, np.int32)
    truth[:, :2] = 0  # with 40 classes no class, and 5 is the fifth
    source = DenseArrays(np.zeros((2, 8, 8, 3), np.uint8), {"semseg": truth})
    found = constant_score(
        "semseg",
        semseg(classes=classes),
        source,
        source,
        classes=classes,
        transform=Compose((JointPad(8, 8), Normalize())),
    )
    assert found == pytest.approx(expected)
