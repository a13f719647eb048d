"""What a search has found: tables, JSON, CSV, a picture, and the solver file."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from snlp_jax.errors import InputError
from snlp_jax.eval.frontier import draw_frontier, pareto_front
from snlp_jax.eval.report import Record, between, ends, make_table, percent
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
class Found(Record):
    """The winner, and all candidates, the sequential pass first."""

    stem = "search"
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

    def csv_rows(self) -> list[dict[str, Any]]:
        """One row a candidate."""
        rows = []
        for row in self.rows:
            fields = dataclasses.asdict(row)
            rows.append(fields | ends("ppl_change", fields.pop("ppl_interval")))
        return rows

    def to_png(self) -> bytes:
        """PPL change of what was measured against depth."""
        title = f"{self.winner.name}: at most {percent(self.info['limit'])} %; {self.info['device']}"
        points = [(row.name, row.ppl_change or 0.0, row.ppl_interval) for row in self.measured]
        return draw_frontier(
            points, {"depth, dependent block evaluations": [r.mean_depth for r in self.measured]}, title
        )

    def tables(self) -> Iterator[Table | str]:
        """The front of what was measured, what was timed, and a sentence on the winner."""
        shown, rows = self.measured, []
        on_front = pareto_front([(row.mean_depth, row.ppl_change or 0.0) for row in shown])
        for row, is_on in zip(shown, on_front, strict=True):
            if is_on or row.ms is not None or row.name in ("seq", self.winner.name):
                ms, change = "-" if row.ms is None else f"{row.ms:.3f}", f"{percent(row.ppl_change or 0.0)} %"
                cells = [row.name, f"{row.mean_depth:.3g}", ms, str(row.num_windows), change]
                rows.append([*cells, between(row.ppl_interval, percent), row.status])
        title = f"Front of {len(shown)} measured candidates of {len(self.rows)}; "
        title += f"{self.info['num_windows']} held-out windows"
        yield make_table(title, ["depth", "ms", "windows", "change", "interval", "status"], rows)
        if self.info["objective"] != "depth":
            yield self.info["cost"]
        yield self.verdict()

    def verdict(self) -> str:
        """One sentence on the winner."""
        measured, name = self.solver.measured, self.winner.name
        within = f"at most {100 * self.info['limit']:g} % of perplexity"
        gain = f"depth {measured['depth']:.3g} instead of {measured['sequential_depth']}"
        if "speedup" in measured:
            low, high = measured["speedup_quartiles"]
            gain = f"{measured['speedup']:.2f} times as fast as the sequential pass (quartiles {low:.2f} to {high:.2f})"
        if name == "seq":
            return f"Nothing faster keeps within {within}: the sequential pass stays."
        if self.solver.speculate:
            return f"{name}: {gain}, with the sequential pass's text, which is within any limit."
        fresh = f"{percent(measured['ppl_change'])} % ({between(measured['ppl_interval'], percent)})"
        return f"{name}: {gain}; {fresh} of perplexity on {measured['num_windows']} fresh windows, within {within}."

    def write(self, run_dir: Path) -> tuple[list[Path], str]:
        """Besides, ``solver.json`` into the run directory itself."""
        paths, notice = super().write(run_dir)
        try:
            paths.append(write_solver_file(run_dir / SOLVER_NAME, self.solver))
        except OSError as error:
            raise InputError(f"{str(run_dir)!r} cannot be written ({error.strerror}); make it writable.") from error
        return paths, notice
