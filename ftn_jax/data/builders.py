"""TFDS builders for data sets that TFDS lacks; importing this module registers them.

    import tensorflow_datasets as tfds
    import ftn_jax.data.builders

    options = {"data_dir": ..., "file_format": "array_record"}
    builder = tfds.builder("piggyback_wikiart", **options)
    builder.download_and_prepare()  # TensorFlow is not needed

None can be downloaded by a program: each says what to put where.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ftn_jax.data import fer2013
from ftn_jax.data.domain import Source
from ftn_jax.data.folders import load_folder
from ftn_jax.data.published import IMAGENET_TO_SKETCH, check_sizes

_PIGGYBACK = """
Get the archive of Mallya et al. 2018 ("Piggyback") from
https://uofi.box.com/s/ixncr3d85guosajywhf7yridszzg5zsq and extract it, so that the
manual directory holds {folder}/train/CLASS/*.jpg and {folder}/test/CLASS/*.jpg. The
archive's folders are the split; no list of it is published, and no checksum.
"""


class _Piggyback(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a folder of Piggyback's archive, its files as they are."""

    VERSION = tfds.core.Version("1.0.0")
    FOLDER = ""
    DESCRIPTION = ""
    CITATION = ""

    def _info(self) -> tfds.core.DatasetInfo:
        # Class names lie in the archive alone: they are set when it is read.
        classes = IMAGENET_TO_SKETCH[self.FOLDER].classes
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=classes),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        domain = load_folder(Path(dl_manager.manual_dir) / self.FOLDER)
        check_sizes(domain, IMAGENET_TO_SKETCH[self.FOLDER])
        features: Any = self.info.features
        features["label"].names = list(domain.class_names)
        return {
            part: self._generate_examples(getattr(domain, part))
            for part in ("train", "test")
        }

    def _generate_examples(self, source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, path in enumerate(source.paths):
            source[index]  # an image that does not decode is refused by its name
            name = "/".join(path.parts[-2:])
            label = int(source.labels[index])
            yield name, {"image": path, "label": label, "file_name": name}


class PiggybackWikiart(_Piggyback):
    """WikiArt: paintings by 195 artists."""

    FOLDER = "wikiart"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _PIGGYBACK.format(folder="wikiart")
    DESCRIPTION = "WikiArt as in ImageNet-to-Sketch: the artist of a painting."
    CITATION = """@article{saleh2015large,
  title={Large-scale Classification of Fine-Art Paintings},
  author={Saleh, Babak and Elgammal, Ahmed}, year={2015}}"""


class PiggybackSketches(_Piggyback):
    """TU-Berlin Sketch: 250 kinds of objects, drawn by hand."""

    FOLDER = "sketches"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _PIGGYBACK.format(folder="sketches")
    DESCRIPTION = "TU-Berlin sketches as in ImageNet-to-Sketch: what was drawn."
    CITATION = """@article{eitz2012hdhso,
  title={How Do Humans Sketch Objects?},
  author={Eitz, Mathias and Hays, James and Alexa, Marc}, year={2012}}"""


class Fer2013(tfds.core.GeneratorBasedBuilder):
    """FER2013: seven facial expressions, 48x48 gray."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
Get fer2013.csv (or icml_face_data.csv) of the Kaggle challenge
"challenges-in-representation-learning-facial-expression-recognition-challenge" and put
it in the manual directory.
"""
    MD5 = {
        "fer2013.csv": "f8428a1edbd21e88f42c73edd2a14f95",
        "icml_face_data.csv": "b114b9e04e6949e5fe8b6a98b3892b1d",
    }
    """Checksums of the two files, as torchvision 0.25 checks them."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Facial expressions of the 2013 challenge.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(fer2013.PIXELS, fer2013.PIXELS, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(names=list(fer2013.CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
            citation="""@inproceedings{goodfellow2013challenges,
  title={Challenges in Representation Learning},
  author={Goodfellow, Ian and others}, year={2013}}""",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        path = fer2013.find_fer2013(Path(dl_manager.manual_dir))
        self._check(path)
        domain = fer2013.load_fer2013(path)
        return {
            part: self._generate_examples(getattr(domain, part))
            for part in ("train", "validation", "test")
        }

    def _check(self, path: Path) -> None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != self.MD5[path.name]:
            raise ValueError(
                f"{path}: found MD5 {found}, expected {self.MD5[path.name]}; get the "
                "file again"
            )

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict]]:
        for index in range(len(source)):
            example = source[index]
            png = io.BytesIO(_png(example.image))
            yield index, {"image": png, "label": example.label}


def _png(image: np.ndarray) -> bytes:
    """Encode here: TFDS would need TensorFlow for an array."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()
