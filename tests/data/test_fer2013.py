"""FER2013's table, in both forms in which it is published."""

import numpy as np
import pytest
from pictures import fer_pixels, write_fer2013

from ftn_jax.data import FER2013, check_sizes, load_fer2013


def test_both_files(tmp_path):
    write_fer2013(tmp_path / "fer2013.csv")
    face = tmp_path / "faces"
    face.mkdir()
    write_fer2013(face / "icml_face_data.csv", "emotion, Usage, pixels", "{e},{u},{p}")
    one, other = load_fer2013(tmp_path / "fer2013.csv"), load_fer2013(face)
    for domain in (one, other):
        assert (domain.name, domain.num_classes) == ("fer2013", 7)
        parts = (domain.train, domain.validation, domain.test)
        assert [p.labels.tolist() for p in parts] == [[0, 1], [2], [3]]
        assert domain.train[1].image.shape == (48, 48, 1)
        assert [int(p[0].image.max()) for p in parts] == [0, 20, 30]
    np.testing.assert_array_equal(one.train.images, other.train.images)
    with pytest.raises(ValueError, match="fer2013: train: found 2, published 28,709"):
        check_sizes(one, FER2013)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row2": {"p": fer_pixels(1, 9)}}, "line 4: found 9 pixels, expected 2304"),
        ({"row1": {"p": fer_pixels(256)}}, "line 3: bytes must be in range"),
        ({"row1": {"p": fer_pixels("x")}}, "line 3: invalid literal"),
        ({"row0": {"e": 7}}, r"line 2: found emotion 7, expected 0\.\.6"),
        ({"row0": {"u": "Train"}}, "line 2: found Usage 'Train', expected one of"),
        ({"row": "{p}"}, "line 2: the row is too short"),
        ({"row3": {"u": "Training"}}, r"no row with Usage \['PrivateTest'\].*cut off"),
        ({"header": "emotion,pixels", "row": "{e},{p}"}, r"also \['Usage'\].*fer2013"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = write_fer2013(tmp_path / "fer2013.csv", **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_fer2013(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="fer2013.csv or icml_face_data.csv"):
        load_fer2013(tmp_path)
