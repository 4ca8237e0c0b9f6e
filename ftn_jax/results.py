"""An experiment's results: a JSON file that is valid at every moment."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ftn_jax.atomic import write_atomic

PACKAGES = ("ftn-jax", "jax", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Row:
    """One number: a method on a task with a seed.

    Attributes:
        method: as it is called in the table.
        task: name of the domain.
        seed: of the run.
        metric: what was measured, on the test set unless it says otherwise.
        value: the number; accuracies are shares between 0 and 1.
        task_params: parameters that the task adds, without its head.
        shared_params: parameters of the backbone, without its head.
        steps: optimizer steps.
        seconds: of training.
        by_group: the task's parameters by optimizer group, head included.
        details: anything else, for example the rates chosen on validation data.
    """

    method: str
    task: str
    seed: int
    metric: str
    value: float
    task_params: int
    shared_params: int
    steps: int
    seconds: float
    by_group: dict[str, int]
    details: dict[str, Any]


class Results:
    """The rows of one workdir, in `results.json`; every `add` reaches the disk."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        experiment: str,
        config: Mapping[str, Any],
        free: tuple[str, ...] = (),
    ) -> None:
        """Open the workdir; rows that are there stay.

        Args:
            workdir: the experiment's folder, made if absent.
            experiment: its name.
            config: what was asked for; what JSON lacks (paths) becomes text.
            free: names in `config` that choose rows (which methods, which seeds) and
                so may differ from the run before.

        Raises:
            ValueError: if the workdir holds results of another experiment or of
                another configuration (names what differs), or is damaged.
            OSError: if it cannot be written.
        """
        self.path = Path(workdir) / "results.json"
        config = json.loads(json.dumps(config, default=str))
        self._head = {
            "experiment": experiment,
            "commit": _commit(),
            "versions": {name: version(name) for name in PACKAGES},
            "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
            "config": config,
        }
        self.rows: list[Row] = []
        if self.path.exists():
            old = _read(self.path)
            differing = [
                f"{name}: there {old['config'].get(name)!r}, now {config.get(name)!r}"
                for name in sorted({*old["config"], *config} - {*free})
                if old["config"].get(name) != config.get(name)
            ]
            if old["experiment"] != experiment:
                differing.append(f"experiment: there {old['experiment']!r}")
            if differing:
                raise ValueError(
                    f"{self.path} holds results of another configuration "
                    f"({'; '.join(differing)}); choose another --workdir"
                )
            self.rows = [Row(**row) for row in old["rows"]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def find(self, method: str, task: str, seed: int) -> Row | None:
        """Return the finished row, if there is one."""
        for row in self.rows:
            if (row.method, row.task, row.seed) == (method, task, seed):
                return row
        return None

    def add(self, row: Row) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        content = self._head | {"rows": [asdict(row) for row in self.rows]}
        write_atomic(self.path, json.dumps(content, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_bytes())
        _ = old["experiment"], old["config"], [Row(**row) for row in old["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no results file ({error!r}); move it away or choose another "
            "--workdir"
        ) from error
    return old


def _commit() -> str:
    """Name the commit that runs, with a + if the tree has changes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(
            git, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # installed from a wheel, or no git
