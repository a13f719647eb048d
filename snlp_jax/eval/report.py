"""The numbers of an evaluation: as tables, JSON, CSV and a picture."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Report:
    """All settings, the sequential pass first, and under what circumstances they were measured."""

    results: tuple[SettingResult, ...]
    info: dict[str, Any]
    """Device, versions, date, commit, seeds, shapes, config: whatever JSON can hold."""

    def to_json(self) -> str:
        """The info and the results; numbers that are not finite, which JSON has not, become null."""
        return to_json(self)

    def to_csv(self) -> str:
        """One row a setting: the numbers of the tables, fractions as fractions."""
        return rows_to_csv([_csv_row(result) for result in self.results])

    def to_png(self) -> bytes:
        """PPL change against depth and, where it was measured, time. Raises ImportError without matplotlib."""
        info, results = self.info, [result for result in self.results if math.isfinite(result.ppl_change)]
        costs = {"depth, dependent block evaluations": [result.mean_depth for result in results]}
        times = [result.timing.median_ms for result in results if result.timing is not None]
        if times:
            costs[f"ms a forward of {info['timing_batch']} x {info['timing_len']} tokens"] = times
        return draw_frontier(
            [result.setting for result in results],
            [result.ppl_change for result in results],
            [result.ppl_interval for result in results],
            costs,
            title=f"{info['num_layers']} layers, {info['num_params'] / 1e6:.3g} M parameters; "
            f"{info['device']}, {info['dtype']}",
        )


def write_report(report: Report, run_dir: Path) -> tuple[list[Path], str]:
    """Write ``eval.json``, ``eval.csv`` and ``eval.png`` into ``run_dir/eval``.

    Returns:
        The files, and a notice about what could not be made, or "".

    Raises:
        InputError: the folder cannot be written.
    """
    contents: dict[str, str | bytes] = {"eval.json": report.to_json(), "eval.csv": report.to_csv()}
    return write_files(run_dir, contents, "eval.png", report.to_png)


def write_files(
    run_dir: Path, contents: dict[str, str | bytes], picture: str = "", draw: Callable[[], bytes] | None = None
) -> tuple[list[Path], str]:
    """Write files, and a picture if there is one, into ``run_dir/eval``; see :func:`write_report`."""
    folder, notice = run_dir / FOLDER, ""
    try:
        contents = contents | ({picture: draw()} if draw else {})
    except ImportError:
        notice = f'no {picture}: it needs matplotlib, which `pip install "snlp-jax[plots]"` brings.'
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be written ({error.strerror}); make it writable.") from error
    return [folder / name for name in contents], notice


def print_report(report: Report) -> None:
    """Two tables on stdout: what a setting changes, and what it costs."""
    console = make_console()
    console.print(_quality_table(report))
    if report.results[0].timing is not None:
        console.print(_cost_table(report))


def _quality_table(report: Report) -> Table:
    info = report.info
    title = f"Quality over {info['num_windows']} held-out windows of {info['window_len']} tokens"
    greedy = report.results[0].greedy
    columns = ["depth", "PPL", "change", "95 % interval", "KL", "top-1", "error"]
    columns += ["greedy in a row"] if greedy else []
    table = new_table(title, columns)
    for result in report.results:
        interval = result.ppl_interval
        changes = [
            f"{percent(result.ppl_change)} %",
            "-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}",
            f"{result.kl:.2g}",
            f"{100 * result.top1:.1f} %",
            f"{result.state_error:.2g}",
        ]
        matches = [f"{match.prefix_len:.1f} of {match.num_tokens}" for match in result.greedy[-1:]]
        cells = changes + matches if result is not report.results[0] else ["-"] * len(changes + matches)
        depth = str(result.depth) if result.mean_depth == result.depth else f"{result.mean_depth:.1f}"
        name = f"{result.setting} (oracle)" if result.is_oracle else result.setting
        table.add_row(name, depth, f"{result.ppl:.3f}", *cells)
    return table


def _cost_table(report: Report) -> Table:
    info = report.info
    title = (
        f"Cost of a forward of {info['timing_batch']} x {info['timing_len']} tokens: {info['device']}, "
        f"{info['dtype']}, {info['timing_repeats']} runs, interleaved"
    )
    table = new_table(title, ["depth", "evals", "ms (median)", "quartiles", "layout", "speed-up", "memory, MiB"])
    for result in report.results:
        timing = result.timing
        if timing is None or result.speedup is None:
            continue
        low, high = timing.quartiles_ms
        memory = "-" if timing.memory_bytes is None else f"{timing.memory_bytes / 2**20:.1f}"
        cells = [f"{timing.median_ms:.2f}", f"{low:.2f}-{high:.2f}", timing.layout, f"{result.speedup:.2f}x", memory]
        table.add_row(result.setting, str(result.depth), str(result.num_block_evals), *cells)
    return table


def new_table(title: str, columns: list[str]) -> Table:
    """A row a setting; ``columns`` are those behind its name."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("setting", overflow="fold", min_width=24)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def percent(fraction: float) -> str:
    """Signed, without the percent sign."""
    percent = 100 * fraction
    return f"{percent:+.2f}" if abs(percent) < 1000 else f"{percent:+.3g}"


def make_console() -> Console:
    """Of stdout, ``TABLE_WIDTH`` wide where that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def to_json(report: Any) -> str:
    """A dataclass of numbers as JSON; those that are not finite, which JSON has not, become null."""
    return json.dumps(finite_or_none(dataclasses.asdict(report)), indent=2) + "\n"


def rows_to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row; columns are the keys in the order of their first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def finite_or_none(value: Any) -> Any:
    """A tree of dicts and lists with numbers that are not finite, which JSON has not, as None."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_row(result: SettingResult) -> dict[str, Any]:
    low, high = result.ppl_interval or (None, None)
    row: dict[str, Any] = {
        "setting": result.setting,
        "is_oracle": result.is_oracle,
        "depth": result.depth,
        "mean_depth": result.mean_depth,
        "num_block_evals": result.num_block_evals,
        "ppl": result.ppl,
        "ppl_change": result.ppl_change,
        "ppl_change_low": low,
        "ppl_change_high": high,
        "kl": result.kl,
        "top1": result.top1,
        "cosine": result.cosine,
        "state_error": result.state_error,
    }
    for match in result.greedy:
        row[f"greedy_prefix_{match.num_tokens}"] = match.prefix_len
        row[f"greedy_match_{match.num_tokens}"] = match.match_rate
    if result.timing is not None:
        row["ms"] = result.timing.median_ms
        row["ms_q1"], row["ms_q3"] = result.timing.quartiles_ms
        row["layout"] = result.timing.layout
        row["speedup"] = result.speedup
        row["memory_bytes"] = result.timing.memory_bytes
    return row
