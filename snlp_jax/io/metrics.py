"""Metrics of a run: one JSON object a line, in ``metrics.jsonl``, and TensorBoard events if asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write, explain_full_disk

FILE_NAME = "metrics.jsonl"


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
    """Appends to a run's metrics. One process of a run writes them, the others have a :class:`NoMetricsWriter`."""

    def __init__(self, run_dir: str | Path, tensorboard: bool = False) -> None:
        """Open the log of ``run_dir``, which is created if missing.

        Raises InputError when ``tensorboard`` is asked for and tensorboardX is not installed.
        """
        self._directory = Path(run_dir)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / FILE_NAME
        self._purge_step: int | None = None
        self._tensorboard: Any = None
        self._make_tensorboard: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise InputError(
                    'train.tensorboard needs tensorboardX; pip install "snlp-jax[tensorboard]" or switch it off.'
                ) from error
            self._make_tensorboard = SummaryWriter

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record and flush it. Values are Python, numpy or jax scalars. Raises InputError on a full disk."""
        record = {"step": int(step), **{name: to_json_value(value) for name, value in metrics.items()}}
        with explain_full_disk(self._directory):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self._make_tensorboard is not None:
                self._write_tensorboard(step, metrics)

    def _write_tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            self._tensorboard = self._make_tensorboard(str(self._directory), purge_step=self._purge_step)
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, float(value), int(step))
        self._tensorboard.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps beyond ``step``, and a torn last line: what a resumed run will write again.

        Raises InputError when an earlier line is not a record.
        """
        self._purge_step = step + 1
        if self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= step]
            lines = [json.dumps({**{k: to_json_value(v) for k, v in r.items()}, "step": r["step"]}) for r in kept]
            atomic_write(self._path, "".join(line + "\n" for line in lines))

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetricsWriter(MetricsWriter):
    """Of the processes that do not write."""

    def __init__(self, run_dir: str | Path, tensorboard: bool = False) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def truncate_after(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass
