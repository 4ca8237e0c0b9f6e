"""The Visual Decathlon's data sets: images beside annotations in COCO's layout."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ftn_jax.data.domain import Domain
from ftn_jax.data.files import FileSource, require_files

_ARCHIVES = "https://www.robots.ox.ac.uk/~vgg/decathlon/"


class _Part(NamedTuple):
    paths: list[Path]
    labels: list[int]
    categories: dict[int, str]


def load_decathlon(root: str | Path, name: str) -> Domain:
    """Read `annotations/<name>_{train,val}.json` and the images they name.

    A class index is the place of the category's id in sorted order. The test labels
    are withheld: the domain's `test` is the validation set, so that it has none left to
    choose by.

    Args:
        root: the folder with `annotations/` (of the devkit) and `data/<name>/`.
        name: such as `"aircraft"`.

    Raises:
        FileNotFoundError: where an annotation file or an image is absent.
        ValueError: where an annotation file is damaged, an image has no label or two,
            or the two parts have other categories; the message names the file.

    Source: Rebuffi et al. 2017, "Learning multiple visual domains with residual
    adapters"; the archives' version 1.0.
    """
    root = Path(root)
    train, val = (_read(root, name, part) for part in ("train", "val"))
    if train.categories != val.categories:
        raise ValueError(
            f"{_file(root, name, 'val')}: its categories differ from those of "
            f"{_file(root, name, 'train').name} ({len(val.categories)} and "
            f"{len(train.categories)}); the files do not belong together"
        )
    names = tuple(text for _, text in sorted(train.categories.items()))
    return Domain(
        name,
        names,
        train=FileSource(train.paths, train.labels),
        test=FileSource(val.paths, val.labels),
    )


def load_decathlon_test(root: str | Path, name: str) -> list[tuple[int, Path]]:
    """List the unlabelled test images as (image id, file), for a submission.

    Raises:
        FileNotFoundError: where the annotation file or an image is absent.
        ValueError: where the file is damaged.
    """
    root = Path(root)
    path = _file(root, name, "test_stripped")
    images = _images(root, _load(path, name), path)
    require_files([*images.values()], listed_in=path, advice=_advice(root, name))
    return list(images.items())


def _file(root: Path, name: str, part: str) -> Path:
    return root / "annotations" / f"{name}_{part}.json"


def _advice(root: Path, name: str) -> str:
    return (
        f"extract {name}.tar, which lies in decathlon-1.0-data.tar.gz ({_ARCHIVES}), "
        f"in {root / 'data'}"
    )


def _load(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*_train.json"))
        raise FileNotFoundError(
            f"{path}: no annotations of {name!r}; found {known}. Extract "
            f"decathlon-1.0-devkit.tar.gz ({_ARCHIVES}) there"
        )
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); get the devkit again") from error


def _images(root: Path, content: dict[str, Any], path: Path) -> dict[int, Path]:
    try:
        return {entry["id"]: root / entry["file_name"] for entry in content["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: found no {error} in an image's entry or no list of images; "
            "expected COCO's layout: get the devkit again"
        ) from error


def _read(root: Path, name: str, part: str) -> _Part:
    path = _file(root, name, part)
    content = _load(path, name)
    images = _images(root, content, path)
    try:
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        pairs = [(a["image_id"], a["category_id"]) for a in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: found no {error}, expected categories and annotations in COCO's "
            "layout: get the devkit again"
        ) from error
    index = {category: n for n, category in enumerate(sorted(categories))}
    labels: dict[int, int] = {}
    for image, category in pairs:
        if image not in images or category not in index or image in labels:
            raise ValueError(
                f"{path}: an annotation gives image {image} category {category}; "
                "expected one annotation for each image, of known ids"
            )
        labels[image] = index[category]
    if bare := sorted(set(images) - set(labels)):
        raise ValueError(
            f"{path}: {len(bare)} of {len(images)} images have no annotation, the "
            f"first is {images[bare[0]].name}; get the devkit again"
        )
    paths = [images[image] for image in labels]
    require_files(paths, listed_in=path, advice=_advice(root, name))
    return _Part(paths, [*labels.values()], categories)
