"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is one orbax step directory with three items: ``params``, ``state`` (everything else: optimizer, step) and
``meta`` (config, metrics, where the input stood and a checksum of every array). Nothing in it depends on the devices
and processes that wrote it. Orbax writes into a temporary directory and renames it, so a killed save leaves nothing
that looks like a checkpoint.
"""

import json
import logging
import math
import shutil
import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from snlp_jax.errors import InputError
from snlp_jax.io.checksum import described, with_checksums
from snlp_jax.io.files import explain_full_disk
from snlp_jax.io.metrics import to_json_value
from snlp_jax.parallel.processes import all_or_none, tells_of_lost_peer

logger = logging.getLogger(__name__)
T = TypeVar("T")

Tree = Any
"""Pytree of arrays; optax's NamedTuples and masked nodes come back as they were."""

CONFIG_NAME = "config.json"
CHECKPOINT_NAME = "checkpoints"


class Checkpointer:
    """The checkpoints of one run: the newest ``keep_last`` and the one of the lowest finite ``val_loss``.

    Saving is synchronous: when ``save`` returns the buffers may be donated. Several processes call every method
    together, on a directory they all see, and each checks the part of an array that it holds.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 1,
        *,
        config_json: str = "{}",
        read_only: bool = False,
        concurrent_gb: int | None = None,
    ) -> None:
        """Open a directory of checkpoints, created if missing, and remove what a killed save left in it.

        ``config_json`` is stored with every checkpoint. With ``read_only`` nothing in the directory is touched, so
        that a running training may be evaluated; it must exist then (InputError). ``concurrent_gb`` bounds the copies
        of parameters that are being written at once; no array may be larger.
        """
        self._directory = Path(directory).absolute()
        self._read_only = read_only
        self._config = json.loads(config_json)
        self._val_losses: dict[int, float] = {}
        if read_only and not self._directory.is_dir():
            raise InputError(f"there is no checkpoint directory {str(self._directory)!r}; train first.")
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=False,
            lightweight_initialize=True,
            preservation_policy=_LatestAndBest(keep_last, self._val_losses),
        )
        with explain_full_disk(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory, handler_registry=_registry(concurrent_gb), options=options
            )
        for step in self.steps():
            with suppress(Exception):  # what is unreadable restore will tell of
                self._remember_val_loss(step, self.metadata(step)["metrics"])

    # -- What there is -------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; whether each is good only reading it tells."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """Step of the lowest finite ``val_loss``, the later one of equals; None if no checkpoint has one."""
        return _best(self.steps(), self._val_losses)

    def metadata(self, step: int) -> dict[str, Any]:
        """The ``config``, ``metrics`` and ``data`` of a checkpoint, and ``leaves``: path -> [dtype, shape, checksum].

        Raises whatever a missing or broken file gives.
        """
        meta = ocp.JsonCheckpointHandler().restore(self._directory / str(step) / "meta")
        if meta.pop("crc32") != _text_crc(meta):
            raise ValueError("the checksum of its metadata is wrong")
        return meta

    # -- Writing -------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Tree], data_iterator: Any, metrics: Mapping[str, float]) -> None:
        """Save ``state``, a dict of pytrees with a key "params", and where ``data_iterator`` (grain's, or None) stands.

        Its state, a JSON value, must be the same on all processes: the first one's is written.

        A checkpoint whose ``metrics`` lack a finite ``val_loss`` is never the best. A step that is saved already stays
        as it is. Raises InputError when the disk is full; earlier checkpoints are untouched then.
        """
        if self._read_only:
            raise ValueError("this Checkpointer was opened to read only.")
        if step in self.steps():
            return
        meta = {
            "config": self._config,
            "metrics": {name: to_json_value(value) for name, value in metrics.items()},
            "data": None if data_iterator is None else data_iterator.get_state(),
            "leaves": with_checksums(state),
        }
        items = {
            "meta": ocp.args.JsonSave({**meta, "crc32": _text_crc(meta)}),
            **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()},
        }
        self._remember_val_loss(step, meta["metrics"])
        with explain_full_disk(self._directory):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _remember_val_loss(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._val_losses.pop(step, None)
        val_loss = float(metrics.get("val_loss", "nan"))
        if math.isfinite(val_loss):
            self._val_losses[step] = val_loss

    # -- Reading -------------------------------------------------------------------------------------------------------

    def restore(self, abstract_state: Mapping[str, Tree], data_iterator: Any) -> tuple[int, dict[str, Tree]] | None:
        """The newest good checkpoint as ``(step, state)``, or None when there is none at all.

        ``abstract_state`` is a tree like the saved one of arrays or ``jax.ShapeDtypeStruct``; each leaf comes back on
        the sharding it carries (the first device if it carries none), whatever it was saved from, bit for bit.
        ``data_iterator``, unless it is None, is moved to where the checkpoint's stood.

        A checkpoint that is incomplete, unreadable or fails its checksums is skipped with one warning, and once a good
        one is found, set aside as ``STEP.corrupt`` so that training may save that step again. Raises InputError when
        none is good, or when a good one holds other arrays than ``abstract_state`` asks for.
        """

        def read(step: int) -> dict[str, Tree]:
            state = self._read(step, abstract_state)
            if data_iterator is not None:
                data_iterator.set_state(self.metadata(step)["data"])
            return state

        return self._newest_good(self.steps(), read)

    def restore_params(self, abstract_params: Tree, which: int | Literal["best", "last"] = "last") -> tuple[int, Tree]:
        """The parameters alone, as ``(step, params)``, checked and placed as in ``restore``.

        "last" is the newest good checkpoint (others are skipped with a warning). Raises InputError when there is no
        such checkpoint, no good one, or it holds other parameters.
        """
        steps = self.steps()
        if which != "last":
            step = self.best_step if which == "best" else which
            if step is None:
                raise InputError(f"no checkpoint in {str(self._directory)!r} has a val_loss; ask for 'last' or a step.")
            if step not in steps:
                raise InputError(f"{str(self._directory)!r} holds no checkpoint {step}, only {steps}.")
            steps = [step]
        found = self._newest_good(steps, lambda step: self._read(step, {"params": abstract_params})["params"])
        if found is None:
            raise InputError(f"{str(self._directory)!r} holds no checkpoint; train first.")
        return found

    def _newest_good(self, steps: list[int], read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest of the steps that ``read`` can read, and what it gave; bad newer ones are told of and set aside.
        What is no fault of the checkpoint's passes."""
        reasons: dict[int, str] = {}
        for step in reversed(steps):
            try:
                value = read(step)
            except InputError:
                raise
            except Exception as error:
                if jax.process_count() > 1 and tells_of_lost_peer(error):
                    raise
                reasons[step] = textwrap.shorten(f"{type(error).__name__}: {error}", 160).rstrip(".")
                logger.warning("skipping checkpoint %d in %s: %s.", step, self._directory, reasons[step])
            else:
                self._set_aside(reasons)
                return step, value
        if reasons:
            text = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
            raise InputError(f"{str(self._directory)!r} holds no good checkpoint ({text}); delete it or take another.")
        return None

    def _read(self, step: int, abstract_state: Mapping[str, Tree]) -> dict[str, Tree]:
        """One checkpoint's arrays, verified. Raises InputError if the template differs, anything else if it is bad."""
        abstract_state = jax.tree.map(_placed, dict(abstract_state))
        with all_or_none(Exception):
            meta = self.metadata(step)
            if "data" not in meta:
                raise ValueError("an older version of snlp_jax wrote it")
            _check_template(step, abstract_state, meta["leaves"])
            # Not by the manager, whose barrier a process that cannot read would leave the others waiting at.
            read = {
                name: ocp.StandardCheckpointHandler().restore(
                    self._directory / str(step) / name, args=ocp.args.StandardRestore(template)
                )
                for name, template in _items(abstract_state).items()
            }
        state = {"params": read["params"], **read.get("state", {})}
        for path, (_, _, checksum) in with_checksums(state).items():
            if checksum != meta["leaves"][path][2]:
                raise ValueError(f"the checksum of {path} is wrong")
        return state

    def _set_aside(self, bad_steps: Iterable[int]) -> None:
        if self._read_only or not bad_steps:
            return
        if jax.process_index() == 0:
            for step in bad_steps:
                aside = self._directory / f"{step}.corrupt"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("snlp_jax:checkpoints_set_aside")
        for step in bad_steps:
            self._val_losses.pop(step, None)
        self._manager.reload()

    # -- Ending --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


class _LatestAndBest(NamedTuple):
    """Orbax preservation policy: keep the newest ``keep_last`` and the best of all."""

    keep_last: int
    val_losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self.keep_last :], _best(steps, self.val_losses)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _registry(concurrent_gb: int | None) -> Any:
    """Handlers of a checkpoint that is parameters alone, of which so much is written at once; None: orbax's own."""
    if concurrent_gb is None:
        return None
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("params", ocp.args.StandardSave, ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gb))
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


def _best(steps: Sequence[int], val_losses: Mapping[int, float]) -> int | None:
    known = [step for step in steps if step in val_losses]
    return min(known, key=lambda step: (val_losses[step], -step), default=None)


def _items(state: Mapping[str, Tree]) -> dict[str, Tree]:
    """The parts of a checkpoint's state that orbax writes as items of their own."""
    rest = {name: tree for name, tree in state.items() if name != "params"}
    return {"params": state["params"], **({"state": rest} if rest else {})}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The template of one leaf, with the sharding it shall be restored to."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding)


def _text_crc(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _check_template(step: int, abstract_state: Mapping[str, Tree], leaves: Mapping[str, Sequence[Any]]) -> None:
    """Raise InputError naming the first array that is asked for and not saved, the other way round, or different."""
    text = lambda leaf: "nothing" if leaf is None else f"{leaf[0]}{leaf[1]}"  # noqa: E731
    asked = described(abstract_state)
    saved = {path: leaf[:2] for path, leaf in leaves.items() if path.split("/")[0] in abstract_state}
    for path in [*asked, *saved]:
        if asked.get(path) != saved.get(path):
            raise InputError(
                f"checkpoint {step} holds {text(saved.get(path))} at {path} where this config has "
                f"{text(asked.get(path))}; use the config it was trained with."
            )
