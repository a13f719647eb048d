"""The table and the plot of benchmarks/pretrained.py."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from snlp_jax.errors import InputError
from snlp_jax.eval.frontier import pareto_front


def mark_fronts(rows: Sequence[dict[str, Any]]) -> None:
    """Say of every timed row whether nothing is both faster and better."""
    for cost in ("prefill_ms", "decode_ms"):
        timed = [row for row in rows if cost in row]
        for row, is_on in zip(timed, pareto_front([(row[cost], row["nll"]) for row in timed]), strict=True):
            row[f"on_{cost.removesuffix('_ms')}_front"] = is_on


def calibrated_share(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Loss in nats of the calibrated solvers at K = 2 over that of the better of the others; empty without them."""
    base = rows[0]["nll"]
    lost = {row["name"].partition(":")[0]: row["nll"] - base for row in rows if row["name"].endswith(",k=2")}
    least = min((lost[name] for name in ("idn", "sid", "hcn") if name in lost), default=0.0)
    return {name: lost[name] / least for name in ("cal", "cal tuned") if name in lost and least > 0}


def table_of(rows: Sequence[dict[str, Any]], distances: Sequence[int], tasks: Sequence[str]) -> Table:
    """One row a method; a star marks the front of time and perplexity."""
    names = ["PPL", "change", "95 %", "prefill ms", "ratio", "decode ms", "ratio", "cache"]
    names += [f"key at {d}" for d in distances] + ["absent"] * bool(distances) + [Path(task).stem for task in tasks]
    table = Table("method", *(Column(name, justify="right") for name in names), padding=(0, 0))
    for row in rows:
        low, high = row["ppl_interval"] or (math.nan, math.nan)
        cells = [f"{row['ppl']:.3f}", f"{row['ppl_change']:+.2%}", f"{low:+.2%} to {high:+.2%}"]
        for what in ("prefill", "decode"):
            front = "*" if row.get(f"on_{what}_front") else ""
            cells += [f"{row[f'{what}_ms']:.2f}{front}", f"{row[f'{what}_ratio']:.2f}"] if f"{what}_ms" in row else "--"
        share = row.get("cache_bytes", math.nan) / rows[0].get("cache_bytes", math.nan)
        cells.append(f"{share:.0%}")
        cells += [f"{found['log_prob']:.1f} {found['exact']:.0%}" for found in row["retrieval"].values()]
        cells += [f"{found['per_byte']['share']:.1%}" for found in row["tasks"].values()] or ["--"] * len(tasks)
        table.add_row(row["name"], *cells)
    return table


def draw(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG: change of perplexity against both times, one line a family.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import io

        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib; pip install 'snlp-jax[plots]', or give --plot ''.") from error
    figure = Figure(figsize=(11.5, 4.8), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    families = list(dict.fromkeys(row["family"] for row in rows))
    for axis, what in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        for number, family in enumerate(families):
            mine = sorted(
                (row[f"{what}_ms"], 100 * row["ppl_change"])
                for row in rows
                if row["family"] == family and f"{what}_ms" in row
            )
            style = {"color": f"C{number % 10}", "marker": "o^sDvPX*<>"[number % 10], "markersize": 6, "linewidth": 1}
            style |= {"markerfacecolor": "white"} if number >= 10 else {}  # where colours and markers come again
            if mine:
                axis.plot(*zip(*mine, strict=True), **style, linestyle=":" if "drop" in family else "-", label=family)
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel({"prefill": "forward pass, ms", "decode": "decoded token, ms"}[what])
        axis.grid(color="#e6e9eb", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("change of perplexity, %")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
