"""The rules of a run directory: who may begin or continue a run in it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snlp_jax.config import Config, from_json, to_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME
from snlp_jax.io.files import remove_leftovers
from snlp_jax.io.metrics import FILE_NAME as METRICS_NAME
from snlp_jax.io.written import write_run_files

CORPUS_NAME = "corpus.txt"
"""The hash of a run's text."""
MAY_CHANGE = frozenset(
    {"run_dir", "data.source", "data.mixture", "data.num_workers", "data.cache_dir"}
    | {"machine.attention", "machine.decode_attention"}
    | {f"train.{name}" for name in ("log_every", "eval_every", "checkpoint_every", "keep_last", "sample_every")}
    | {f"train.{name}" for name in ("sample_tokens", "tensorboard", "eval_batches")}
    | {f"train.{name}" for name in ("wandb_project", "frontier_every", "profile_start", "profile_steps")}
)
MAY_CHANGE_SECTIONS = ("eval.", "mesh.")
"""Config fields and whole sections that a resumed run may change: they do not alter what it learns. Text may lie
elsewhere; whether it is the same its hash tells."""


def check_run_dir(path: str | Path, config: Config, resume: bool, corpus_hash: str = "") -> None:
    """Claim a run directory for this config, before anything else is written. One process of a run calls it.

    A new or empty one is created and gets ``config.json``; so does it with ``resume``, which then starts fresh. With
    ``resume`` a directory that holds a run is taken if every field of its config agrees, save ``MAY_CHANGE`` and
    ``MAY_CHANGE_SECTIONS``, and the config on disk becomes this one.

    Raises:
        InputError: the directory holds a run and ``resume`` is False, holds another config (names the first field that
            differs) or other text (a position in it would mean something else), or cannot be written.
    """
    path = Path(path)
    config_path = path / CONFIG_NAME
    if config_path.exists():
        if difference := _first_difference(config_path, config):
            raise InputError(f"run directory {str(path)!r} holds another run: {difference}; use another --run-dir.")
        if not resume:
            raise InputError(f"run directory {str(path)!r} holds a run; use --resume or another --run-dir.")
        saved_hash = path / CORPUS_NAME
        if saved_hash.exists() and saved_hash.read_text(errors="replace").strip() != corpus_hash:
            raise InputError(f"the corpus has changed since {str(path)!r} began; restore it or use another --run-dir.")
    else:
        left = [name for name in (METRICS_NAME, CHECKPOINT_NAME) if (path / name).exists()]
        if left:
            raise InputError(f"{str(path)!r} holds {left[0]} of a run without {CONFIG_NAME}; use another --run-dir.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        write_run_files(
            path, {CONFIG_NAME: to_json(config)} | ({CORPUS_NAME: f"{corpus_hash}\n"} if corpus_hash else {})
        )
    except OSError as error:
        raise InputError(f"run directory {str(path)!r} cannot be written ({error.strerror}).") from error


def _first_difference(config_path: Path, config: Config) -> str:
    """Of a field that may not change, in a sentence; "" where there is none."""
    try:
        saved = from_json(config_path.read_text(encoding="utf-8"))
    except InputError as error:
        raise InputError(f"{str(config_path)!r}: {error}") from error
    before, now = flatten(dataclasses.asdict(saved)), flatten(dataclasses.asdict(config))
    for name, value in now.items():
        if before[name] != value and name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_SECTIONS):
            return f"{name} is {before[name]!r} there and {value!r} here"
    return ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
