"""Files that a run keeps, with checksums: one that has changed since is told of, since another tokenizer or another
config gives other numbers without a fault. Who changed it on purpose may pass over the notice."""

import functools
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

from snlp_jax.io.files import atomic_write, read_json, write_files

SUMS_NAME = "checksums.json"

logger = logging.getLogger(__name__)


def write_run_files(run_dir: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files by their names in a run's directory, and note their checksums."""
    write_files(run_dir, files)
    sums = _sums_of(run_dir)
    sums |= {name: _sum(text.encode() if isinstance(text, str) else text) for name, text in files.items()}
    atomic_write(run_dir / SUMS_NAME, json.dumps(sums, indent=1) + "\n")


def tell_of_changes(run_dir: Path, name: str, content: bytes) -> None:
    """Warn, once, where a file of a run is not what was written; older runs have no checksums."""
    if _sums_of(run_dir).get(name, _sum(content)) != _sum(content):
        _warn(run_dir / name)


@functools.cache
def _warn(path: Path) -> None:
    logger.warning("note: %s is not what was written with its run; restore it, unless it was changed on purpose.", path)


def _sums_of(run_dir: Path) -> dict[str, str]:
    sums = read_json(run_dir / SUMS_NAME)
    return sums if isinstance(sums, dict) else {}


def _sum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
