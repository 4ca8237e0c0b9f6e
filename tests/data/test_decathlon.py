"""The Decathlon's annotations and images, as its archives lay them."""

import json

import pytest
from pictures import save_image

from ftn_jax.data import (
    DECATHLON,
    check_sizes,
    load_decathlon,
    load_decathlon_test,
)


def image(n, part):
    return {"id": n, "file_name": f"data/dtd/{part}/{n:04}.jpg", "width": 6}


def annotations(part, pairs):
    """Make COCO's layout of (image id, category id)."""
    return {
        "images": [image(n, part) for n, _ in pairs],
        "annotations": [
            {"id": k, "image_id": n, "category_id": c}
            for k, (n, c) in enumerate(reversed(pairs))
        ],
        # Ids that neither start at 0 nor come in order.
        "categories": [{"id": 12, "name": "dots"}, {"id": 11, "name": "bands"}],
    }


CONTENT = {
    "train": annotations("train", [(1, 12), (2, 11), (3, 12)]),
    "val": annotations("val", [(4, 11)]),
    "test_stripped": {"images": [image(5, "test"), image(6, "test")]},
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part, content in CONTENT.items():
        write(tmp_path, part, content)
        for entry in content["images"]:
            save_image(tmp_path / entry["file_name"], 9 * entry["id"])
    return tmp_path


def write(root, part, content):
    path = root / "annotations" / f"dtd_{part}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_train_and_validation(root):
    domain = load_decathlon(root, "dtd")
    assert (domain.name, domain.class_names) == ("dtd", ("bands", "dots"))
    found = {
        int(domain.train[i].image[0, 0, 0]): domain.train[i].label for i in range(3)
    }
    assert {round(red / 9): label for red, label in found.items()} == {1: 1, 2: 0, 3: 1}
    assert domain.test.labels.tolist() == [0] and domain.validation is None
    with pytest.raises(ValueError, match="train: found 3, published 1,880; test"):
        check_sizes(domain, DECATHLON["dtd"])


def test_unlabelled_test_images(root):
    images = load_decathlon_test(root, "dtd")
    assert [number for number, _ in images] == [5, 6]
    assert images[0][1] == root / "data/dtd/test/0005.jpg"
    images[1][1].unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images are missing"):
        load_decathlon_test(root, "dtd")


def changed(part="train", **changes):
    return CONTENT[part] | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "dtd_train.json: not JSON .* get the devkit again"),
        ([1], "found no list indices"),
        ({"images": [{"id": 1}]}, "found no 'file_name' in an image's entry"),
        ({k: v for k, v in changed().items() if k != "categories"}, "no 'categories'"),
        (changed(annotations=CONTENT["train"]["annotations"][1:]), "1 of 3 images hav"),
        (
            changed(annotations=2 * CONTENT["train"]["annotations"]),
            "gives image 3 category 12; expected one annotation",
        ),
        (
            changed(annotations=[{"image_id": 1, "category_id": 13}]),
            "gives image 1 category 13; expected",
        ),
        (
            changed(
                categories=[*CONTENT["train"]["categories"], {"id": 1, "name": "x"}]
            ),
            r"dtd_val.json: its categories differ .*\(2 and 3\)",
        ),
    ],
)
def test_damaged_annotations_are_named(root, content, message):
    write(root, "train", content)
    with pytest.raises(ValueError, match=message) as caught:
        load_decathlon(root, "dtd")
    assert str(root / "annotations") in str(caught.value)


def test_missing_files_are_named(root):
    with pytest.raises(FileNotFoundError, match=r"'svhn'; found \['dtd_train.json'\]"):
        load_decathlon(root, "svhn")
    (root / "data/dtd/val/0004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="dtd_val.json: 1 of 1 .* dtd.tar"):
        load_decathlon(root, "dtd")
