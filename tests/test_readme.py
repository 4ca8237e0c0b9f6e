"""The README's code runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    promised = re.search(r"print\(count.*?# (\{.*\})", blocks[0])
    assert promised and promised.group(1) in capsys.readouterr().out
    assert names["saved"].class_names == names["digits"].class_names
    assert int(names["state"].step) == 20


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert links
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing


def test_no_placeholder_is_left():
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README.read_text(), re.MULTILINE)
