"""The Decathlon's score against ten and more published rows."""

import pytest

from ftn_jax.decathlon import BASELINE, DECAY, NAMES, PUBLISHED, decathlon_score


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.method)
def test_published_rows(row):
    """Accuracies are rounded to 0.01: up to 2.5 points of the score."""
    assert decathlon_score(row.accuracies) == pytest.approx(row.score, abs=2.5)
    assert sum(row.accuracies.values()) / 10 == pytest.approx(row.mean, abs=0.011)


def test_a_wrong_digit_would_show():
    """Half a point on any one data set, and mean and score do not both fit."""
    row = PUBLISHED[-1]
    for name in NAMES:
        wrong = {**row.accuracies, name: row.accuracies[name] + 0.5}
        mean = sum(wrong.values()) / 10
        assert abs(mean - row.mean) > 0.011
        assert abs(decathlon_score(wrong) - row.score) > 2.5


def test_there_are_ten_rows_and_more():
    assert len(PUBLISHED) >= 10
    assert {*DECAY} == {*NAMES}


def test_what_is_known_exactly():
    assert decathlon_score(BASELINE) == pytest.approx(2500)
    assert decathlon_score(dict.fromkeys(NAMES, 100.0)) == pytest.approx(10_000)
    assert decathlon_score(dict.fromkeys(NAMES, 0.0)) == 0
    two = {"a": 60.0, "b": 40.0}
    assert decathlon_score(two, baseline={"a": 50.0, "b": 70.0}) == pytest.approx(360)
    assert decathlon_score(
        two, baseline={"a": 50.0, "b": 70.0}, exponent=1
    ) == pytest.approx(600)


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({"dtd": 50.0}, "missing .*aircraft"),
        ({**BASELINE, "pets": 1.0}, r"unknown \['pets'\]"),
        ({**BASELINE, "dtd": 101.0}, "between 0 and 100.*'dtd': 101.0"),
        ({k: v / 100 for k, v in BASELINE.items()}, "multiply shares by 100"),
    ],
)
def test_what_is_refused(accuracies, message):
    with pytest.raises(ValueError, match=message):
        decathlon_score(accuracies)
