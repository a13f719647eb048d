"""The rules of a run directory: who may begin or continue a run in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snlp_jax.config import Config, to_json, upgraded
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME
from snlp_jax.io.files import atomic_write, remove_leftovers
from snlp_jax.io.metrics import FILE_NAME as METRICS_NAME

MAY_CHANGE = frozenset(
    {"run_dir", "data.num_workers", "data.cache_dir", "machine.attention", "machine.decode_attention"}
    | {f"train.{name}" for name in ("log_every", "eval_every", "checkpoint_every", "keep_last", "sample_every")}
    | {f"train.{name}" for name in ("sample_tokens", "tensorboard", "eval_batches")}
    | {f"train.{name}" for name in ("wandb_project", "frontier_every", "profile_start", "profile_steps")}
)
MAY_CHANGE_SECTIONS = ("eval.", "mesh.")
"""Config fields and whole sections that a resumed run may change: they do not alter what it learns."""


def check_run_dir(path: str | Path, config_json: str, resume: bool) -> None:
    """Claim a run directory for this config, before anything else is written. One process of a run calls it.

    A new or empty one is created and gets ``config.json``; so does it with ``resume``, which then starts fresh. With
    ``resume`` a directory that holds a run is taken if every field of its config agrees, save ``MAY_CHANGE`` and
    ``MAY_CHANGE_SECTIONS``, and the config on disk becomes this one. Raises InputError when the directory holds a
    run and ``resume`` is False, holds another config (naming the first field that differs), or cannot be written.
    """
    path = Path(path)
    config_path = path / CONFIG_NAME
    if config_path.exists():
        difference = _first_difference(config_path, json.loads(config_json))
        if difference is not None:
            raise InputError(f"run directory {str(path)!r} holds another run: {difference}; use another --run-dir.")
        if not resume:
            raise InputError(f"run directory {str(path)!r} holds a run; use --resume or another --run-dir.")
    else:
        left = [name for name in (METRICS_NAME, CHECKPOINT_NAME) if (path / name).exists()]
        if left:
            raise InputError(f"{str(path)!r} holds {left[0]} of a run without {CONFIG_NAME}; use another --run-dir.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        atomic_write(config_path, config_json)
    except OSError as error:
        raise InputError(
            f"run directory {str(path)!r} cannot be written ({error.strerror}); choose another."
        ) from error


def _first_difference(config_path: Path, config: Mapping[str, Any]) -> str | None:
    try:
        saved = flatten(upgraded(json.loads(config_path.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{str(config_path)!r} is not a saved config; use another --run-dir.") from error
    asked, defaults = flatten(config), flatten(json.loads(to_json(Config())))
    for name in [*asked, *saved]:
        if name in MAY_CHANGE or name.startswith(MAY_CHANGE_SECTIONS):
            continue
        # A field that came after the run was at its default then.
        before, now = saved.get(name, defaults.get(name, "nothing")), asked.get(name, "nothing")
        if before != now:
            return f"{name} is {before!r} there and {now!r} here"
    return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
