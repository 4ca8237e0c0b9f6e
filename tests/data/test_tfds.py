"""TensorFlow Datasets: prepare a small one, read it back by index and through Grain."""

import hashlib
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import save_image, save_ramp, write_fer2013

from ftn_jax.data import (
    Compose,
    Normalize,
    Resize,
    Sizes,
    TFDSSource,
    grain_dataset,
    load_tfds,
    train_batches,
    train_steps,
)
from ftn_jax.data.tfds_domains import _cut

tfds = pytest.importorskip("tensorflow_datasets")
builders = pytest.importorskip("ftn_jax.data.builders")
TRANSFORM = Compose([Resize(8, 8), Normalize()])
FORMAT = {"file_format": "array_record"}


def prepare(name, data_dir, manual_dir):
    config = tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    builder = tfds.builder(name, data_dir=data_dir, **FORMAT)
    builder.download_and_prepare(download_config=config)
    return builder


@pytest.fixture
def sketches(tmp_path, monkeypatch):
    """Write Piggyback's layout, and say that so few images are all there are."""
    sizes = {"sketches": Sizes(2, 3, 2)}
    monkeypatch.setattr(builders, "IMAGENET_TO_SKETCH", sizes)
    manual = tmp_path / "manual"
    save_ramp(manual / "sketches/train/ant/a.png")
    save_ramp(manual / "sketches/train/bee/b.png", size=(5, 20))
    save_image(manual / "sketches/train/bee/c.jpg", 77, mode="L")
    save_image(manual / "sketches/test/bee/d.png", (1, 2, 3))
    save_image(manual / "sketches/test/ant/e.png", (1, 2, 3))
    return manual


def test_piggyback_folder_is_prepared_and_read_back_through_grain(sketches, tmp_path):
    prepare("piggyback_sketches", tmp_path, sketches)
    domain = load_tfds("piggyback_sketches", data_dir=tmp_path)
    assert domain.class_names == ("ant", "bee")
    assert sorted(domain.train.labels.tolist()) == [0, 1, 1]
    assert len(domain.test) == 2 and domain.validation is None
    shapes = {domain.train[i].image.shape: domain.train[i].label for i in range(3)}
    assert shapes == {(10, 12, 3): 0, (20, 5, 3): 1, (5, 6, 3): 1}
    ant = domain.train[domain.train.labels.tolist().index(0)].image
    assert ant[3, 4].tolist() == [4, 3, 0]  # the file's own pixels
    options = {"batch_size": 2, "transform": TRANSFORM, "seed": 0, "num_epochs": 2}
    found = list(iter(grain_dataset(train_steps(domain.train, **options))))
    for one, other in zip(found, train_batches(domain.train, **options), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
    (other,) = itertools.islice(train_batches(domain.train, workers=1, **options), 1)
    np.testing.assert_array_equal(other["image"], found[0]["image"])


def test_labels_are_read_once(sketches, tmp_path):
    builder = prepare("piggyback_sketches", tmp_path, sketches)
    labels = TFDSSource(builder, "train+test").labels
    kept = list((tmp_path / "piggyback_sketches/1.0.0").glob("label-*.npy"))
    assert [path.name for path in kept] == ["label-train%2Btest.npy"]
    np.testing.assert_array_equal(np.load(kept[0]), labels)
    np.save(kept[0], labels[::-1])
    again = TFDSSource(builder, "train+test")
    assert again.labels.tolist() == labels[::-1].tolist()
    np.save(kept[0], labels[:2])  # of another preparation
    assert TFDSSource(builder, "train+test").labels.tolist() == labels.tolist()
    kept[0].write_bytes(kept[0].read_bytes()[:-3])  # cut off
    assert TFDSSource(builder, "train+test").labels.tolist() == labels.tolist()
    assert np.load(kept[0]).tolist() == labels.tolist()


def test_fer2013_is_prepared_with_its_checksum(tmp_path, monkeypatch):
    path = write_fer2013(tmp_path / "manual/fer2013.csv")
    with pytest.raises(ValueError, match="fer2013.csv: found MD5 .*expected f8428a1e"):
        prepare("fer2013", tmp_path, path.parent)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(builders.Fer2013.MD5, path.name, md5)
    prepare("fer2013", tmp_path, path.parent)
    domain = load_tfds("fer2013", data_dir=tmp_path, validation="validation")
    assert domain.class_names[3] == "happy"
    parts = (domain.train, domain.validation, domain.test)
    assert [sorted(p.labels.tolist()) for p in parts] == [[0, 1], [2], [3]]
    image, label = domain.test[0]
    assert image.shape == (48, 48, 1) and (image == 30).all() and label == 3


def test_wrong_counts_and_bad_images_stop_the_preparation(sketches, tmp_path):
    bad = sketches / "sketches/train/ant/a.png"
    bad.write_bytes(bad.read_bytes()[:30])
    with pytest.raises(ValueError, match="ant/a.png: does not decode"):
        prepare("piggyback_sketches", tmp_path, sketches)
    bad.unlink()
    save_ramp(sketches / "sketches/train/ant/b.png")
    save_ramp(sketches / "sketches/train/ant/c.png")
    with pytest.raises(ValueError, match="sketches: train: found 4, published 3"):
        prepare("piggyback_sketches", tmp_path, sketches)


def test_what_is_not_prepared_says_how_to(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)download_and_prepare.*uofi.box"):
        load_tfds("piggyback_wikiart", data_dir=tmp_path)


class Boxed(tfds.core.GeneratorBasedBuilder):
    """Pictures with boxes and another name for the class, as `cars196` has them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "kind": tfds.features.ClassLabel(names=["a", "b"]),
            "bbox": tfds.features.BBoxFeature(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        path = save_ramp(Path(self._data_dir_root) / "ramp.png", size=(12, 10))
        box = tfds.features.BBox(ymin=0.2, xmin=0.25, ymax=0.5, xmax=1.0)
        yield 0, {"image": path, "kind": 1, "bbox": box}


def test_boxes_and_names_of_features(tmp_path):
    builder = prepare("boxed", tmp_path, tmp_path)
    domain = load_tfds("boxed", data_dir=tmp_path, label="kind", box="bbox")
    image, label = domain.train[0]
    assert (image.shape, label) == ((3, 9, 3), 1)
    assert image[0, 0].tolist() == [3, 2, 0]
    with pytest.raises(ValueError, match="ramp: the box .* holds no pixel of 12x10"):
        _cut(np.zeros((10, 12, 3), np.uint8), np.array([0.2, 0, 0.21, 1]), name="ramp")
    whole = load_tfds("boxed", data_dir=tmp_path, label="kind")
    assert whole.train[0].image.shape == (10, 12, 3)
    with pytest.raises(ValueError, match=r"found features \['bbox', 'image', 'kind'\]"):
        load_tfds("boxed", data_dir=tmp_path)
    with pytest.raises(ValueError, match="boxed/1.0.0, dev: cannot be read by index"):
        TFDSSource(builder, "dev", label="kind")


def test_tfds_own_builder_of_arrays(tmp_path):
    """TensorFlow encodes the arrays that this builder of TFDS's own gives."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("preparing a builder that gives arrays needs tensorflow")
    code = f"""
import tensorflow_datasets as tfds
options = {{"data_dir": {str(tmp_path)!r}, "file_format": "array_record"}}
builder = tfds.testing.DummyMnist(**options)
builder.download_and_prepare()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    builder = tfds.builder_from_directory(next(tmp_path.glob("dummy_mnist/*")))
    source = TFDSSource(builder, "train")
    assert source[0].image.shape == (28, 28, 1)
    assert len(source) == len(source.labels) == 20


def test_reading_needs_no_tensorflow():
    code = """
import sys
import ftn_jax.data
assert not {"tensorflow_datasets", "grain", "tensorflow"} & set(sys.modules)
import ftn_jax.data.builders
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
