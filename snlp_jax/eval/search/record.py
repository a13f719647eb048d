"""What a search has found: tables, JSON, CSV, a picture, and the solver file."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError
from snlp_jax.eval.frontier import draw_frontier, pareto_front
from snlp_jax.eval.report import make_console, new_table, percent, rows_to_csv, to_json, write_files
from snlp_jax.eval.solver_file import SOLVER_NAME, SolverFile, write_solver_file


@dataclass(frozen=True)
class Row:
    """One candidate. None where it was not measured."""

    name: str
    status: str
    """winner; passed, failed or undecided on the windows to choose on; implied by another of its line; refuted on
    fresh windows."""
    depth: int
    mean_depth: float
    """Of an average sequence, which may stop early."""
    num_block_evals: int
    ms: float | None
    """At the last timing."""
    num_windows: int
    ppl_change: float | None
    ppl_interval: tuple[float, float] | None
    """Two-sided, at the search's confidence."""


@dataclass(frozen=True)
class Found:
    """The winner, and all candidates, the sequential pass first."""

    solver: SolverFile
    rows: tuple[Row, ...]
    info: dict[str, Any]
    """Objective, limit, device, versions, seconds."""

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.status == "winner")

    @property
    def measured(self) -> list[Row]:
        """Candidates whose quality is known, the sequential pass first."""
        return [row for row in self.rows if row.ppl_change is not None]

    def to_csv(self) -> str:
        """One row a candidate."""
        rows = []
        for row in self.rows:
            fields = dataclasses.asdict(row)
            low, high = fields.pop("ppl_interval") or (None, None)
            rows.append(fields | {"ppl_change_low": low, "ppl_change_high": high})
        return rows_to_csv(rows)

    def to_png(self) -> bytes:
        """PPL change of what was measured against depth. Raises ImportError without matplotlib."""
        return draw_frontier(
            [row.name for row in self.measured],
            [row.ppl_change or 0.0 for row in self.measured],
            [row.ppl_interval for row in self.measured],
            {"depth, dependent block evaluations": [row.mean_depth for row in self.measured]},
            title=f"{self.winner.name}: at most {percent(self.info['limit'])} %; {self.info['device']}",
        )


def print_found(found: Found) -> None:
    """The front of what was measured, what was timed, and a sentence on the winner."""
    console, shown, info = make_console(), found.measured, found.info
    on_front = pareto_front([(row.mean_depth, row.ppl_change or 0.0) for row in shown])
    title = f"Front of {len(shown)} measured candidates of {len(found.rows)}; {info['num_windows']} held-out windows"
    table = new_table(title, ["depth", "ms", "windows", "change", "interval", "status"])
    for row, is_on in zip(shown, on_front, strict=True):
        if is_on or row.ms is not None or row.name in ("seq", found.winner.name):
            interval = "-" if row.ppl_interval is None else " to ".join(map(percent, row.ppl_interval))
            ms = "-" if row.ms is None else f"{row.ms:.3f}"
            change = f"{percent(row.ppl_change or 0.0)} %"
            table.add_row(row.name, f"{row.mean_depth:.3g}", ms, str(row.num_windows), change, interval, row.status)
    console.print(table)
    if info["objective"] != "depth":
        console.print(info["cost"], markup=False)
    console.print(verdict(found), markup=False, soft_wrap=True)


def verdict(found: Found) -> str:
    """One sentence on the winner."""
    measured, name = found.solver.measured, found.winner.name
    within = f"at most {100 * found.info['limit']:g} % of perplexity"
    gain = f"depth {measured['depth']:.3g} instead of {measured['sequential_depth']}"
    if "speedup" in measured:
        low, high = measured["speedup_quartiles"]
        gain = f"{measured['speedup']:.2f} times as fast as the sequential pass (quartiles {low:.2f} to {high:.2f})"
    if name == "seq":
        return f"Nothing faster keeps within {within}: the sequential pass stays."
    if found.solver.speculate:
        return f"{name}: {gain}, with the sequential pass's text, which is within any limit."
    low, high = measured["ppl_interval"]
    fresh = f"{percent(measured['ppl_change'])} % ({percent(low)} to {percent(high)})"
    return f"{name}: {gain}; {fresh} of perplexity on {measured['num_windows']} fresh windows, within {within}."


def write_found(found: Found, run_dir: Path) -> tuple[list[Path], str]:
    """Write ``solver.json`` into the run directory, the rest into ``run_dir/eval``.

    Returns:
        The files, and a notice about what could not be made, or "".

    Raises:
        InputError: a folder cannot be written.
    """
    contents: dict[str, str | bytes] = {"search.json": to_json(found), "search.csv": found.to_csv()}
    paths, notice = write_files(run_dir, contents, "search.png", found.to_png)
    try:
        paths.append(write_solver_file(run_dir / SOLVER_NAME, found.solver))
    except OSError as error:
        raise InputError(f"folder {str(run_dir)!r} cannot be written ({error.strerror}); make it writable.") from error
    return paths, notice
