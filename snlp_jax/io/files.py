"""Files that are either whole or not there."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError, full_disk

_LEFTOVER_SECONDS = 60.0


def cache_folder() -> Path:
    """Where the package keeps what it would otherwise make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snlp_jax"


def may_be_made(path: Path) -> bool:
    """Whether a file or folder may be written at a place, or is there and may be written to."""
    path = path.absolute()
    above = next(place for place in (path, *path.parents) if place.exists())
    return os.access(above, os.W_OK) and (above.is_dir() or above == path)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part.

    Raises InputError when the disk is full; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # threads, and hosts, may write the same file
    data = content.encode() if isinstance(content, str) else content
    try:
        with explain_full_disk(path.parent), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Files by their names in ``folder``, which may lie in folders there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / name, content)


def read_json(path: Path) -> Any:
    """None where there is no such file, or none that reads."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove_leftovers(directory: str | Path) -> None:
    """Remove what killed calls of :func:`atomic_write` left here; those of running ones are younger than a minute."""
    for path in Path(directory).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


@contextmanager
def explain_full_disk(directory: str | Path) -> Iterator[None]:
    """Turn any exception that means "no space left", "quota exceeded" or "file too large" into an InputError naming the
    directory.
    """
    try:
        yield
    except Exception as error:
        remedy = full_disk(error)
        if not remedy or isinstance(error, InputError):
            raise
        raise InputError(f"{str(directory)!r} cannot be written to: {remedy}.") from error
