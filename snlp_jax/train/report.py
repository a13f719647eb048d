"""``report.html`` of a run: curves, frontier, residuals, config and circumstances in one file that asks for no other.

    python -m snlp_jax.train.report runs/demo

Training writes it at its end, and eval.py again once there is a frontier to show. Without matplotlib it holds tables.
"""

import base64
import dataclasses
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.config import Config
from snlp_jax.io.files import atomic_write, read_json
from snlp_jax.io.metrics import FILE_NAME, read_metrics
from snlp_jax.io.moved import read_saved
from snlp_jax.io.run_dir import flatten
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
SESSION_FIELDS = ("date", "first_step", "last_step", "seconds", "device", "num_devices", "jax", "commit")
COLUMNS = {"depth": "g", "ppl": ".4g", "ppl_change": "+.2%", "top1": ".2%"}
"""Numbers of a setting that are shown, and how."""
NO_PLOTS = 'No plots: they need matplotlib, which `pip install "snlp-jax[plots]"` brings.'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222b30; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left; color: #66727a }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e9eb }
"""

Records = list[dict[str, float]]
Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""
Curves = dict[str, Curve]


def write_html(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, from what lies there.

    Raises:
        InputError: the directory holds no run, or its metrics cannot be read.
    """
    run_dir = Path(run_dir)
    config = read_saved(run_dir)
    evaluation = read_json(run_dir / "eval" / "eval.json")
    page = make_html(config, read_metrics(run_dir / FILE_NAME), read_record(run_dir), evaluation)
    atomic_write(run_dir / REPORT_NAME, page.encode(errors="replace"))  # a damaged record may hold half a character
    return run_dir / REPORT_NAME


def make_html(config: Config, records: Records, record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The page. All text that is not this file's own is escaped."""
    curves = curves_of(records)
    under = lambda prefix: {n.removeprefix(prefix): curve for n, curve in curves.items() if n.startswith(prefix)}  # noqa: E731
    scalars = {name: curve for name, curve in sorted(curves.items()) if "/" not in name}
    losses = {name: curve for name, curve in scalars.items() if name not in RATES}
    held_out = {name: curve for name, curve in losses.items() if name.startswith("val_")}
    training = {name: curve for name, curve in losses.items() if name not in held_out}
    rates = {title: {"": curves[name]} for name, title in RATES.items() if name in curves}
    last = [(name, int(steps[-1]), f"{values[-1]:.5g}") for name, (steps, values) in scalars.items()]
    sessions = [[session.get(name, "") for name in SESSION_FIELDS] for session in record["sessions"]]
    sections = {
        "Summary": _table("", summary(config, curves, record)),
        "Loss": _plot({"training, a step's batch": training, "held out": held_out}, log=True),
        "Metrics": _table("Last values", last, head=("metric", "step", "value")),
        "Rates and memory": _plot(rates),
        "Frontier during training: held-out cross entropy of each solver setting, a few batches": _plot(
            {"": under("frontier/")}, log=True
        ),
        "Residual by layer: relative, of the trace after one iteration": _plot({"": under("residual/")}, log=True),
        "Evaluation": _evaluation_section(evaluation) if evaluation else "",
        "Config": _table(
            "Fields that differ from their defaults", changed_fields(config), ("field", "value", "default")
        ),
        "Sessions": _table("", sessions, head=SESSION_FIELDS),
    }
    name = html.escape(config.name)
    body = "\n".join(f"<h2>{title}</h2>\n{section}" for title, section in sections.items() if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n"
    )


# -- What is said ------------------------------------------------------------------------------------------------------


def curves_of(records: Records) -> Curves:
    """Metric -> its steps and values. Of a step that was written twice the later value counts."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        for name in record.keys() - {"step"}:
            values.setdefault(name, {})[int(record["step"])] = record[name]
    steps = {name: sorted(of_step) for name, of_step in values.items()}
    return {name: (np.array(steps[name]), np.array([values[name][s] for s in steps[name]])) for name in values}


def summary(config: Config, curves: Curves, record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was, in a few lines. ``record`` is its run.json, which older runs have not."""
    done = max((int(steps[-1]) for steps, _ in curves.values()), default=0)
    tokens = done * config.train.batch_size * config.model.seq_len
    seconds = sum(session.get("seconds", 0.0) for session in record["sessions"])
    flops = tokens * record.get("flops_per_token", 0)
    rows = [
        ("steps", f"{done} of {config.train.num_steps}"),
        ("tokens", f"{tokens:,}"),
        ("parameters", f"{record.get('num_params', 0):,}"),
        ("FLOPs", f"{flops:.3g}, of the sequential pass and its gradient alone"),
        ("wall time", f"{seconds:,.0f} s in {len(record['sessions'])} session(s)"),
    ]
    return rows if "num_params" in record else rows[:2]


def changed_fields(config: Config) -> list[tuple[str, str, str]]:
    """Field, value and default, of every field that is not at its default."""
    values, defaults = flatten(dataclasses.asdict(config)), flatten(dataclasses.asdict(Config()))
    return [
        (name, str(value), str(defaults.get(name))) for name, value in values.items() if value != defaults.get(name)
    ]


def thinned(curve: Curve, num_points: int = MAX_POINTS) -> Curve:
    """At most ``num_points`` points: means of equal parts. NaN is left out of a mean."""
    steps, values = curve
    if len(steps) <= num_points:
        return curve
    parts = [part[np.isfinite(part)] for part in np.array_split(values, num_points)]
    means = [part.mean() if part.size else np.nan for part in parts]
    return np.array([part[-1] for part in np.array_split(steps, num_points)]), np.array(means)


def _evaluation_section(evaluation: dict[str, Any]) -> str:
    try:
        return _evaluation_table(evaluation)
    except (TypeError, ValueError, AttributeError):
        return "<p>eval/eval.json is damaged; run eval.py again.</p>"


def _evaluation_table(evaluation: dict[str, Any]) -> str:
    form = lambda value, spec: "" if value is None else format(value, spec)  # noqa: E731
    rows = [
        [
            result.get("setting"),
            *(form(result.get(name), spec) for name, spec in COLUMNS.items()),
            " to ".join(form(bound, "+.2%") for bound in result.get("ppl_interval") or ()),
            form((result.get("timing") or {}).get("median_ms"), ".3g"),
        ]
        for result in evaluation.get("results", ())
    ]
    info = evaluation.get("info", {})
    title = (
        f"Checkpoint of step {info.get('step')}, {info.get('num_windows')} held-out windows of "
        f"{info.get('window_len')} tokens; ms a forward of {info.get('timing_batch')} x {info.get('timing_len')} "
        f"tokens on {info.get('device')}"
    )
    return _table(title, rows, head=("setting", "depth", "PPL", "change", "top-1", "95 % interval", "ms"))


# -- How it looks ------------------------------------------------------------------------------------------------------


def _table(caption: str, rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)  # noqa: E731
    lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def _plot(panels: dict[str, Curves], *, log: bool = False) -> str:
    """Curves over steps, a panel for each title, as an SVG inside of the page; a sentence where matplotlib is missing;
    nothing where there are no curves.

    As an image, and not as markup, so that names inside of one drawing cannot meet those of another.
    """
    if not any(panels.values()):
        return ""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return f"<p>{html.escape(NO_PLOTS)}</p>"
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "snlp"}):
        figure = Figure(figsize=(10.4, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for name, curve in curves.items():
                axis.plot(*thinned(curve), linewidth=1.3, marker="." if len(curve[0]) < 30 else "", label=name)
            if any(curves):
                axis.legend(frameon=False, fontsize=7, ncols=1 + len(curves) // 12)
            if log and curves and all((values > 0).all() for _, values in curves.values()):
                axis.set_yscale("log")
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("step")
            axis.grid(color="#e6e9eb", linewidth=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    print(f"wrote {write_html(sys.argv[1])}")


if __name__ == "__main__":
    from snlp_jax.cli.entry import run_entry

    run_entry(main)
