"""What commands that make a run of something else share: a free place, and a run written as training leaves one."""

from collections.abc import Mapping
from pathlib import Path

from snlp_jax.config import Config, to_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME, Checkpointer
from snlp_jax.io.files import explain_full_disk, may_be_made
from snlp_jax.io.written import write_run_files
from snlp_jax.types import Params


def check_free(target: Path, flag: str = "") -> None:
    """Refuse a place that holds something already, or that nothing can be written to. Raises InputError."""
    above = next(place for place in target.absolute().parents if place.exists())
    if not above.is_dir():
        raise InputError(f"{str(target)!r} cannot be made: {str(above)!r} is a file; name another directory{flag}.")
    if not may_be_made(target):
        place = target if target.exists() else above
        raise InputError(f"{str(place)!r} may not be written to; name another directory{flag}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists and is not empty; name another directory{flag}.")


def write_run(
    target: Path,
    config: Config,
    params: Params,
    files: Mapping[str, str | bytes],
    metrics: Mapping[str, float],
    concurrent_gb: int | None = None,
) -> None:
    """A run directory at step 0. Its config comes last: a directory with it is a run."""
    text = to_json(config)
    with explain_full_disk(target):
        write_run_files(target, files)
        with Checkpointer(target / CHECKPOINT_NAME, config_json=text, concurrent_gb=concurrent_gb) as checkpoints:
            checkpoints.save(0, {"params": params}, None, metrics)
        write_run_files(target, {CONFIG_NAME: text})
