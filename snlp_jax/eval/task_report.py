"""The numbers of downstream tasks: as tables, JSON and CSV."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from snlp_jax.eval.intervals import Interval
from snlp_jax.eval.report import make_console, new_table, rows_to_csv, to_json, write_files


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers under one rule, beside that of the sequential pass on the same examples."""

    share: float
    interval: Interval
    """95 %, Wilson."""
    change: float
    """Share - that of the sequential pass."""
    change_interval: Interval
    """95 %, Tango's for paired shares."""
    num_gained: int
    """Examples that only this setting got right."""
    num_lost: int
    """Examples that only the sequential pass got right."""
    p_value: float
    """Of McNemar's exact test that both are equally good, for one setting alone: many settings need a smaller one."""
    agreement: float
    """Share of examples with the sequential pass's answer, right or wrong."""


@dataclass(frozen=True)
class Bits:
    """Bits per byte of text, beside those of the sequential pass on the same text."""

    per_byte: float
    change: float
    change_interval: Interval | None
    """95 %, paired bootstrap over examples or windows."""


@dataclass(frozen=True)
class TaskResult:
    """One setting on one task."""

    task: str
    setting: str
    num_examples: int
    chance: float | None
    """Share of right answers of a blind guess; None for generated answers."""
    accuracy: dict[str, Accuracy]
    """By rule: ``per_byte`` and ``sum`` of a choice's log-likelihood, or ``exact_match``."""
    answer_bits: Bits | None
    """Of the right answers' texts after their questions; None for generated answers."""
    num_cut: int
    """Contexts that were longer than the model reads and lost their beginning."""


@dataclass(frozen=True)
class HeldOutResult:
    """One setting on the run's held-out text."""

    setting: str
    bits: Bits


@dataclass(frozen=True)
class TaskReport:
    """All settings on all tasks, the sequential pass first, and under what circumstances."""

    results: tuple[TaskResult, ...]
    held_out: tuple[HeldOutResult, ...]
    info: dict[str, Any]

    def to_csv(self) -> str:
        """One row a task, setting and rule, fractions as fractions; the held-out text has no rule."""
        rows: list[dict[str, Any]] = [
            {
                "task": result.task,
                "setting": result.setting,
                "rule": rule,
                "num_examples": result.num_examples,
                "chance": result.chance,
                "share": found.share,
                "share_low": found.interval[0],
                "share_high": found.interval[1],
                "change": found.change,
                "change_low": found.change_interval[0],
                "change_high": found.change_interval[1],
                "p_value": found.p_value,
                "agreement": found.agreement,
            }
            | _bits_row(result.answer_bits)
            for result in self.results
            for rule, found in result.accuracy.items()
        ]
        rows += [{"task": "held-out text", "setting": each.setting} | _bits_row(each.bits) for each in self.held_out]
        return rows_to_csv(rows)


def write_tasks(report: TaskReport, run_dir: Path) -> list[Path]:
    """Write ``tasks.json`` and ``tasks.csv`` into ``run_dir/eval``.

    Raises:
        InputError: the folder cannot be written.
    """
    return write_files(run_dir, {"tasks.json": to_json(report), "tasks.csv": report.to_csv()})[0]


def print_tasks(report: TaskReport) -> None:
    """A table a task on stdout, and one of the held-out text."""
    console = make_console()
    for task in dict.fromkeys(result.task for result in report.results):
        console.print(_task_table([result for result in report.results if result.task == task]))
    if report.held_out:
        windows = "{num_windows} windows of {window_len} tokens".format(**report.info["held_out"])
        table = new_table(f"Held-out text, {windows}", ["bits/byte", "change", "95 % interval"])
        for found in report.held_out:
            table.add_row(found.setting, *_bits_cells(found.bits, found is report.held_out[0]))
        console.print(table)


def _task_table(results: list[TaskResult]) -> Table:
    first = results[0]
    chance = "" if first.chance is None else f", chance {100 * first.chance:.1f} %"
    rules = {"per_byte": "by byte", "sum": "sum", "exact_match": "right"}
    columns = [f"{rules[rule]}, %" for rule in first.accuracy]
    columns[1:1] = ["95 % interval", "change", "95 % interval", "p", "same"]
    columns += ["bits/byte"] if first.answer_bits else []
    table = new_table(f"{first.task}: {first.num_examples} examples{chance}", columns)
    for result in results:
        main, *others = result.accuracy.values()
        cells = [f"{100 * main.share:.1f}", _percents(main.interval, "")]
        compared = [f"{100 * main.change:+.1f}", _percents(main.change_interval, "+"), f"{main.p_value:.2g}"]
        compared += [f"{100 * main.agreement:.1f} %"]
        cells += compared if result is not first else ["-"] * 4
        cells += [f"{100 * other.share:.1f}" for other in others]
        cells += [f"{result.answer_bits.per_byte:.4f}"] if result.answer_bits else []
        table.add_row(result.setting, *cells)
    if first.num_cut:
        table.caption = f"{first.num_cut} contexts were too long for the model and lost their beginning."
    return table


def _bits_row(bits: Bits | None) -> dict[str, Any]:
    if bits is None:
        return {}
    low, high = bits.change_interval or (None, None)
    return {"bits_per_byte": bits.per_byte, "bits_change": bits.change, "bits_low": low, "bits_high": high}


def _bits_cells(bits: Bits, is_first: bool) -> list[str]:
    if is_first:
        return [f"{bits.per_byte:.4f}", "-", "-"]
    interval = bits.change_interval
    between = "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
    return [f"{bits.per_byte:.4f}", f"{bits.change:+.4f}", between]


def _percents(interval: Interval, sign: str) -> str:
    return " to ".join(f"{100 * end:{sign}.1f}" for end in interval)
