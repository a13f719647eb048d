"""The picture of benchmarks/real_models.py: what methods cost and save, and what the depth of a real model is like."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(name: str, report: dict[str, Any]) -> bytes:
    """A PNG of three panels: change of perplexity against decoding time, how much of each branch a map leaves by depth,
    and the error of regions by depth."""
    figure = Figure(figsize=(14, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _draw_methods(left, report["methods"]["methods"])
    _draw_linearity(middle, report["methods"]["candidates"])
    _draw_regions(right, report["regions"])
    for axis in (left, middle, right):
        axis.grid(color="#e6e9eb", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{name}, {report['device']['kind']}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_methods(axis: Any, rows: list[dict[str, Any]]) -> None:
    for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        points = sorted(
            (row["decode_ms"], 100 * row["ppl_change"])
            for row in rows
            if row["family"] == family and "decode_ms" in row
        )
        if points:
            style = {"color": f"C{number % 10}", "marker": "o^sDvPX*<>"[number % 10], "markersize": 5, "linewidth": 1}
            axis.plot(*zip(*points, strict=True), **style, label=family)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="decoded token, ms", ylabel="change of perplexity, %")


def _draw_linearity(axis: Any, candidates: list[dict[str, Any]]) -> None:
    for number, branch in enumerate(dict.fromkeys(each["branch"] for each in candidates)):
        mine = [each for each in candidates if each["branch"] == branch]
        layers = [each["layer"] for each in mine]
        axis.plot(layers, [each["held_out"] for each in mine], f"C{number}-", label=f"{branch}, held-out error")
        axis.plot(layers, [each["cca_bound"] for each in mine], f"C{number}:", label=f"{branch}, CCA bound")
    axis.set(xlabel="layer", ylabel="share of variance that a map leaves", yscale="log")


def _draw_regions(axis: Any, regions: list[dict[str, Any]]) -> None:
    last = [region["layers"][-1] for region in regions]
    for iterations, style in ((0, "k:"), (1, "C0-"), (2, "C1-"), (4, "C2-")):
        values = [region["errors"][min(iterations, len(region["errors"]) - 1)][-1] for region in regions]
        axis.plot(last, values, style, marker="o", label=f"{iterations} iterations")
    axis.set(xlabel=f"last of {len(regions[0]['layers'])} layers", ylabel="relative error of the output", yscale="log")
