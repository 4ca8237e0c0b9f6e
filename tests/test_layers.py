"""Arrows point down: who may import whom, and what `import ftn_jax` costs."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ftn_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ftn_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"tensorflow", "torch", "matplotlib", "sklearn", "PIL", "flax", "orbax"}
# Rooms that know nothing of deltas, and what of ours they may import instead.
BELOW = {
    "paths": (),
    "node": (),
    "core": ("node", "paths"),
    "nodes": ("node", "nodes", "paths"),
    "models": ("models",),
    "data": ("data",),
    "pretrained": ("pretrained", "models"),
    "metrics": (),
    "apply": ("paths",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`ftn_jax.nodes.cp` is in the room `nodes`; the package itself in ``."""
    return f"{module}..".split(".")[1]


MODULES = {module_name(path) for path in FILES}


def imports(source: str, package: str, *, lazy: bool = True) -> set[str]:
    """Every module that a file imports; without `lazy`, only when it is loaded."""
    tree = ast.parse(source)
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    found = set()
    for node in ast.walk(tree):
        if node in inside and not lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*up, node.module] if node.module else up)
            # `from ftn_jax import metrics` names a module or something inside one.
            names = {f"{base}.{a.name}" for a in node.names}
            found |= {n if n in MODULES else base for n in names}
    return found


def of_file(path: Path, *, lazy: bool = True) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports(path.read_text(), package, lazy=lazy)


def ours(path: Path, *, lazy: bool = True) -> set[str]:
    return of_file(path, lazy=lazy) & MODULES - {module_name(path)}


def test_the_reader_of_imports_sees_every_form():
    source = """
import a.b, c as d
from ftn_jax import metrics, Node
from . import cp
from ..core import thing
def f():
    from lazy import x
class K:
    import inner
"""
    eager = imports(source, "ftn_jax.nodes", lazy=False)
    ours = {"ftn_jax", "ftn_jax.metrics", "ftn_jax.nodes.cp", "ftn_jax.core"}
    assert eager == {"a.b", "c", "inner", *ours}
    assert imports(source, "ftn_jax.nodes") == {*eager, "lazy"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_import_only_what_lies_below(path):
    room = room_of(module_name(path))
    if room in BELOW:
        above = {m for m in ours(path) if room_of(m) not in BELOW[room]}
        assert not above, f"{path} may import {BELOW[room]} of ours, not {above}"
    tops = {m.split(".")[0] for m in of_file(path)}
    assert not tops & {"experiments", "tests"}, f"{path} imports what lies above it"


def test_core_imports_jax_alone():
    found = {m.split(".")[0] for m in of_file(PACKAGE / "core.py")}
    assert found - set(sys.stdlib_module_names) == {"jax", "jaxtyping", "ftn_jax"}


def test_nodes_stay_small_in_what_they_need():
    allowed = {"jax", "jaxtyping", "einops", "numpy", "ftn_jax"}
    for path in (PACKAGE / "nodes").glob("*.py"):
        found = {m.split(".")[0] for m in of_file(path)}
        assert found - set(sys.stdlib_module_names) <= allowed, path


def test_no_module_imports_itself_through_others():
    graph = {module_name(p): ours(p, lazy=False) for p in FILES}
    graph.pop("ftn_jax")
    assert "ftn_jax.node" in graph["ftn_jax.nodes.cp"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_named_for_what_they_do(path):
    assert path.stem not in {"utils", "util", "common", "base", "helper", "helpers"}
    assert path.parent.name not in {"utils", "common", "helpers"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    """Only networks and their weights are written in Flax; the rest loads it late."""
    flax = {"flax"} if room_of(module_name(path)) in ("models", "pretrained") else set()
    found = {m.split(".")[0] for m in of_file(path, lazy=False)}
    assert not found & (HEAVY - flax), path


def test_import_is_light_and_quick():
    code = f"""
import sys, time
times = [time.process_time()]  # of this process: the machine may be busy
import jax
times.append(time.process_time())
import ftn_jax
times.append(time.process_time())
share = (times[2] - times[1]) / (times[1] - times[0])
print(share, *sorted({HEAVY!r} & {{*sys.modules}}))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(5)
    ]
    assert {tuple(loaded) for _, *loaded in runs} == {()}
    assert min(float(share) for share, *_ in runs) < 0.6  # of what JAX takes


def test_every_public_name_is_there():
    assert all(getattr(ftn_jax, name) is not None for name in ftn_jax.__all__)
    assert callable(ftn_jax.recompress) and not hasattr(ftn_jax, "nonsense")
