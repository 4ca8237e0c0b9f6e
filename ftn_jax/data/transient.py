"""Reader of the Transient Attributes data set: webcam images by season, in daytime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from ftn_jax.data.domain import Domain, Subset, split
from ftn_jax.data.files import FileSource, read_lines, require_files

SEASONS = ("spring", "summer", "autumn", "winter")
PUBLISHED_COUNTS = {"spring": 1405, "summer": 1875, "autumn": 1353, "winter": 2566}
"""Images of each season as the FTN paper counts them; it does not give its rules."""


@dataclass(frozen=True)
class SeasonRules:
    """Which images belong to a season.

    Attributes:
        rule: `"largest"`: an image belongs to the season with its highest score, if
            that reaches `threshold`; `"threshold"`: to every season whose score does.
        threshold: least score of a season, in the file's own unit.
        daytime: attribute that must reach `daytime_threshold`; empty for none.
        daytime_threshold: least score of daytime.
    """

    rule: Literal["largest", "threshold"] = "largest"
    threshold: float = 0.0
    daytime: str = "daylight"
    daytime_threshold: float = 0.5


@dataclass(frozen=True)
class Annotations:
    """Scores of every image.

    Attributes:
        paths: of the images, relative to the image folder.
        attributes: names of the columns.
        scores: one row for each image.
    """

    paths: tuple[str, ...]
    attributes: tuple[str, ...]
    scores: Float[np.ndarray, "n attributes"]

    def column(self, name: str) -> Float[np.ndarray, " n"]:
        """Return an attribute's scores.

        Raises:
            ValueError: if there is no such column.
        """
        if name not in self.attributes:
            raise ValueError(
                f"the annotations have no column {name!r}, they have "
                f"{', '.join(self.attributes)}"
            )
        return self.scores[:, self.attributes.index(name)]


def read_annotations(folder: str | Path) -> Annotations:
    """Read `annotations.tsv` and `attributes.txt`.

    The table has no header: an image's path, then for each attribute
    `score,confidence`, separated by tabs. The confidence is not used.

    Raises:
        FileNotFoundError: if one of the files is absent.
        ValueError: if a row has another number of columns, or no number where a score
            should be; the message names file and line.
    """
    folder = Path(folder)
    names = tuple(_lines(folder / "attributes.txt"))
    table = folder / "annotations.tsv"
    paths, scores = [], []
    for number, line in enumerate(_lines(table), start=1):
        path, *cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(
                f"{table}, line {number}: found {len(cells)} columns of scores, "
                f"expected the {len(names)} of attributes.txt"
            )
        try:
            found = [float(cell.split(",")[0]) for cell in cells]
            if not np.isfinite(found).all():
                raise ValueError(f"found scores {found}, expected finite numbers")
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: {error}") from error
        scores.append(found)
        paths.append(path)
    if not paths:
        raise ValueError(f"{table}: no line, expected one for each image")
    return Annotations(tuple(paths), names, np.array(scores))


def choose_seasons(
    annotations: Annotations,
    rules: SeasonRules,
    *,
    seasons: Sequence[str] = SEASONS,
) -> dict[str, np.ndarray]:
    """Return the rows that belong to each season.

    Raises:
        ValueError: if a column is missing, or no image belongs to a season (says how
            high the scores go).
    """
    scores = np.stack([annotations.column(name) for name in seasons], axis=1)
    bright = np.ones(len(scores), bool)
    if rules.daytime:
        bright = annotations.column(rules.daytime) >= rules.daytime_threshold
    belongs = (scores >= rules.threshold) & bright[:, None]
    if rules.rule == "largest":
        belongs &= scores.argmax(axis=1)[:, None] == np.arange(len(seasons))
    rows = {name: np.flatnonzero(x) for name, x in zip(seasons, belongs.T, strict=True)}
    if empty := [name for name, found in rows.items() if not len(found)]:
        highest = dict(zip(seasons, scores.max(axis=0).tolist(), strict=True))
        raise ValueError(
            f"no image belongs to {empty} under {rules}; {bright.sum()} images are in "
            f"daytime, the highest scores are {highest}: lower the thresholds"
        )
    return rows


def load_seasons(
    root: str | Path,
    rules: SeasonRules | None = None,
    *,
    seasons: Sequence[str] = SEASONS,
    images: str = "imageAlignedLD",
    test_list: str | None = "holdout_split/test.txt",
) -> dict[str, Domain]:
    """Read one domain of one class for each season.

    Args:
        root: folder with the image folder and `annotations/`.
        rules: which images belong to a season.
        seasons: names of the columns.
        images: name of the image folder.
        test_list: file of the images, or folders of images, that are held out, below
            `root`; `None` holds out a tenth at random.

    Raises:
        FileNotFoundError: if a file or an image is absent.
        ValueError: if the annotations are damaged or lack a column, or a season has no
            image to train on or to hold out.
    """
    root = Path(root)
    annotations = read_annotations(root / "annotations")
    rows = choose_seasons(annotations, rules or SeasonRules(), seasons=seasons)
    held_out = None if test_list is None else set(_lines(root / test_list))
    domains = {}
    for name, found in rows.items():
        paths = [annotations.paths[i] for i in found]
        files = [root / images / path for path in paths]
        require_files(
            files,
            listed_in=root / "annotations" / "annotations.tsv",
            advice=f"unpack the archive of images as {root / images}",
        )
        source = FileSource(files, [0] * len(files))
        if held_out is None:
            train, test = split(source, 0.1, seed=0)
        else:
            out = np.array(
                [p in held_out or p.split("/")[0] in held_out for p in paths]
            )
            if out.all() or not out.any():
                raise ValueError(
                    f"{name}: {out.sum()} of {len(out)} images are in {test_list}, "
                    "expected some but not all; hold out at random instead"
                )
            train, test = (Subset(source, np.flatnonzero(x)) for x in (~out, out))
        domains[name] = Domain(name, (name,), train, test)
    return domains


def describe_counts(domains: Mapping[str, Domain]) -> str:
    """Say how many images each season has, beside the published numbers."""
    lines = ["| season | images | published |", "|---|--:|--:|"]
    for name, domain in domains.items():
        total = len(domain.train) + len(domain.test)
        lines.append(f"| {name} | {total:,} | {PUBLISHED_COUNTS.get(name, '–')} |")
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected the Transient Attributes data set there"
        )
    return [line for line in read_lines(path) if line.strip()]
