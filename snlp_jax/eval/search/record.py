"""What a search has found: tables, JSON, CSV, a picture, and the solver file."""

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from snlp_jax.errors import InputError
from snlp_jax.eval.frontier import draw_frontier, pareto_front
from snlp_jax.eval.report import TABLE_WIDTH, _percent, _table, finite_or_none, write_files
from snlp_jax.eval.solver_file import SOLVER_NAME, SolverFile, write_solver_file


@dataclass(frozen=True)
class Row:
    """One candidate. None where it was not measured."""

    name: str
    status: str
    """winner; passed (but slower), failed, beaten by what costs less, implied by an easier failure, undecided on all
    windows, refuted on fresh ones."""
    depth: int
    mean_depth: float
    num_block_evals: int
    cost: float
    """Depth, or milliseconds, measured or predicted."""
    is_cost_measured: bool
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
    """Objective, limit, cost model, device, versions, seconds."""

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.status == "winner")

    def to_json(self) -> str:
        return json.dumps(finite_or_none(dataclasses.asdict(self)), indent=2) + "\n"

    def to_csv(self) -> str:
        """One row a candidate."""
        rows = []
        for row in self.rows:
            fields = dataclasses.asdict(row)
            low, high = fields.pop("ppl_interval") or (None, None)
            rows.append(fields | {"ppl_change_low": low, "ppl_change_high": high})
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_png(self) -> bytes:
        """PPL change of what was measured against cost. Raises ImportError without matplotlib."""
        shown = self.measured()
        return draw_frontier(
            [row.name for row in shown],
            [row.ppl_change or 0.0 for row in shown],
            [row.ppl_interval for row in shown],
            {self.info["cost"]: [row.cost for row in shown]},
            title=f"{self.winner.name}: at most {_percent(self.info['limit'])} %; {self.info['device']}",
        )

    def measured(self) -> list[Row]:
        """Candidates whose quality is known, the sequential pass first."""
        return [row for row in self.rows if row.ppl_change is not None]


def print_found(found: Found) -> None:
    """The front of what was measured, and a sentence on the winner."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    shown = found.measured()
    on_front = pareto_front([(row.cost, row.ppl_change or 0.0) for row in shown])
    info = found.info
    title = f"Front of {len(shown)} measured candidates of {len(found.rows)}; {info['num_windows']} held-out windows"
    is_timed = info["objective"] != "depth"
    columns = ["depth", *(["ms"] if is_timed else []), "windows", "change", "interval", "status"]
    table = _table(title, columns)
    for row, is_on in zip(shown, on_front, strict=True):
        if not (is_on or row.status == "winner" or row.name == "seq"):
            continue
        interval = "-" if row.ppl_interval is None else " to ".join(map(_percent, row.ppl_interval))
        change = f"{_percent(row.ppl_change or 0.0)} %"
        ms = [f"{row.cost:.3f}" + ("" if row.is_cost_measured else " *")] if is_timed else []
        table.add_row(row.name, f"{row.mean_depth:.3g}", *ms, str(row.num_windows), change, interval, row.status)
    console.print(table)
    if is_timed:
        console.print(f"{info['cost']}; * predicted, to within {100 * info['slack']:.0f} % or so", markup=False)
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
    fresh = f"{_percent(measured['ppl_change'])} % ({_percent(low)} to {_percent(high)})"
    return f"{name}: {gain}; {fresh} of perplexity on {measured['num_windows']} fresh windows, within {within}."


def write_found(found: Found, run_dir: Path) -> tuple[list[Path], str]:
    """Write ``solver.json`` into the run directory, the rest into ``run_dir/eval``.

    Returns:
        The files, and a notice about what could not be made, or "".

    Raises:
        InputError: a folder cannot be written.
    """
    contents: dict[str, str | bytes] = {"search.json": found.to_json(), "search.csv": found.to_csv()}
    paths, notice = write_files(run_dir, contents, "search.png", found.to_png)
    try:
        paths.append(write_solver_file(run_dir / SOLVER_NAME, found.solver))
    except OSError as error:
        raise InputError(f"folder {str(run_dir)!r} cannot be written ({error.strerror}); make it writable.") from error
    return paths, notice
