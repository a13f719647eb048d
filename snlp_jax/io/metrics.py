"""Metrics of a run: one JSON object a line, in ``metrics.jsonl``, and what else was asked for: TensorBoard, wandb."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write, explain_full_disk
from snlp_jax.io.optional import optional

FILE_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id.txt"
"""Which wandb run a resumed training continues."""


def to_json_value(value: Any) -> float | str:
    """A number as JSON holds it: JSON has no NaN or infinity, so those become "nan", "inf" and "-inf"."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``, oldest first, "nan" and "inf" as floats again.

    A last line that a killed process left unfinished is dropped. Raises InputError when the file does not exist or an
    earlier line is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"metrics file {str(path)!r} does not exist.")
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({"step": int(record.pop("step")), **{name: float(record[name]) for name in record}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise InputError(
                    f"line {number} of {str(path)!r} is not a metrics record; mend or remove it."
                ) from error
    return records


Sink = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], object]]
"""What writes a record, by its step and its numbers, and what closes it."""


class MetricsWriter:
    """Hands each record to ``metrics.jsonl`` and to every other sink. One process of a run has them; the others have a
    writer that writes nothing.

    When ``write`` returns the operating system has the whole line: killing the process loses nothing. It is not forced
    to the disk (fsync), so that a machine that loses power may lose the last lines.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        last_step: int | None = None,
        tensorboard: bool = False,
        wandb_project: str = "",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log of ``run_dir``, which is created if missing; None is a writer that writes nothing.

        Args:
            last_step: the records of later steps are dropped, and a torn last line: what a resumed run will write
                again. TensorBoard hides them; wandb, which cannot, shows both. None keeps all.
            name, config: of the run, which wandb shows.

        Raises:
            InputError: what was asked for is not installed or cannot start, or a line is not a record.
        """
        self._path = None if run_dir is None else Path(run_dir) / FILE_NAME
        self._sinks: list[Sink] = []
        if self._path is None:
            return
        directory = self._path.parent
        directory.mkdir(parents=True, exist_ok=True)
        if last_step is not None and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= last_step]
            atomic_write(self._path, "".join(_line(int(record.pop("step")), record) for record in kept))
        if tensorboard:
            self._sinks.append(_tensorboard(directory, last_step))
        if wandb_project:
            self._sinks.append(_wandb(directory, wandb_project, name, config))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one record. Values are Python, numpy or jax scalars. Raises InputError on a full disk."""
        if self._path is None:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        with explain_full_disk(self._path.parent):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(step, numbers))
            for write, _ in self._sinks:
                write(step, numbers)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for _, close in self._sinks:
            close()


def _line(step: int, metrics: Mapping[str, float]) -> str:
    return json.dumps({"step": step, **{name: to_json_value(value) for name, value in metrics.items()}}) + "\n"


def _tensorboard(directory: Path, last_step: int | None) -> Sink:
    """Event files, not by tensorboardX's SummaryWriter: a full disk ends its thread, and nobody empties the queue."""
    summary = optional("tensorboardX", "train.tensorboard", "snlp-jax[tensorboard]").summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with explain_full_disk(directory):
        events = EventsWriter(str(directory / "events"))
        if last_step is not None:  # TensorBoard hides what earlier files hold of later steps
            events.write_event(Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            events.write_event(Event(step=step, wall_time=time.time(), summary=summary.scalar(name, value)))
        events.flush()

    def close() -> None:
        with contextlib.suppress(OSError):  # of a full disk ``write`` has told
            events.close()

    return write, close


def _wandb(directory: Path, project: str, name: str | None, config: Mapping[str, Any] | None) -> Sink:
    """Weights & Biases. A resumed training continues its run."""
    wandb = optional("wandb", "train.wandb_project", "snlp-jax[wandb]")
    id_path = directory / WANDB_ID_NAME
    run_id = id_path.read_text().strip() if id_path.is_file() else None
    try:
        run = wandb.init(project=project, name=name, config=config, dir=str(directory), resume="allow", id=run_id)
    except Exception as error:  # its errors share no class with those of the network
        raise InputError(
            f"wandb did not start ({error}); run `wandb login`, set WANDB_MODE=offline, or leave train.wandb_project "
            "empty."
        ) from error
    atomic_write(id_path, f"{run.id}\n")
    run.define_metric("*", step_metric="step")  # its own step counter must not go back
    return lambda step, metrics: run.log({"step": step, **metrics}), run.finish
