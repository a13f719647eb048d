"""Metrics of a run: one JSON object a line, in ``metrics.jsonl``, and what else was asked for: TensorBoard, wandb."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write, explain_full_disk

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


class MetricsWriter:
    """Hands each record to every sink. One process of a run has them; the others have a writer without any."""

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        tensorboard: bool = False,
        wandb_project: str = "",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log of ``run_dir``, which is created if missing; None is a writer that writes nothing.

        Args:
            name, config: of the run, which wandb shows.

        Raises:
            InputError: what was asked for is not installed or cannot start.
        """
        self._sinks: list[JsonLines | TensorBoard | Wandb] = []
        if run_dir is None:
            return
        self._directory = Path(run_dir)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sinks.append(JsonLines(self._directory))
        if tensorboard:
            self._sinks.append(TensorBoard(self._directory))
        if wandb_project:
            self._sinks.append(Wandb(self._directory, wandb_project, name, config))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one record. Values are Python, numpy or jax scalars. Raises InputError on a full disk."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for sink in self._sinks:
            with explain_full_disk(self._directory):
                sink.write(int(step), numbers)

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps beyond ``step``, and a torn last line: what a resumed run will write again. Each
        sink forgets as much as it can.

        Raises InputError when an earlier line is not a record.
        """
        for sink in self._sinks:
            sink.truncate_after(step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """``metrics.jsonl``. When ``write`` returns the operating system has the whole line: killing the process loses
    nothing. It is not forced to the disk (fsync), so that a machine that loses power may lose the last lines."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(step, metrics))

    def truncate_after(self, step: int) -> None:
        if self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= step]
            atomic_write(self._path, "".join(_line(int(record.pop("step")), record) for record in kept))

    def close(self) -> None:
        """Nothing is open between records."""


def _line(step: int, metrics: Mapping[str, float]) -> str:
    return json.dumps({"step": step, **{name: to_json_value(value) for name, value in metrics.items()}}) + "\n"


class TensorBoard:
    """Event files, opened with the first record.

    Not by tensorboardX's SummaryWriter: a full disk ends its thread, and nobody empties the queue any more.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise InputError(
                'train.tensorboard needs tensorboardX; pip install "snlp-jax[tensorboard]" or switch it off.'
            ) from error
        self._open_file, self._scalar, self._proto = event_file_writer.EventsWriter, summary.scalar, event_pb2
        self._prefix = str(directory / "events")
        self._purge_step: int | None = None
        self._events: Any = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        Event, SessionLog = self._proto.Event, self._proto.SessionLog
        if self._events is None:
            self._events = self._open_file(self._prefix)
            if self._purge_step is not None:  # TensorBoard hides what earlier files hold from this step on
                self._events.write_event(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))
        for name, value in metrics.items():
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=self._scalar(name, value)))
        self._events.flush()

    def truncate_after(self, step: int) -> None:
        self._purge_step = step + 1

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # of a full disk ``write`` has told
                self._events.close()


class Wandb:
    """Weights & Biases. A resumed training continues its run, where steps that it takes again appear twice."""

    def __init__(self, directory: Path, project: str, name: str | None, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                'train.wandb_project needs wandb; pip install "snlp-jax[wandb]" or leave it empty.'
            ) from error
        id_path = directory / WANDB_ID_NAME
        run_id = id_path.read_text().strip() if id_path.is_file() else None
        try:
            self._run = wandb.init(
                project=project, name=name, config=config, dir=str(directory), resume="allow", id=run_id
            )
        except Exception as error:  # its errors share no class with those of the network
            raise InputError(
                f"wandb did not start ({error}); run `wandb login`, set WANDB_MODE=offline, or leave "
                "train.wandb_project empty."
            ) from error
        atomic_write(id_path, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")  # its own step counter must not go back

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def truncate_after(self, step: int) -> None:
        """It cannot forget."""

    def close(self) -> None:
        self._run.finish()
