"""``report.html`` of a run: curves, frontier, residuals, config and circumstances in one file that asks for no other.

    python -m snlp_jax.train.report runs/demo

Training writes it at its end, and eval.py again once there is a frontier to show. Without matplotlib it holds tables.
"""

import base64
import dataclasses
import html
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.config import Config, from_json
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.io.metrics import FILE_NAME, read_metrics
from snlp_jax.train.observe import read_record

REPORT_NAME = "report.html"
MAX_POINTS = 300
"""Of a curve; longer ones are averaged in so many equal parts."""
RATES = {
    "tokens_per_s": "tokens a second",
    "mfu": "FLOP utilisation",
    "data_wait": "share of time spent waiting for data",
    "grad_norm": "gradient norm",
    "host_mib": "host memory, MiB",
    "device_mib": "device memory, peak, MiB",
}
"""Metrics that are no losses, and their titles."""
NO_PLOTS = 'No plots: they need matplotlib, which `pip install "snlp-jax[plots]"` brings.'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222b30; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left; color: #66727a }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e9eb }
td.n { text-align: right }
"""

Records = list[dict[str, float]]
Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""


def write_html(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, from what lies there.

    Raises:
        InputError: the directory holds no run, or its metrics cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{str(run_dir)!r} holds no config.json; name a directory that training has written.")
    config: Config = from_json((run_dir / "config.json").read_text(encoding="utf-8"))
    records = read_metrics(run_dir / FILE_NAME)
    path = run_dir / REPORT_NAME
    atomic_write(path, make_html(config, records, read_record(run_dir), _read_json(run_dir / "eval" / "eval.json")))
    return path


def make_html(config: Config, records: Records, record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The page. All text that is not this file's own is escaped."""
    curves = curves_of(records)
    parts = [
        f"<h1>{_text(config.name)}</h1>",
        _table("", summary(config, curves, record), head=("", "")),
        "<h2>Loss</h2>",
        _plot(lambda: _draw_losses(curves)),
        _table("Last values", last_values(curves), head=("metric", "step", "value")),
        "<h2>Rates and memory</h2>",
        _plot(lambda: _draw_rates(curves)),
    ]
    if any(name.startswith("frontier/") for name in curves):
        parts += [
            "<h2>Frontier during training</h2>",
            "<p>Held-out cross entropy of each solver setting, a few batches.</p>",
            _plot(lambda: _draw_frontier(curves)),
        ]
    if any(name.startswith("residual/") for name in curves):
        parts += [
            "<h2>Residual by layer</h2>",
            "<p>Relative residual of the trace after one iteration.</p>",
            _plot(lambda: _draw_residuals(curves)),
        ]
    if evaluation is not None:
        parts += ["<h2>Evaluation</h2>", _evaluation_table(evaluation)]
    parts += [
        "<h2>Config</h2>",
        _table("Fields that differ from their defaults", changed_fields(config), head=("field", "value", "default")),
        "<h2>Sessions</h2>",
        _sessions_table(record["sessions"]),
    ]
    body = "\n".join(filter(None, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(config.name)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


# -- What is said ------------------------------------------------------------------------------------------------------


def curves_of(records: Records) -> dict[str, Curve]:
    """Metric -> its steps and values. Of a step that was written twice the later value counts."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                values.setdefault(name, {})[int(record["step"])] = value
    return {name: (np.array(sorted(v)), np.array([v[step] for step in sorted(v)])) for name, v in values.items()}


def summary(config: Config, curves: dict[str, Curve], record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was, in a few lines."""
    sessions = record["sessions"]
    done = max((int(steps[-1]) for steps, _ in curves.values()), default=0)
    rows = [("steps", f"{done} of {config.train.num_steps}")]
    tokens = done * config.train.batch_size * config.model.seq_len
    rows.append(("tokens", f"{tokens:,}"))
    if "num_params" in record:
        rows.append(("parameters", f"{record['num_params']:,}"))
    if "flops_per_token" in record:
        flops = tokens * record["flops_per_token"]
        rows.append(("FLOPs", f"{flops:.3g}, of the sequential pass and its gradient alone"))
    if sessions:
        seconds, last = sum(session.get("seconds", 0.0) for session in sessions), sessions[-1]
        rows.append(("wall time", f"{seconds:,.0f} s in {len(sessions)} session(s)"))
        rows.append(("device", f"{last.get('num_devices', 1)} x {last.get('device')}, jax {last.get('jax')}"))
        rows.append(("commit", str(last.get("commit"))))
    return rows


def last_values(curves: dict[str, Curve]) -> list[tuple[str, str, str]]:
    """The newest value of every metric that is no frontier or residual."""
    names = sorted(name for name in curves if "/" not in name)
    return [(name, str(int(curves[name][0][-1])), f"{curves[name][1][-1]:.5g}") for name in names]


def changed_fields(config: Config) -> list[tuple[str, str, str]]:
    """Field, value and default, of every field that is not at its default."""
    ours, theirs = (dict(_flatten(dataclasses.asdict(each))) for each in (config, Config()))
    return [(name, str(value), str(theirs.get(name))) for name, value in ours.items() if value != theirs.get(name)]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def thinned(curve: Curve, num_points: int = MAX_POINTS) -> Curve:
    """At most ``num_points`` points: means of equal parts. NaN is left out of a mean."""
    steps, values = curve
    if len(steps) <= num_points:
        return curve
    means = [part[np.isfinite(part)].mean() if np.isfinite(part).any() else math.nan
             for part in np.array_split(values, num_points)]  # fmt: skip
    return np.array([part[-1] for part in np.array_split(steps, num_points)]), np.array(means)


def _evaluation_table(evaluation: dict[str, Any]) -> str:
    info, rows = evaluation.get("info", {}), []
    for result in evaluation.get("results", ()):
        interval, timing = result.get("ppl_interval"), result.get("timing") or {}
        rows.append(
            (
                str(result.get("setting")),
                _number(result.get("depth"), "g"),
                _number(result.get("ppl"), ".4g"),
                _percent(result.get("ppl_change")),
                " to ".join(map(_percent, interval)) if interval else "",
                _percent(result.get("top1"), sign=""),
                _number(timing.get("median_ms"), ".3g"),
            )
        )
    title = (
        f"Checkpoint of step {info.get('step')}, {info.get('num_windows')} held-out windows of "
        f"{info.get('window_len')} tokens; ms a forward of {info.get('timing_batch')} x {info.get('timing_len')} "
        f"tokens on {info.get('device')}"
    )
    return _table(title, rows, head=("setting", "depth", "PPL", "change", "95 % interval", "top-1", "ms"))


def _sessions_table(sessions: Sequence[dict[str, Any]]) -> str:
    if not sessions:
        return "<p>None recorded.</p>"
    names = ("date", "first_step", "last_step", "seconds", "device", "num_devices", "jax", "commit")
    return _table("", [tuple(str(session.get(name, "")) for name in names) for session in sessions], head=names)


# -- How it looks ------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: Any, sign: str = "+") -> str:
    return "" if value is None else f"{100 * value:{sign}.2f} %"


def _table(caption: str, rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)  # noqa: E731
    lines = [f"<tr>{cells(head, 'th')}</tr>"] if any(head) else []
    lines += [f"<tr>{cells(row, 'td')}</tr>" for row in rows]
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{title}{''.join(lines)}</table>"


def _plot(draw: Callable[[], Any]) -> str:
    """A matplotlib figure as an SVG inside of the page; a sentence where matplotlib is missing.

    As an image, and not as markup, so that names inside of one drawing cannot meet those of another.
    """
    try:
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "snlp"}):
            figure, buffer = draw(), io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    except ImportError:
        return f"<p>{_text(NO_PLOTS)}</p>"
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _panels(num_panels: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(color="#e6e9eb", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step")
    return figure, axes


def _lines(axis: Any, curves: dict[str, Curve], style: str = "-") -> None:
    for name, curve in curves.items():
        steps, values = thinned(curve)
        axis.plot(steps, values, style, linewidth=1.3, markersize=3, label=name)
    if curves:
        axis.legend(frameon=False, fontsize=8)


def _draw_losses(curves: dict[str, Curve]) -> Any:
    figure, (left, right) = _panels(2)
    own = {name: curve for name, curve in curves.items() if "/" not in name and name not in RATES}
    _lines(left, {name: curve for name, curve in own.items() if not name.startswith("val_")})
    _lines(right, {name: curve for name, curve in own.items() if name.startswith("val_")}, ".-")
    left.set_title("training, a step's batch")
    right.set_title("held out")
    for axis in (left, right):
        _log_scale(axis)
    return figure


def _log_scale(axis: Any) -> None:
    """With plain numbers; where no value forbids it."""
    if axis.lines and all((line.get_ydata() > 0).all() for line in axis.lines):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="minor", labelsize=7)


def _draw_rates(curves: dict[str, Curve]) -> Any:
    names = [name for name in RATES if name in curves]
    figure, axes = _panels(max(len(names), 1), 2.6)
    for axis, name in zip(axes, names, strict=False):
        axis.plot(*thinned(curves[name]), linewidth=1.3)
        axis.set_title(RATES[name], fontsize=9)
        axis.set_ylim(bottom=0)
    return figure


def _draw_frontier(curves: dict[str, Curve]) -> Any:
    figure, (left, right) = _panels(2)
    frontier = {name.removeprefix("frontier/"): curve for name, curve in curves.items() if name.startswith("frontier/")}
    _lines(left, frontier, ".-")
    left.set_title("cross entropy, nats")
    _log_scale(left)
    if "seq" in frontier:
        steps, sequential = frontier["seq"]
        for line, (name, (own_steps, values)) in zip(left.lines, frontier.items(), strict=True):
            if name != "seq" and np.array_equal(own_steps, steps):
                above = thinned((steps, values - sequential))
                right.plot(*above, ".-", linewidth=1.3, markersize=3, color=line.get_color())
    right.set_title("above the sequential pass, nats")
    right.set_yscale("symlog", linthresh=1e-3)
    return figure


def _draw_residuals(curves: dict[str, Curve]) -> Any:
    from matplotlib.colors import LogNorm

    names = sorted(name for name in curves if name.startswith("residual/"))
    steps = curves[names[0]][0]
    rows = [np.interp(steps, *curves[name]) for name in names]
    table = np.nan_to_num(np.array(rows), nan=1e1).clip(1e-4, 1e1)
    figure, (axis,) = _panels(1, 1.2 + 0.16 * len(names))
    axis.grid(False)
    image = axis.imshow(table, aspect="auto", origin="lower", norm=LogNorm(1e-4, 1e1), cmap="magma")
    places = np.unique(np.linspace(0, len(steps) - 1, min(10, len(steps))).round().astype(int))
    axis.set_xticks(places, [str(steps[place]) for place in places])
    axis.set_yticks(range(len(names)), [name.removeprefix("residual/") for name in names], fontsize=7)
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, pad=0.01)
    return figure


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    print(f"wrote {write_html(sys.argv[1])}")


if __name__ == "__main__":
    from snlp_jax.cli.entry import run_entry

    run_entry(main)
