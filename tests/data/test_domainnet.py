"""DomainNet's list files and the images they name."""

import pytest
from pictures import save_image

from ftn_jax.data import (
    DOMAINNET,
    Compose,
    Normalize,
    Resize,
    check_sizes,
    eval_batches,
    load_domainnet,
)

LINES = {
    "clipart_train": [
        "clipart/ant/clipart_001_000001.jpg 0",
        "clipart/t-shirt/clipart_003_000001.jpg 2",
        "clipart/bee/clipart_002_000001.jpg 1",
    ],
    "clipart_test": ["clipart/bee/clipart_002_000002.jpg 1"],
    "sketch_train": ["sketch/ant/sketch_001_000001.jpg 0"],
    "sketch_test": ["sketch/bee/sketch_002_000002.jpg 1"],
}


@pytest.fixture
def root(tmp_path):
    for name, lines in LINES.items():
        write(tmp_path, name, lines)
        for line in lines:
            save_image(tmp_path / line.split()[0], 40)
    return tmp_path


def write(root, name, lines):
    (root / f"{name}.txt").write_text("".join(line + "\n" for line in lines))


def test_lists(root):
    domain = load_domainnet(root, "clipart")
    assert domain.name == "clipart"
    assert domain.class_names == ("ant", "bee", "t-shirt")
    assert domain.train.labels.tolist() == [0, 2, 1]
    assert domain.train.paths[1].name == "clipart_003_000001.jpg"
    assert domain.test.labels.tolist() == [1]
    transform = Compose([Resize(4, 4), Normalize()])
    (batch,) = eval_batches(domain.train, batch_size=3, transform=transform)
    assert batch["image"].shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match="classes: found 3, published 345; train: .*"):
        check_sizes(domain, DOMAINNET["clipart"])


def test_every_domain_has_the_classes_of_all(root):
    """Sketch has no t-shirt here, and keeps its place for it."""
    assert load_domainnet(root, "sketch").num_classes == 3


def test_classes_have_the_order_of_the_published_labels(tmp_path):
    """Those of the real lists do not sort as Python's strings, with or without case."""
    names = ("aircraft_carrier", "cello", "cell_phone", "The_Mona_Lisa", "trumpet")
    names += ("t-shirt", "umbrella")
    lines = [f"real/{name}/real_1.jpg {n}" for n, name in enumerate(names)]
    for line in lines:
        save_image(tmp_path / line.split()[0], 40)
    for part in ("train", "test"):
        write(tmp_path, f"real_{part}", lines[::-1])
    assert load_domainnet(tmp_path, "real").class_names == names


def test_lists_in_a_folder_of_their_own(root):
    (root / "txt").mkdir()
    for path in root.glob("*.txt"):
        path.rename(root / "txt" / path.name)
    assert len(load_domainnet(root, "clipart").train) == 3


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "clipart_train",
            ["clipart/ant/1.jpg 0", "clipart/bee/2.jpg"],
            r"clipart_train.txt, line 2: found 'clipart/bee/2.jpg', expected",
        ),
        ("clipart_train", ["clipart/ant/1.jpg -1"], "line 1: found"),
        ("clipart_train", ["clipart/ant.jpg 0"], "line 1: found"),
        ("clipart_test", [], "clipart_test.txt: found no line"),
        (
            "sketch_train",
            ["sketch/bee/1.jpg 0"],
            "label 0 is 'ant' in clipart_train.txt, line 1 and 'bee' in sketch_train",
        ),
        (
            "sketch_train",
            ["sketch/cat/1.jpg 4"],
            "no line has label 3, and labels go up to 4",
        ),
        (
            "sketch_train",
            ["sketch/ant/1.jpg 3"],
            "sketch_train.txt, line 1 gives 'ant' label 3, and clip.* gives it 0",
        ),
    ],
)
def test_bad_lists_are_named(root, name, lines, message):
    write(root, name, lines)
    with pytest.raises(ValueError, match=message):
        load_domainnet(root, "clipart")


def test_a_list_that_is_no_text_is_named(root):
    (root / "sketch_train.txt").write_bytes(b"\xff\xd8 0")
    with pytest.raises(ValueError, match="sketch_train.txt: no text in UTF-8"):
        load_domainnet(root, "clipart")


def test_missing_files_are_named(root):
    with pytest.raises(FileNotFoundError, match="real_train.txt: no such.*clipart_te"):
        load_domainnet(root, "real")
    (root / "clipart/bee/clipart_002_000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images are missing.*bee/clip"):
        load_domainnet(root, "clipart")


def test_unreadable_image_is_named(root):
    (root / "clipart/ant/clipart_001_000001.jpg").write_bytes(b"\xff\xd8cut")
    source = load_domainnet(root, "clipart").train
    with pytest.raises(ValueError, match="ant/clipart_001_000001.jpg: does not decode"):
        source[0]
