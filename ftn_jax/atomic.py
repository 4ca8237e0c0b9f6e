"""Write files that are never seen half-written."""

import os
import secrets
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step; a crash leaves the old one or the new.

    Raises:
        OSError: if it cannot be written; the old file is untouched.
    """
    # A name of its own: another process may write the same file.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable too, where folders can be synchronised."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
