"""Calibrations beside a checkpoint: ``RUN_DIR/calibrations/NAME.npz``, with what they were fitted to inside."""

import dataclasses
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.solver import Calibration, Chunkwise, ParallelSegment

PyTree = Any
FOLDER = "calibrations"
_ABOUT, _ARRAYS = "about", "arrays"


@dataclass(frozen=True)
class About:
    """What a calibration was fitted to. ``stage`` is the text of the region's stage, "" for one node a layer."""

    kind: str
    start: int
    stop: int
    num_iters: int
    num_tokens: int
    seed: int
    fingerprint: str
    stage: str = ""
    init: str = ""
    tune_steps: int = 0


def fingerprint(params: PyTree) -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of all leaves, in the order of the tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_calibration(run_dir: Path, name: str, calibration: Calibration, about: About) -> Path:
    """Write ``RUN_DIR/calibrations/NAME.npz`` whole or not at all, over an older one of that name."""
    path = _path(run_dir, name)
    arrays = {f"layers/{key}": np.asarray(leaf) for key, leaf in calibration.layers.items()}
    arrays |= {f"common/{key}": np.asarray(leaf) for key, leaf in calibration.common.items()}
    record = dataclasses.asdict(about) | {_ARRAYS: sorted(arrays)}
    arrays[_ABOUT] = np.asarray(json.dumps(record, sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return path


def stored_calibrations(run_dir: Path, fingerprint: str) -> dict[str, About]:
    """Name -> what it was fitted to, of the calibrations in a run's folder that belong to these parameters."""
    found = {}
    for path in sorted((Path(run_dir) / FOLDER).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                about, _ = _read_about(file[_ABOUT])
        except Exception:  # a foreign or broken archive fails in many ways; nobody asked for it by name
            continue
        if about.fingerprint == fingerprint:
            found[path.stem] = about
    return found


def load_calibration(run_dir: Path, region: ParallelSegment, fingerprint: str) -> Calibration:
    """The calibration that a region names, for parameters of that :func:`fingerprint`.

    Raises:
        InputError: no such file or not a calibration, or one of other parameters or of another region.
    """
    name = region.fit
    path = _path(run_dir, name)
    if not path.is_file():
        raise InputError(f"there is no calibration {name!r} in {str(path.parent)!r}; fit it first.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about, names = _read_about(arrays.pop(_ABOUT))
        if names is not None and names != sorted(arrays):
            raise ValueError("arrays are missing")
        if not all(np.issubdtype(leaf.dtype, np.number) for leaf in arrays.values()):
            raise ValueError("arrays that hold no numbers")
    except Exception as error:  # a foreign or broken archive fails in many ways
        raise InputError(f"{str(path)!r} is no calibration file; fit {name!r} again.") from error
    if about.fingerprint != fingerprint:
        raise InputError(f"calibration {name!r} was fitted to another checkpoint; fit it again.")
    for what, fitted, wanted in (
        ("layers", f"{about.start}-{about.stop}", f"{region.start}-{region.stop}"),
        ("stage", about.stage or "per layer", stage_text(region) or "per layer"),
    ):
        if fitted != wanted:
            raise InputError(
                f"calibration {name!r} was fitted to {what} {fitted}, but the region has {wanted}; fit one to it."
            )
    part = lambda prefix: {  # noqa: E731
        key.removeprefix(prefix): jnp.asarray(leaf) for key, leaf in arrays.items() if key.startswith(prefix)
    }
    return Calibration(part("layers/"), part("common/"))


def _read_about(saved: np.ndarray) -> tuple[About, list[str] | None]:
    """What the calibration was fitted to, and the names of its arrays, which older files do not tell."""
    record = json.loads(str(saved))
    names = record.pop(_ARRAYS, None)
    return About(**record), names


def stage_text(region: ParallelSegment) -> str:
    """The stage as it stands in a calibration file: "" for one node a layer."""
    if not isinstance(region.stage, Chunkwise):
        return ""
    chunks = f"{region.num_nodes}xF{region.layers_per_node}"
    return f"{chunks},scales={region.stage.scales},branches={region.stage.branches}"


def check_name(name: str) -> None:
    """Refuse a name that would not be a file's. Raises InputError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"calibration name {name!r} must be letters, digits, '_', '-' and '.'; choose another.")


def _path(run_dir: Path, name: str) -> Path:
    check_name(name)
    return Path(run_dir) / FOLDER / f"{name}.npz"
