"""What an evaluation leaves: tables on stdout, and JSON, CSV and a picture in RUN_DIR/eval; and those of the evaluation
of settings."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import GreedyMatch
from snlp_jax.eval.frontier import draw_frontier
from snlp_jax.eval.timing import Timing
from snlp_jax.io.files import atomic_write

FOLDER = "eval"
TABLE_WIDTH = 120
"""Where the output is no terminal."""


class Record:
    """Base of the dataclasses that an evaluation gives back."""

    stem: ClassVar[str]
    """Of its files' names."""

    def tables(self) -> Iterable[Table | str]:
        """What is printed; texts are sentences."""
        raise NotImplementedError

    def csv_rows(self) -> Sequence[dict[str, Any]]:
        """Of the CSV file; none makes no file."""
        return ()

    def to_png(self) -> bytes:
        """The picture, b"" where there is none. Raises ImportError without matplotlib."""
        return b""

    def to_json(self) -> str:
        """All fields; numbers that are not finite, which JSON has not, become null."""
        text = json.dumps(dataclasses.asdict(self))  # type: ignore[call-overload]
        return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2) + "\n"

    def to_csv(self) -> str:
        """One line a row; columns are the keys in the order of their first appearance."""
        text, rows = io.StringIO(), self.csv_rows()
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def print(self) -> None:
        """The tables on stdout, ``TABLE_WIDTH`` wide where that is no terminal."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=TABLE_WIDTH)
        for table in self.tables():
            console.print(table, markup=not isinstance(table, str), soft_wrap=isinstance(table, str))

    def write(self, run_dir: Path) -> tuple[list[Path], str]:
        """Write the files into ``run_dir/eval``.

        Returns:
            The files, and a notice about what could not be made, or "".

        Raises:
            InputError: the folder cannot be written.
        """
        folder, notice = run_dir / FOLDER, ""
        contents: dict[str, str | bytes] = {f"{self.stem}.json": self.to_json()}
        if self.csv_rows():
            contents[f"{self.stem}.csv"] = self.to_csv()
        try:
            picture = self.to_png()
            contents |= {f"{self.stem}.png": picture} if picture else {}
        except ImportError:
            notice = f'no {self.stem}.png: it needs matplotlib, which `pip install "snlp-jax[plots]"` brings.'
        try:
            folder.mkdir(exist_ok=True)
            for name, content in contents.items():
                atomic_write(folder / name, content)
        except OSError as error:
            raise InputError(f"{str(folder)!r} cannot be written ({error.strerror}); make it writable.") from error
        return [folder / name for name in contents], notice


@dataclass(frozen=True)
class SettingResult:
    """One solver setting against the sequential pass of the same weights. None where a part was left out."""

    setting: str
    is_oracle: bool
    """Whether it rests on states that only a sequential pass over the same text can know: a bound, not a method."""
    depth: int
    """Dependent block evaluations on the critical path, at most."""
    mean_depth: float
    """The same for an average sequence; less than ``depth`` where a tolerance stops iterations early."""
    num_block_evals: int
    ppl: float
    ppl_change: float
    """PPL / sequential PPL - 1."""
    ppl_interval: tuple[float, float] | None
    """95 % interval of ``ppl_change``, paired bootstrap over windows; None with a single window."""
    kl: float
    """KL(sequential || solver), nats, mean over tokens."""
    top1: float
    """Share of tokens with the same most likely next token."""
    cosine: float
    """Of the logits, mean over tokens."""
    state_error: float
    """||h - h*|| / ||h*|| of the last layer's output, mean over tokens."""
    nll_change_by_position: tuple[float, ...]
    """Nats, in equal bins over the positions of a window."""
    residual_norms: tuple[tuple[float, ...], ...]
    """Of each parallel region, before each iteration's correction (mean over its layers and tokens)."""
    iterations: tuple[tuple[float, float], ...] = ()
    """Of each region with a tolerance: iterations of an average sequence, and of an average batch."""
    greedy: tuple[GreedyMatch, ...] = ()
    timing: Timing | None = None
    speedup: float | None = None
    """Median time of the sequential pass / median time of this one, each in its faster layout."""

    def row(self) -> dict[str, Any]:
        """Of the CSV file: the numbers of the tables, fractions as fractions."""
        names = ["setting", "is_oracle", "depth", "mean_depth", "num_block_evals", "ppl", "ppl_change", "kl", "top1"]
        row = {name: getattr(self, name) for name in [*names, "cosine", "state_error"]}
        row |= ends("ppl_change", self.ppl_interval)
        for match in self.greedy:
            row[f"greedy_prefix_{match.num_tokens}"] = match.prefix_len
            row[f"greedy_match_{match.num_tokens}"] = match.match_rate
        if timing := self.timing:
            row |= {"ms": timing.median_ms, "ms_q1": timing.quartiles_ms[0], "ms_q3": timing.quartiles_ms[1]}
            row |= {"layout": timing.layout, "speedup": self.speedup, "memory_bytes": timing.memory_bytes}
        return row

    def quality_cells(self, is_reference: bool) -> list[str]:
        """Of the first table; the reference has nothing that it could differ from."""
        name = f"{self.setting} (oracle)" if self.is_oracle else self.setting
        depth = str(self.depth) if self.mean_depth == self.depth else f"{self.mean_depth:.1f}"
        changes = [f"{percent(self.ppl_change)} %", between(self.ppl_interval, percent), f"{self.kl:.2g}"]
        changes += [f"{100 * self.top1:.1f} %", f"{self.state_error:.2g}"]
        changes += [f"{match.prefix_len:.1f} of {match.num_tokens}" for match in self.greedy[-1:]]
        return [name, depth, f"{self.ppl:.3f}", *(["-"] * len(changes) if is_reference else changes)]

    def cost_cells(self, timing: Timing) -> list[str]:
        """Of the second table."""
        memory = "-" if timing.memory_bytes is None else f"{timing.memory_bytes / 2**20:.1f}"
        low, high = timing.quartiles_ms
        times = [f"{timing.median_ms:.2f}", f"{low:.2f}-{high:.2f}", timing.layout, f"{self.speedup:.2f}x", memory]
        return [self.setting, str(self.depth), str(self.num_block_evals), *times]


@dataclass(frozen=True)
class Report(Record):
    """All settings, the sequential pass first, and under what circumstances they were measured."""

    stem = "eval"
    results: tuple[SettingResult, ...]
    info: dict[str, Any]
    """Device, versions, date, commit, seeds, shapes, config: whatever JSON can hold."""

    def csv_rows(self) -> list[dict[str, Any]]:
        return [result.row() for result in self.results]

    def to_png(self) -> bytes:
        """PPL change against depth and, where it was measured, time."""
        info, results = self.info, [result for result in self.results if math.isfinite(result.ppl_change)]
        costs = {"depth, dependent block evaluations": [result.mean_depth for result in results]}
        times = [result.timing.median_ms for result in results if result.timing is not None]
        if times:
            costs[f"ms a forward of {info['timing_batch']} x {info['timing_len']} tokens"] = times
        points = [(result.setting, result.ppl_change, result.ppl_interval) for result in results]
        size = f"{info['num_layers']} layers, {info['num_params'] / 1e6:.3g} M parameters"
        return draw_frontier(points, costs, title=f"{size}; {info['device']}, {info['dtype']}")

    def tables(self) -> Iterable[Table]:
        """What a setting changes, and what it costs."""
        info, first = self.info, self.results[0]
        columns = ["depth", "PPL", "change", "95 % interval", "KL", "top-1", "error"]
        columns += ["greedy in a row"] if first.greedy else []
        title = f"Quality over {info['num_windows']} held-out windows of {info['window_len']} tokens"
        yield make_table(title, columns, [result.quality_cells(result is first) for result in self.results])
        rows = [result.cost_cells(result.timing) for result in self.results if result.timing]
        if rows:
            title = f"Cost of a forward of {info['timing_batch']} x {info['timing_len']} tokens: {info['device']}, "
            title += f"{info['dtype']}, {info['timing_repeats']} runs, interleaved"
            yield make_table(
                title, ["depth", "evals", "ms (median)", "quartiles", "layout", "speed-up", "memory, MiB"], rows
            )


def make_table(title: str, columns: list[str], rows: Iterable[Sequence[str]], first: str = "setting") -> Table:
    """``columns`` are those behind the first, which is folded where it is long."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold", min_width=24)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def percent(fraction: float) -> str:
    """Signed, without the percent sign."""
    percent = 100 * fraction
    return f"{percent:+.2f}" if abs(percent) < 1000 else f"{percent:+.3g}"


def between(interval: tuple[float, float] | None, text: Callable[[float], str]) -> str:
    """An interval's ends in words."""
    return "-" if interval is None else " to ".join(map(text, interval))


def ends(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    """An interval's ends as columns."""
    return dict(zip((f"{name}_low", f"{name}_high"), interval or (None, None), strict=True))
