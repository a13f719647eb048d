"""The numbers of downstream tasks: as tables, JSON and CSV."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from snlp_jax.eval.intervals import Interval
from snlp_jax.eval.report import Record, between, ends, make_table


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

    def row(self) -> dict[str, float | None]:
        """Of the CSV file."""
        return {"bits_per_byte": self.per_byte, "bits_change": self.change, **ends("bits", self.change_interval)}

    def cells(self, is_reference: bool) -> list[str]:
        """Of a table."""
        change = [f"{self.change:+.4f}", between(self.change_interval, lambda end: f"{end:+.4f}")]
        return [f"{self.per_byte:.4f}", *(["-", "-"] if is_reference else change)]


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
class TaskReport(Record):
    """All settings on all tasks, the sequential pass first, and under what circumstances."""

    stem = "tasks"
    results: tuple[TaskResult, ...]
    held_out: tuple[HeldOutResult, ...]
    info: dict[str, Any]

    def csv_rows(self) -> list[dict[str, Any]]:
        """One row a task, setting and rule, fractions as fractions; the held-out text has no rule."""
        rows: list[dict[str, Any]] = []
        for result in self.results:
            for rule, found in result.accuracy.items():
                row: dict[str, Any] = {"task": result.task, "setting": result.setting, "rule": rule}
                row |= {"num_examples": result.num_examples, "chance": result.chance}
                row |= {"share": found.share, **ends("share", found.interval)}
                row |= {"change": found.change, **ends("change", found.change_interval)}
                row |= {"p_value": found.p_value, "agreement": found.agreement}
                rows.append(row | (result.answer_bits.row() if result.answer_bits else {}))
        return rows + [{"task": "held-out text", "setting": each.setting} | each.bits.row() for each in self.held_out]

    def tables(self) -> Iterator[Table]:
        """One a task, and one of the held-out text."""
        for task in dict.fromkeys(result.task for result in self.results):
            yield _task_table([result for result in self.results if result.task == task])
        if self.held_out:
            title = "Held-out text, {num_windows} windows of {window_len} tokens".format(**self.info["held_out"])
            rows = [[each.setting, *each.bits.cells(each is self.held_out[0])] for each in self.held_out]
            yield make_table(title, ["bits/byte", "change", "95 % interval"], rows)


def _task_table(results: list[TaskResult]) -> Table:
    first = results[0]
    chance = "" if first.chance is None else f", chance {100 * first.chance:.1f} %"
    rules = {"per_byte": "by byte", "sum": "sum", "exact_match": "right"}
    main_rule, *other_rules = first.accuracy
    columns = [f"{rules[main_rule]}, %", "95 % interval", "change", "95 % interval", "p", "same"]
    columns += [f"{rules[rule]}, %" for rule in other_rules] + (["bits/byte"] if first.answer_bits else [])
    rows = []
    for result in results:
        main = result.accuracy[main_rule]
        compared = [f"{100 * main.change:+.1f}", between(main.change_interval, lambda end: f"{100 * end:+.1f}")]
        compared += [f"{main.p_value:.2g}", f"{100 * main.agreement:.1f} %"]
        cells = [f"{100 * main.share:.1f}", between(main.interval, lambda end: f"{100 * end:.1f}")]
        cells += ["-"] * 4 if result is first else compared
        cells += [f"{100 * result.accuracy[rule].share:.1f}" for rule in other_rules]
        cells += [f"{result.answer_bits.per_byte:.4f}"] if result.answer_bits else []
        rows.append([result.setting, *cells])
    table = make_table(f"{first.task}: {first.num_examples} examples{chance}", columns, rows)
    if first.num_cut:
        table.caption = f"{first.num_cut} contexts were too long for the model and lost their beginning."
    return table
