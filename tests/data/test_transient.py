"""The reader of Transient Attributes, on a small folder of its layout."""

import numpy as np
import pytest
from PIL import Image

from ftn_jax.data.transient import (
    SeasonRules,
    choose_seasons,
    describe_counts,
    load_seasons,
    read_annotations,
)

ATTRIBUTES = ("dirty", "daylight", "spring", "summer", "autumn", "winter")
# path, then the scores in the order above
ROWS = (
    ("cam1/a.jpg", 0.0, 0.9, 0.8, 0.1, 0.0, 0.0),
    ("cam1/b.jpg", 0.0, 0.9, 0.2, 0.7, 0.0, 0.0),
    ("cam1/c.jpg", 0.0, 0.9, 0.0, 0.0, 0.9, 0.1),
    ("cam1/d.jpg", 0.0, 0.9, 0.0, 0.0, 0.1, 0.9),
    ("cam1/night.jpg", 0.0, 0.1, 0.9, 0.0, 0.0, 0.0),
    ("cam2/a.jpg", 0.0, 0.6, 0.6, 0.5, 0.0, 0.0),
    ("cam2/b.jpg", 0.0, 0.6, 0.4, 0.5, 0.0, 0.0),
    ("cam2/c.jpg", 0.0, 0.6, 0.0, 0.0, 0.6, 0.0),
    ("cam2/d.jpg", 0.0, 0.6, 0.0, 0.0, 0.0, 0.6),
)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "attributes.txt").write_text("\n".join(ATTRIBUTES) + "\n")
    lines = [
        "\t".join([path, *(f"{score},0.5" for score in scores)])
        for path, *scores in ROWS
    ]
    (folder / "annotations.tsv").write_text("\n".join(lines) + "\n")
    for n, (path, *_) in enumerate(ROWS):
        place = tmp_path / "imageAlignedLD" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), 20 * n, np.uint8)).save(place)
    (tmp_path / "holdout_split").mkdir()
    (tmp_path / "holdout_split" / "test.txt").write_text("cam2\n")
    return tmp_path


def test_seasons_are_split_by_the_list(root):
    domains = load_seasons(root)
    assert list(domains) == ["spring", "summer", "autumn", "winter"]
    sizes = {n: (len(d.train), len(d.test)) for n, d in domains.items()}
    assert sizes == {
        "spring": (1, 1),
        "summer": (1, 1),
        "autumn": (1, 1),
        "winter": (1, 1),
    }
    assert domains["winter"].test[0].image.shape == (4, 6, 3)
    assert abs(int(domains["winter"].test[0].image.mean()) - 160) < 5
    assert "| winter | 2 | 2566 |" in describe_counts(domains)


def test_rules_choose_the_images(root):
    annotations = read_annotations(root / "annotations")

    def counts(**options):
        rows = choose_seasons(annotations, SeasonRules(**options))
        return [len(found) for found in rows.values()]

    assert counts() == [2, 2, 2, 2]
    assert counts(daytime="") == [3, 2, 2, 2]
    assert counts(rule="threshold", threshold=0.5) == [2, 3, 2, 2]
    assert counts(threshold=0.65) == [1, 1, 1, 1]


def test_an_empty_season_is_refused(root):
    annotations = read_annotations(root / "annotations")
    with pytest.raises(
        ValueError, match=r"no image belongs to .*'summer'.*'summer': 0.7"
    ):
        choose_seasons(annotations, SeasonRules(threshold=0.75))


def test_a_missing_column_is_refused(root):
    table = root / "annotations" / "annotations.tsv"
    with pytest.raises(
        ValueError, match="no column 'sunny', they have dirty, daylight"
    ):
        load_seasons(root, SeasonRules(daytime="sunny"))
    cut = [line.rpartition("\t")[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(cut))
    with pytest.raises(
        ValueError, match="tsv, line 1: found 5 columns.*expected the 6"
    ):
        load_seasons(root)


def test_damaged_tables_are_refused(root):
    table = root / "annotations" / "annotations.tsv"
    text = table.read_text()
    table.write_text(text.replace("0.8,0.5", "high,0.5"))
    with pytest.raises(ValueError, match="line 1: could not convert.*'high'"):
        load_seasons(root)
    table.write_text(text.replace("0.8,0.5", "nan,0.5"))
    with pytest.raises(ValueError, match="line 1: found scores.*finite numbers"):
        load_seasons(root)
    table.write_text("\n")
    with pytest.raises(ValueError, match="no line, expected one for each image"):
        load_seasons(root)


def test_absent_files_are_named(root):
    (root / "imageAlignedLD" / "cam1" / "a.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match="1 of 2 images are missing.*cam1/a.jpg"
    ):
        load_seasons(root)
    with pytest.raises(FileNotFoundError, match="val.txt: no such file"):
        load_seasons(root, test_list="holdout_split/val.txt")


def test_a_season_needs_images_on_both_sides(root):
    (root / "holdout_split" / "test.txt").write_text("cam3\n")
    with pytest.raises(ValueError, match="spring: 0 of 2 images are in holdout"):
        load_seasons(root)
    rules = SeasonRules(rule="threshold", daytime="")  # takes all nine
    domains = load_seasons(root, rules, test_list=None, seasons=["spring"])
    assert (len(domains["spring"].train), len(domains["spring"].test)) == (8, 1)
