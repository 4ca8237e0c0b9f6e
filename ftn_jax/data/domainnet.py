"""DomainNet: six domains of the same classes, each split by two list files."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ftn_jax.data.domain import Domain
from ftn_jax.data.files import FileSource, read_lines, require_files

_HOME = "http://csr.bu.edu/ftp/visda/2019/multi-source"


class _Line(NamedTuple):
    file: str
    label: int
    where: str


def load_domainnet(root: str | Path, name: str) -> Domain:
    """Read a domain from `<name>_train.txt` and `<name>_test.txt`.

    Their lines are `<name>/<class>/<file> <label>`. The classes are read from all the
    list files that lie there, so that every domain has the same. Their order is that of
    the labels: the published lists leave case and punctuation out of account (`cello`,
    `cell_phone`; `trumpet`, `t-shirt`), so image folders of the same files, sorted by
    name, number them otherwise.

    Args:
        root: the folder with the list files (or with `txt/`, which holds them) and
            the domains' folders of images.
        name: such as `"clipart"`.

    Raises:
        FileNotFoundError: where a list file or a listed image is absent.
        ValueError: where a line cannot be read, two labels share a class folder or
            two folders a label, or a label has no line; the message names file and
            line.

    Source: Peng et al. 2019, "Moment Matching for Multi-Source Domain Adaptation";
    the cleaned version.
    """
    root = Path(root)
    lists = root / "txt" if (root / "txt").is_dir() else root
    parts: dict[str, list[_Line]] = {}
    for part in ("train", "test"):
        path = lists / f"{name}_{part}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such list file; found {_listed(lists)}. Get it from "
                f"{_HOME}/domainnet/txt/"
            )
        parts[part] = _read(path)
    others = (p for p in _list_files(lists) if p.stem.rpartition("_")[0] != name)
    classes = _class_names([*parts.values(), *map(_read, others)], lists)
    sources = {}
    for part, lines in parts.items():
        paths = [root / line.file for line in lines]
        require_files(
            paths,
            listed_in=lists / f"{name}_{part}.txt",
            advice=f"extract {name}.zip ({_HOME}) in {root}",
        )
        sources[part] = FileSource(paths, [line.label for line in lines])
    return Domain(name, classes, **sources)


def _list_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*_train.txt"), *folder.glob("*_test.txt")])


def _listed(folder: Path) -> list[str]:
    return [path.name for path in _list_files(folder)]


def _read(path: Path) -> list[_Line]:
    lines = []
    for number, text in enumerate(read_lines(path), 1):
        if not text.strip():
            continue
        file, _, label = text.rpartition(" ")
        if not label.isdecimal() or file.count("/") < 2:
            raise ValueError(
                f"{path}, line {number}: found {text!r}, expected "
                "'<domain>/<class>/<file> <label>'"
            )
        lines.append(_Line(file, int(label), f"{path.name}, line {number}"))
    if not lines:
        raise ValueError(f"{path}: found no line; get the file again")
    return lines


def _class_names(parts: Iterable[list[_Line]], where: Path) -> tuple[str, ...]:
    """Name the labels by the images' folders."""
    first: dict[int, tuple[str, str]] = {}
    for lines in parts:
        for line in lines:
            folder = line.file.split("/")[-2]
            known, place = first.setdefault(line.label, (folder, line.where))
            if known != folder:
                raise ValueError(
                    f"{where}: label {line.label} is {known!r} in {place} and "
                    f"{folder!r} in {line.where}; the list files do not belong together"
                )
    found = [first[label][0] for label in sorted(first)]
    if missing := sorted(set(range(len(found))) - set(first)):
        raise ValueError(
            f"{where}: no line has label {missing[0]}, and labels go up to "
            f"{max(first)}; is a list file cut off?"
        )
    for label, folder in enumerate(found):
        if folder in found[:label]:
            raise ValueError(
                f"{where}: {first[label][1]} gives {folder!r} label {label}, and "
                f"{first[found.index(folder)][1]} gives it {found.index(folder)}; the "
                "list files do not belong together"
            )
    return tuple(found)
