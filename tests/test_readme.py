"""The documents' code runs as it stands."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(blocks(README)) == 2
    names: dict = {}
    for block in blocks(README):
        exec(compile(block, "README.md", "exec"), names)
    promised = re.search(r"print\(count.*?# (\{.*\})", blocks(README)[0])
    assert promised and promised.group(1) in capsys.readouterr().out
    assert names["saved"].class_names == names["digits"].class_names
    assert int(names["state"].step) == 20


# plug_in.md has a test file of its own.
@pytest.mark.parametrize(
    "path", [p for p in DOCS if p.stem != "plug_in"], ids=lambda path: path.stem
)
def test_blocks_of_the_docs_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": path.stem}
    for block in blocks(path):
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    assert links or path != README
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.stem)
def test_no_placeholder_is_left(path):
    assert not re.findall(r"^[A-Z]{4,}(_[A-Z_]+)?$", path.read_text(), re.MULTILINE)
