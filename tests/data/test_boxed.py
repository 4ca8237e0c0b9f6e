"""CUB-200-2011 and Stanford Cars: tables, boxes, and the pixels that are cut out."""

import numpy as np
import pytest
from pictures import save_ramp
from scipy.io import savemat

from ftn_jax.data import FileSource, load_cars, load_cub

BIRDS = {
    "classes": ["1 001.Albatross", "2 002.Crow"],
    "images": ["1 001.Albatross/a.jpg", "2 002.Crow/b.png", "3 002.Crow/c.png"],
    "image_class_labels": ["1 1", "2 2", "3 2"],
    "train_test_split": ["1 0", "2 1", "3 1"],
    "bounding_boxes": ["1 0.0 0.0 3.0 3.0", "2 2.0 1.0 6.0 4.0", "3 8.0 6.0 9.0 9.0"],
}


def write(root, name, lines):
    (root / f"{name}.txt").write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def birds(tmp_path):
    for name, lines in BIRDS.items():
        write(tmp_path, name, lines)
    for line in BIRDS["images"]:
        save_ramp(tmp_path / "images" / line.split()[1])
    return tmp_path


def extent(image):
    """Give left, top, right, bottom of a cut from `save_ramp`'s picture."""
    return [*image[0, 0, :2], *image[-1, -1, :2] + 1]


def test_cub(birds):
    domain = load_cub(birds)
    assert domain.class_names == ("001.Albatross", "002.Crow")
    assert domain.train.labels.tolist() == [1, 1]
    assert domain.test.labels.tolist() == [0]
    assert extent(domain.train[0].image) == [2, 1, 8, 5]
    assert extent(domain.train[1].image) == [8, 6, 12, 10]  # clipped
    assert extent(load_cub(birds, margin=0.25).train[0].image) == [0, 0, 10, 6]
    assert extent(load_cub(birds, crop=False).train[0].image) == [0, 0, 12, 10]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("images", ["1"], "images.txt, line 1: found '1', expected 2 columns"),
        ("images", [], "images.txt: found no line"),
        ("bounding_boxes", ["1 0 0 3 3"], "bounding_boxes.txt: 2 of 3 images have no"),
        ("image_class_labels", ["1 3", "2 2", "3 2"], r"classes \['3'\] are not in"),
        ("image_class_labels", ["1 2", "2 2", "3 2"], "which classes.txt calls '002"),
        ("classes", ["1 002.Crow", "2 001.Albatross"], "class 0 is '002.Crow'"),
        ("train_test_split", ["1 0", "2 0", "3 0"], "no image .* the part 'train'"),
    ],
)
def test_cub_tables_must_agree(birds, name, lines, message):
    write(birds, name, lines)
    with pytest.raises(ValueError, match=message) as caught:
        load_cub(birds)
    assert str(birds) in str(caught.value)


def test_missing_bird_is_named(birds):
    (birds / "images/002.Crow/c.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 .*c.png; extract CUB"):
        load_cub(birds)
    (birds / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="classes.txt: no such file"):
        load_cub(birds)


def cars_table(path, rows, fields=("fname", "class")):
    names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *fields)
    table = np.empty((1, len(rows)), [(name, object) for name in names])
    for n, (file, label, box) in enumerate(rows):
        table[0, n] = (*box, *(file, label)[: len(fields)])
    path.parent.mkdir(exist_ok=True)
    savemat(path, {"annotations": table})


@pytest.fixture
def cars(tmp_path):
    (tmp_path / "devkit").mkdir()
    names = np.array(["AM General", "Volvo"], object)
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": names})
    rows = [("00001.png", 2, (1, 1, 4, 5)), ("00002.png", 1, (3, 2, 12, 10))]
    cars_table(tmp_path / "devkit/cars_train_annos.mat", rows)
    cars_table(tmp_path / "cars_test_annos_withlabels.mat", rows[:1])
    for part in ("cars_train", "cars_test"):
        for file, _, _ in rows:
            save_ramp(tmp_path / part / file)
    return tmp_path


def test_cars(cars):
    domain = load_cars(cars)
    assert domain.class_names == ("AM General", "Volvo")
    assert domain.train.labels.tolist() == [1, 0]
    assert domain.test.labels.tolist() == [1]
    assert extent(domain.train[0].image) == [0, 0, 4, 5]
    assert extent(domain.train[1].image) == [2, 1, 12, 10]
    assert domain.test.paths[0].parent.name == "cars_test"
    assert extent(load_cars(cars, crop=False).train[0].image) == [0, 0, 12, 10]


def test_cars_without_labels_or_files(cars):
    labels = cars / "cars_test_annos_withlabels.mat"
    cars_table(labels, [("00001.png", 2, (1, 1, 4, 5))], fields=("fname",))
    with pytest.raises(ValueError, match=r"lack \['class'\]; for the test set get"):
        load_cars(cars)
    labels.write_bytes(b"no table")
    with pytest.raises(ValueError, match="withlabels.mat: cannot be read"):
        load_cars(cars)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="withlabels.mat: no such file"):
        load_cars(cars)


def test_boxes_must_fit(tmp_path):
    path = save_ramp(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"found shape \(4,\), expected \(1, 4\)"):
        FileSource([path], [0], boxes=[1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"labels: found shape \(2,\), expected \(1,"):
        FileSource([path], [0, 1])
    outside = FileSource([path], [0], boxes=[[12, 0, 15, 4]])
    with pytest.raises(ValueError, match=r"a.png.*\[12, 0, 15, 4\].*no pixel of 12x10"):
        outside[0]
