"""An experiment's results: a JSON file that is valid at every moment."""

import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ftn_jax.atomic import write_atomic
from ftn_jax.events import event, write_events
from ftn_jax.jobs import sync

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
        task_params: what the task adds without its head, in words of 32 bits: its
            parameters, or a 32nd of its mask's bits.
        shared_params: parameters of the backbone, without its head.
        steps: optimizer steps.
        seconds: wall-clock of the training that counted, compilation included; of the
            part after the last resume if it was interrupted.
        by_group: the task's parameters by optimizer group, head included.
        details: anything else, for example the rates chosen on validation data.
        inputs: digest of the backbone and of the task's examples.
        commit: of this library, with a + if it had changes; as it was for this row.
        device: that the row was measured on.
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
    inputs: str
    commit: str = field(default_factory=lambda: _commit())
    device: str = field(default_factory=lambda: describe_device())

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is the row of: there is one for each."""
        return self.method, self.task, self.seed


class Results:
    """The rows of one workdir, in `results.json`; every `add` reaches the disk.

    Several runs may share a workdir, each with rows of its own (other seeds, other
    domains): adding a row keeps what the others added. Of the processes of one job all
    call every method, and the first one writes. Events go to `log.jsonl` beside it.
    """

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
        self._head = _head(experiment, config)
        self._free = free
        self.rows: list[Row] = []
        sync(f"open {self.path}")  # all see the rows of before, or none does
        self._take_rows()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_events(self.path.with_name("log.jsonl"))
        known = {n: self._head[n] for n in ("experiment", "config", "commit")}
        event("start", **known)
        self._write()

    def find(self, method: str, task: str, seed: int, *, inputs: str) -> Row | None:
        """Return the finished row, if there is one.

        Raises:
            ValueError: if it was measured on another backbone or other data of that
                name.
        """
        for row in self.rows:
            if row.key == (method, task, seed):
                if row.inputs != inputs:
                    raise ValueError(
                        f"{self.path} holds {task} / {method} measured with another "
                        "backbone or other data of that name; choose another --workdir"
                    )
                return row
        return None

    def add(self, row: Row) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        self._write()
        event("row", method=row.method, task=row.task, seed=row.seed, value=row.value)

    def _take_rows(self) -> None:
        """Add the file's rows to ours; refuse those of another configuration."""
        if not self.path.exists():
            return
        old, rows = _read(self.path)
        there, now = old["config"], self._head["config"]
        differing = [
            f"{name}: there {there.get(name)!r}, now {now.get(name)!r}"
            for name in sorted({*there, *now} - {*self._free})
            if _differ(there, now, name)
        ]
        if old["experiment"] != self._head["experiment"]:
            differing.append(f"experiment: there {old['experiment']!r}")
        if differing:
            raise ValueError(
                f"{self.path} holds results of another configuration "
                f"({'; '.join(differing)}); choose another --workdir"
            )
        known = {row.key for row in self.rows}
        self.rows += [row for row in rows if row.key not in known]

    def _write(self) -> None:
        sync(f"rows of {self.path}")
        if jax.process_index() == 0:
            self._write_file()
        sync(f"wrote {self.path}")
        if jax.process_index() > 0:
            self.rows = _read(self.path)[1]

    def _write_file(self) -> None:
        from filelock import FileLock

        with FileLock(self.path.with_name(".results.lock")):
            self._take_rows()
            rows = [asdict(row) for row in self.rows]
            content = _numbers(self._head | {"rows": rows})
            text = json.dumps(content, indent=1, allow_nan=False)
            write_atomic(self.path, text.encode())


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> bool:
    """Compare a flag; one that the earlier release did not have was off."""
    if name not in old:
        return bool(new[name])
    return old[name] != new.get(name)


def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    try:
        old = json.loads(path.read_bytes())
        _ = old["experiment"], old["config"].items()
        rows = [_row(row) for row in old["rows"]]
        if len({row.key for row in rows}) < len(rows):
            raise ValueError("two rows of one method, task and seed")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no results file ({error!r}); move it away or choose another "
            "--workdir"
        ) from error
    return old, rows


def _row(entry: dict[str, Any]) -> Row:
    """Make a row of the file's; what says nothing of its origin is not ours."""
    known: dict[str, Any] = {"commit": "unknown", "device": "unknown", **entry}
    known["value"] = float(known["value"])
    return Row(**known)


def write_benchmark(
    cfg: Any,
    experiment: str,
    found: Mapping[str, Any],
    *,
    table: str,
    packages: tuple[str, ...] = ("jaxlib",),
) -> dict[str, Any]:
    """Write what a benchmark measured: `experiment.json`, `experiment.md`, the screen.

    Args:
        cfg: its settings, a dataclass that has a `workdir`, made if absent.
        experiment: its name.
        found: what was measured, in JSON values.
        table: the same in Markdown.
        packages: whose versions matter beside those that always do.

    Returns:
        What the JSON file holds: `found` after commit, versions, device and settings.
    """
    result = {**_head(experiment, asdict(cfg), packages), **found}
    cfg.workdir.mkdir(parents=True, exist_ok=True)
    path = cfg.workdir / f"{experiment}.json"
    write_atomic(path, json.dumps(result, indent=1).encode())
    write_atomic(path.with_suffix(".md"), table.encode())
    print(f"\n{table}\n{result['device']}; {path}")
    return result


def _head(
    experiment: str, config: Mapping[str, Any], packages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Say what was run, by which code, and where; what JSON lacks becomes text."""
    return {
        "experiment": experiment,
        "commit": _commit(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
        "device": describe_device(),
        "config": _numbers(json.loads(json.dumps(config, default=str))),
    }


def _numbers(content: Any) -> Any:
    """Put "nan" and "inf" where a number is: JSON has no other word for them."""
    if isinstance(content, dict):
        return {name: _numbers(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_numbers(value) for value in content]
    odd = isinstance(content, float) and not math.isfinite(content)
    return str(content) if odd else content


def describe_device() -> str:
    """Name the devices that JAX sees."""
    return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"


@cache
def _commit() -> str:
    """Name the commit that runs, with a + if the tree has changes."""

    def git(*args: str) -> str:
        here = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.check_output(
            [*here, *args], text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # installed from a wheel, or no git
