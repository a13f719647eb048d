"""The frontier search beside the full grid: what each finds, and what each takes.

    python benchmarks/search.py runs/demo --objective depth
    python benchmarks/search.py runs/demo --objective prefill --region-sizes 4 8 12

The grid measures every candidate of the search's space: its PPL change on all windows that the search chooses on, and
for a time its median. Its best is the cheapest whose upper bound is within the limit; for a time the first few are
timed again beside the search's winner, interleaved, since medians of hours apart cannot be compared. The search comes
first, in the same process and without a cache of compiled programs, so that neither profits.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks.machine import out_path
from snlp_jax.config import SearchConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.search.quality import EXACT
from snlp_jax.eval.search.search import Search
from snlp_jax.eval.search.space import Candidate
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import circumstances
from snlp_jax.run import read_config

GROUP = 8
"""Candidates of the grid that are timed together, beside the sequential pass."""
NUM_AGAIN = 5
"""Candidates within the limit that are timed again."""


@dataclass(frozen=True)
class Args:
    """Compare the search with the full grid."""

    run_dir: tyro.conf.Positional[Path]
    checkpoint: Literal["best", "last"] = "best"
    search: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SearchConfig(search=True, objective="depth")
    )
    num_windows: int = 128
    """To choose on; as many again confirm."""
    repeats: int = 15
    """Of each timing."""
    timing_len: int = 0
    """Tokens of a forward; 0 means seq_len."""
    out: str = ""
    """Empty: benchmarks/results/search_DEVICE_DATE.json."""


def main(args: Args) -> dict[str, Any]:
    """Run both and return what the JSON file holds."""
    config = read_config(args.run_dir)
    changes = {"num_windows": args.num_windows, "timing_repeats": args.repeats, "timing_len": args.timing_len}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))
    jax.config.update("jax_enable_compilation_cache", False)
    arguments = dataclasses.asdict(args) | {"run_dir": str(args.run_dir), "out": ""}
    report: dict[str, Any] = circumstances() | {"args": arguments}
    report["load_average"] = {"start": os.getloadavg()[0]}
    began = time.perf_counter()
    search = Search(args.run_dir, config, args.search, args.checkpoint)
    found = search.run()
    report["search"] = {"seconds": time.perf_counter() - began, "winner": found.winner.name}
    report["search"] |= {"measured": found.solver.measured, "num_measured": found.info["num_measured"]}
    jax.clear_caches()
    grid = Search(args.run_dir, config, args.search, args.checkpoint)
    report["grid"] = run_grid(grid)
    compare(report, grid, found.winner.name)
    report["load_average"]["end"] = os.getloadavg()[0]
    names = {"device": {"kind": report["device"]}, "date": report["date"][:10]}
    out = out_path(args.out, f"search_{args.search.objective}", names)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print({key: report[key] for key in ("verdict", "search")}, f"wrote {out}")
    return report


def run_grid(search: Search) -> dict[str, Any]:
    """Every candidate, on all windows to choose on."""
    began, rows = time.perf_counter(), []
    alpha = (1 - search.search.confidence) / 2
    ratios = timed(search)
    for candidate in search.candidates:
        bounds = EXACT
        if not candidate.is_lossless:
            found = search.quality.measure(candidate.schedule, 0, search.num_windows)
            bounds, search.measured[candidate] = found.bounds(alpha), found
        depth, num_evals = search.cost(candidate)
        cost = [depth, num_evals] if search.clock is None else [ratios[candidate]]
        rows.append({"name": candidate.name, "cost": cost, "depth": depth} | bounds._asdict())
        Console(stderr=True).print(f"{len(rows)} of {len(search.candidates)}: {rows[-1]}", highlight=False)
    within = [row for row in rows if row["high"] <= search.search.limit]
    best = min(within, key=lambda row: row["cost"])
    return {"seconds": time.perf_counter() - began, "winner": best["name"], "rows": rows}


def timed(search: Search) -> dict[Candidate, float]:
    """Of every candidate the median ratio to the sequential pass, timed in groups; none where depth is the cost."""
    ratios: dict[Candidate, float] = {}
    sequential, *others = search.candidates
    if search.clock is None:
        return ratios
    for start in range(0, len(others), GROUP):
        group = [sequential, *others[start : start + GROUP]]
        search.time(group)
        ratios |= {candidate: search.ratio(candidate) for candidate in group}
        search.clock.reader.cache_clear()  # or memory would hold all candidates' weights
    return ratios


def compare(report: dict[str, Any], grid: Search, winner: str) -> None:
    """Whether the search has found what the grid has, in what share of its time."""
    share = report["search"]["seconds"] / report["grid"]["seconds"]
    rows = {row["name"]: row for row in report["grid"]["rows"]}
    found, best = rows[winner], rows[report["grid"]["winner"]]
    verdict = {"share_of_time": share, "grid_winner": best["name"], "num_candidates": len(rows)}
    if grid.clock is None:
        verdict |= {"depth": found["depth"], "grid_depth": best["depth"], "is_as_deep": found["cost"] <= best["cost"]}
    else:
        by_name = {candidate.name: candidate for candidate in grid.candidates}
        within = [row for row in rows.values() if row["high"] <= grid.search.limit]
        leaders = [by_name[row["name"]] for row in sorted(within, key=lambda row: row["cost"])[:NUM_AGAIN]]
        grid.time(list(dict.fromkeys([grid.candidates[0], by_name[winner], *leaders])))
        medians = {candidate.name: float(np.median(times)) for candidate, times in grid.times_ms.items()}
        ratio = medians[winner] / min(medians.values())
        verdict |= {"again_ms": medians, "time_over_grid_best": ratio, "is_within_5_percent": ratio <= 1.05}
    report["verdict"] = verdict | {"is_under_a_quarter": share < 0.25}


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
