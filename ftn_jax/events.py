"""Structured logs: what happens, one line of JSON each, through Python's logging.

The library tells the logger `ftn_jax.events`; a program decides where that goes. An
experiment's workdir gets `log.jsonl`.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_LOGGER = logging.getLogger("ftn_jax.events")


def event(name: str, **values: Any) -> None:
    """Tell the log that something happened, with JSON values."""
    _LOGGER.info(name, extra={"values": values})


class JsonLines(logging.Handler):
    """Append events to a file, one JSON object a line.

    Each holds `time` (seconds since 1970), `event`, `process` (of a job of several) and
    the event's own values. A line is one write, so that processes may share a file; a
    crash can cut the last one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(logging.INFO)
        self.path = Path(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one event; a full disk costs the line, not the run."""
        values = getattr(record, "values", {})
        line = {
            "time": round(time.time(), 3),
            "event": record.getMessage(),
            "process": jax.process_index(),
            **values,
        }
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(json.dumps(line, default=str).encode() + b"\n")
        except OSError:
            self.handleError(record)


def write_events(path: str | os.PathLike[str]) -> None:
    """Send events to this file from now on, and to no other file.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a crash cut the last line
                file.write(b"\n")
    for old in [h for h in _LOGGER.handlers if isinstance(h, JsonLines)]:
        _LOGGER.removeHandler(old)
    _LOGGER.addHandler(JsonLines(path))
    _LOGGER.setLevel(logging.INFO)
    # Libraries give the root logger a handler: the terminal would get every step.
    _LOGGER.propagate = False


def read_events(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read a log back; a line that a crash cut short is left out."""
    for line in Path(path).read_bytes().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
