"""Reading domains from files, and what is said of bad ones."""

import logging

import numpy as np
import pytest
from pictures import save_image

from ftn_jax.data import (
    Compose,
    FileSource,
    Normalize,
    Resize,
    Sizes,
    check_sizes,
    eval_batches,
    find_domains,
    load_digits,
    load_domain,
    load_folder,
    load_npz,
)

Image = pytest.importorskip("PIL.Image")


def arrays(**changes):
    """Make the arrays of a small domain; a value of `None` leaves a key out."""
    images = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
    whole = {
        "x_train": images,
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": images[:2],
        "y_test": np.array([1, 2]),
        "class_names": np.array(["ant", "bee", "cat"]),
    }
    return {k: v for k, v in (whole | changes).items() if v is not None}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "pets.npz"
        np.savez_compressed(path, **arrays(**changes))
        return path

    return write


def test_npz(write):
    domain = load_npz(write())
    assert (domain.name, domain.num_classes) == ("pets", 3)
    assert domain.class_names == ("ant", "bee", "cat")
    assert all(type(name) is str for name in domain.class_names)
    assert (len(domain.train), len(domain.test)) == (6, 2)
    assert (domain.train[4].image == arrays()["x_train"][4]).all()
    assert domain.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_npz_with_validation_data(write):
    assert load_npz(write()).validation is None
    images = arrays()["x_train"][3:5]
    found = load_npz(write(x_val=images, y_val=np.array([2, 3]), class_names=None))
    assert (found.validation[1].image == images[1]).all()
    assert found.validation.labels.tolist() == [2, 3] and found.num_classes == 4


def test_npz_without_names_or_channels(write):
    gray = arrays()["x_train"][..., 0]
    domain = load_npz(write(class_names=None, x_train=gray, x_test=gray[:2]))
    assert domain.class_names == ("0", "1", "2")
    assert domain.train[0].image.shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, r"expected also \['y_test'\]"),
        ({"y_train": np.array([0, 1, 2, 0, 1, 3])}, "train has labels 0..3"),
        ({"y_test": np.array([-1, 2])}, "test: labels: found -1"),
        ({"y_train": np.array([0, 1])}, "train: found 6 images and 2 labels"),
        ({"y_test": np.array([0.5, 1])}, "test: labels: found float64"),
        ({"x_train": np.zeros((6, 4, 5, 3))}, "train: images: found dtype float64"),
        ({"x_test": np.zeros((2, 3, 4, 5), np.uint8)}, "test: .*channels-last"),
        ({"x_test": np.zeros((2, 4, 5, 1), np.uint8)}, "found train 3 and test 1"),
        ({"x_val": arrays()["x_test"]}, r"expected also \['y_val'\]"),
        ({"class_names": np.array(["ant", "bee"])}, "2 class names"),
        ({"class_names": np.array([1, 2, 3])}, "class_names: found int64"),
        ({"y_train": np.array([0, 1, 2, 0, 1, None])}, "without pickled objects"),
        ({"class_names": np.array(["a", "b", 3], object)}, "without pickled objects"),
    ],
)
def test_bad_npz_is_refused_by_name(write, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_npz(write(**change))
    assert "pets.npz" in str(caught.value)


def test_truncated_npz_is_refused_by_name(write):
    path = write()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="pets.npz: not an .npz file, or a damaged"):
        load_npz(path)


def test_npz_with_damaged_bytes_is_refused_by_name(write):
    path = write()
    content = bytearray(path.read_bytes())
    content[80:200] = bytes(120)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="pets.npz: an array cannot be read"):
        load_npz(path)


def test_missing_npz_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        load_domain(tmp_path / "none.npz")


@pytest.fixture
def folder(tmp_path):
    """Write two classes, of which the second is written first."""
    root = tmp_path / "fruit"
    save_image(root / "train/pear/1.png", (9, 8, 7))
    save_image(root / "train/apple/b.PNG", (1, 2, 3))
    save_image(root / "train/apple/a.png", 50, mode="L", size=(3, 4))
    save_image(root / "train/apple/deeper/c.jpg", (200, 200, 200))
    save_image(root / "test/apple/a.bmp", (4, 5, 6))
    save_image(root / "test/pear/a.png", (1, 1, 1))
    (root / "train/apple/notes.txt").write_text("no image")
    (root / "train/apple/._a.png").write_text("no image")
    (root / "train/.cache").mkdir()
    save_image(root / "train/apple/.ipynb_checkpoints/a-checkpoint.png", 50)
    return root


def test_folder(folder):
    domain = load_domain(folder)
    assert (domain.name, domain.class_names) == ("fruit", ("apple", "pear"))
    assert [p.name for p in domain.train.paths] == ["a.png", "b.PNG", "c.jpg", "1.png"]
    assert domain.train.labels.tolist() == [0, 0, 0, 1]
    assert domain.train[0].image.shape == (4, 3, 3)
    assert (domain.train[0].image == 50).all()
    image, label = domain.train[3]
    assert (image == [9, 8, 7]).all()
    assert (image.shape, image.dtype, label) == ((5, 6, 3), np.uint8, 1)


def test_a_link_to_a_folder_has_its_own_name(folder, tmp_path):
    """Domains are chosen, checked and cropped by their names."""
    (tmp_path / "cubs_cropped").symlink_to(folder)
    assert load_folder(tmp_path / "cubs_cropped").name == "cubs_cropped"
    assert load_folder(folder / "train" / "..").name == "fruit"


def test_folder_feeds_batches(folder):
    transform = Compose([Resize(8, 8), Normalize()])
    for threads in (0, 2):
        (batch,) = eval_batches(
            load_folder(folder).train,
            batch_size=6,
            transform=transform,
            threads=threads,
        )
        assert batch["image"].shape == (6, 8, 8, 3)
        assert batch["mask"].sum() == 4
        np.testing.assert_allclose(batch["image"][0], 50 / 255, rtol=1e-5)


def test_folder_takes_val_for_test(folder):
    (folder / "test").rename(folder / "val")
    domain = load_folder(folder)
    assert len(domain.test) == 2 and domain.validation is None


def test_val_beside_test_is_the_validation_part(folder):
    save_image(folder / "val/pear/1.png", (9, 8, 7))
    with pytest.raises(ValueError, match=r"val have other classes.*\['apple'\]"):
        load_folder(folder)
    save_image(folder / "val/apple/1.png", (1, 2, 3))
    assert load_folder(folder).validation.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (["pear", "apple"], "class 0 is 'apple', expected 'pear'.*another order"),
        (["apple", "pear", "plum"], r"found 2 classes, expected 3; missing: \['plum'"),
        (["apple", "plum"], r"missing: \['plum'\], unknown: \['pear'\]"),
    ],
)
def test_class_order_is_checked(folder, expected, message):
    assert load_folder(folder, class_names=["apple", "pear"]).num_classes == 2
    with pytest.raises(ValueError, match=message) as caught:
        load_folder(folder, class_names=expected)
    assert str(folder / "train") in str(caught.value)


def test_published_sizes(folder):
    domain = load_folder(folder)
    assert check_sizes(domain, Sizes(2, 4, 2)) is domain
    assert check_sizes(domain, Sizes(2, 4, None)) is domain
    with pytest.raises(
        ValueError, match="fruit: train: found 4, published 5,994; "
    ) as e:
        check_sizes(domain, Sizes(2, 5_994, 2, 7))
    assert "validation: found 0, published 7; the copy is incomplete" in str(e.value)
    assert "test:" not in str(e.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part_is_named(folder, part):
    (folder / part).rename(folder / "other")
    with pytest.raises(FileNotFoundError, match=f"found .*'other'.*the folder {part}/"):
        load_folder(folder)


def test_classes_must_agree(folder):
    (folder / "test/pear").rename(folder / "test/plum")
    with pytest.raises(
        ValueError, match=r"only train: \['pear'\], only test: \['plum'"
    ):
        load_folder(folder)


def test_empty_class_is_named(folder):
    (folder / "train/pear/1.png").unlink()
    with pytest.raises(ValueError, match="train/pear: found no image"):
        load_folder(folder)


def test_no_class_at_all_is_named(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="train: found no folder"):
        load_folder(tmp_path)


def damage(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_undecodable_image_is_named(folder, keep):
    save_image(folder / "train/apple/b.PNG", (1, 2, 3), size=(64, 64))
    damage(folder / "train/apple/b.PNG", keep)
    source = load_folder(folder).train
    assert len(source) == 4
    assert source[0].label == 0
    with pytest.raises(ValueError, match=r"b\.PNG: does not decode .*skip_bad=True"):
        source[1]


def test_skip_bad_counts_and_names(folder, caplog):
    bad = damage(folder / "train/apple/b.PNG", 30)
    with caplog.at_level(logging.WARNING, logger="ftn_jax"):
        domain = load_folder(folder, skip_bad=True)
    assert domain.train.skipped == (bad,)
    assert domain.train.labels.tolist() == [0, 0, 1]
    assert [domain.train[i].label for i in range(len(domain.train))] == [0, 0, 1]
    assert domain.test.skipped == ()
    assert "b.PNG" in caplog.text
    assert "skipped 1 images" in caplog.text


def test_skip_bad_leaves_no_class_empty(folder):
    damage(folder / "train/pear/1.png", 30)
    with pytest.raises(ValueError, match="train/pear: found no image, and 1 that do"):
        load_folder(folder, skip_bad=True)


def test_find_domains(folder, write, caplog):
    root = folder.parent
    write()
    np.savez(root / "edges.npz", x_train=np.zeros(3), edge_train=np.zeros(3))
    (root / "broken.npz").write_bytes(b"no zip")
    (root / "notes").mkdir()
    found = find_domains(root)
    assert found == {"fruit": folder, "pets": root / "pets.npz"}
    assert "broken.npz" in caplog.text
    assert "edges" not in caplog.text
    assert list(find_domains(root, ["pets", "fruit"])) == ["pets", "fruit"]
    assert [load_domain(path).name for path in found.values()] == ["fruit", "pets"]
    with pytest.raises(FileNotFoundError, match=r"\['edges'\].*\['fruit', 'pets'\]"):
        find_domains(root, ["pets", "edges"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_domains(root / "nowhere")
    folder.rename(root / "pets")
    with pytest.raises(ValueError, match="have one name"):
        find_domains(root)


def test_digits():
    pytest.importorskip("sklearn")
    domain, again = load_digits(), load_digits()
    assert (len(domain.train), len(domain.test), domain.num_classes) == (1438, 359, 10)
    assert domain.train[0].image.shape == (8, 8, 1)
    images = np.stack([domain.test[i].image for i in range(len(domain.test))])
    assert (images.min(), images.max(), images.dtype) == (0, 255, np.uint8)
    assert domain.test.indices.tolist() == again.test.indices.tolist()
    assert not set(domain.test.indices) & set(domain.train.indices)
    assert np.bincount(domain.test.labels).min() >= 34


COUNTS = {
    "caltech101": (2915, 1765, (32, 32, 3), 101),
    "cifar10_jpeg": (10000, 2000, (32, 32, 3), 10),
    "flowers5": (3453, 863, (32, 32, 3), 5),
    "gtsrb": (10000, 2000, (32, 32, 3), 43),
    "mnist": (10000, 2000, (28, 28, 1), 10),
    "omniglot_small1": (2040, 680, (28, 28, 1), 136),
    "omniglot_small2": (2340, 780, (28, 28, 1), 156),
    "pacs_art_painting": (1638, 410, (32, 32, 3), 7),
    "pacs_cartoon": (1875, 469, (32, 32, 3), 7),
    "pacs_photo": (1337, 333, (32, 32, 3), 7),
    "quickdraw3": (2400, 600, (28, 28, 1), 3),
    "sign_digits": (1648, 411, (32, 32, 3), 10),
    "usps": (7291, 2007, (16, 16, 1), 10),
}


@pytest.mark.data
@pytest.mark.parametrize("name", COUNTS)
def test_real_domain_has_its_counts(data_dir, name):
    domain = load_npz(find_domains(data_dir / "domains", [name])[name])
    shape = domain.train[0].image.shape
    assert shape == domain.test[0].image.shape
    found = (len(domain.train), len(domain.test), shape, domain.num_classes)
    assert found == COUNTS[name]
    assert set(domain.train.labels) == set(range(domain.num_classes))


@pytest.mark.data
def test_real_folder_holds_these_domains_and_a_dense_file(data_dir):
    assert set(find_domains(data_dir / "domains")) == set(COUNTS)
    with pytest.raises(ValueError, match=r"expected also \['y_train', 'y_test'"):
        load_npz(data_dir / "domains" / "bsds500_edges_80x120.npz")


def test_a_folder_without_domains_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no domain, expected .npz"):
        find_domains(tmp_path)


def test_pictures_of_16_bits_are_refused_and_turned_ones_turned(tmp_path):
    deep = np.linspace(0, 60000, 16).reshape(4, 4).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    paths = [tmp_path / "deep.png", tmp_path / "turned.jpg"]
    source = FileSource(paths, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="deep.png.*expected 8 bits"):
        source[0]
    assert source[1].image.shape == (8, 4, 3)
