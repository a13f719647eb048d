"""Which settings are worth having: the Pareto front of quality against cost, and its picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

LOG_RANGE = 20.0
"""Spread of the changes from which on their axis is logarithmic (linear around zero)."""

LABEL_PLACES = [(dx, dy) for dy in (0, 8, -8, 16, -16, 24, -24, 32, -32, 40, -40) for dx in (7, -7)]
"""Where a point's name may stand, in printer's points from it, best first."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point (cost, loss), lower is better in both, is dominated by none.

    A point dominates another if it is no worse in both and better in one; equal points are all on the front.
    """
    return [not any(a[0] <= b[0] and a[1] <= b[1] and a != b for a in points) for b in points]


def draw_frontier(
    settings: Sequence[tuple[str, float, tuple[float, float] | None]],
    costs: Mapping[str, Sequence[float]],
    title: str,
) -> bytes:
    """A PNG with one panel for each cost.

    Args:
        settings: name, relative change of PPL and its 95 % interval, as fractions; the sequential pass first.
        costs: axis label -> cost of every setting.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained", dpi=160)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    percents = [100 * change for _, change, _ in settings]
    bars = [[100 * end for end in interval or (change, change)] for _, change, interval in settings]
    points = [list(zip(values, percents, strict=True)) for values in costs.values()]
    for axis, label, panel in zip(axes, costs, points, strict=True):
        _draw_panel(axis, panel, bars)
        axis.set_xlabel(label)
    axes[0].set_ylabel("change of perplexity, %")
    figure.suptitle(title, fontsize=11)
    canvas.draw()  # names are placed where the points have come to lie
    for axis, panel in zip(axes, points, strict=True):
        _label_points(axis, canvas.get_renderer(), [name for name, _, _ in settings], panel)
    return to_png(figure)


def to_png(figure: Any) -> bytes:
    """The bytes of a matplotlib figure's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axis: Any, points: list[tuple[float, float]], bars: list[list[float]]) -> None:
    sizes = sorted(abs(percent) for _, percent in points if abs(percent) > 1e-3)
    if sizes and sizes[-1] > LOG_RANGE * sizes[0]:
        axis.set_yscale("symlog", linthresh=max(sizes[0], sizes[-1] / 1e4))
        axis.yaxis.set_major_formatter("{x:g}")
    on_front = pareto_front(points)
    front = sorted(point for point, is_on in zip(points, on_front, strict=True) if is_on)
    axis.plot(*zip(*front, strict=True), color="#2a6f97", linewidth=1.2, zorder=1, label="Pareto front")
    for (cost, percent), bar, is_on in zip(points, bars, on_front, strict=True):
        axis.plot([cost, cost], bar, color="#9aa5ad", linewidth=1, zorder=1)
        axis.plot(cost, percent, "o", markersize=6, color="#2a6f97" if is_on else "#c3ccd2", zorder=2)
    axis.plot(*points[0], "*", markersize=15, color="#d1495b", zorder=3, label="sequential")
    axis.axhline(0, color="#d1495b", linewidth=0.8, linestyle=":", zorder=0)
    axis.margins(x=0.22, y=0.15)
    axis.grid(color="#e6e9eb", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _label_points(axis: Any, renderer: Any, names: Sequence[str], points: list[tuple[float, float]]) -> None:
    """Write names beside their points where they cover no other name or point, those of the front first.

    A name for which there is no room is left out.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    radius = 4 * axis.figure.dpi / 72
    marks = [Bbox.from_bounds(x, y, 0, 0).padded(radius) for x, y in axis.transData.transform(points)]
    on_front = pareto_front(points)
    taken: list[Any] = []
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#b5bdc2", "shrinkA": 0, "shrinkB": 3}
    for index in sorted(range(len(names)), key=lambda i: not on_front[i]):
        others = marks[:index] + marks[index + 1 :]
        look = {"fontsize": 7, "va": "center", "color": "#333d43" if on_front[index] else "#7b868d"}
        for dx, dy in LABEL_PLACES:
            side = "left" if dx > 0 else "right"
            place = {"xytext": (dx, dy), "textcoords": "offset points", "ha": side, "arrowprops": line}
            text = axis.annotate(names[index], points[index], **place, **look)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line
            if axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and not any(map(box.overlaps, others + taken)):
                taken.append(box)
                break
            text.remove()
