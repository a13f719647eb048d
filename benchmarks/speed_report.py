"""Tables and the plot of benchmarks/speed.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Column, Table

_NUMBERS = {
    "median_ms": "median ms",
    "quartiles": "quartiles",
    "min_ms": "min",
    "speedup": "speed-up",
    "of_min": "of the minima",
    "fraction_of_copy": "of copy",
    "fraction_of_matmul": "of matmul",
    "mfu": "MFU",
    "kernels": "kernels",
    "peak_bytes": "peak MB",
    "compile_s": "compile s",
}


def title_of(cell: dict[str, Any]) -> str:
    """One line that names a cell."""
    words = f"{cell['kind']}, {cell['shape']}, {cell['dtype']}, batch {cell['batch']}, {cell['length']} tokens"
    words += f" after {cell['context']}" if cell["context"] else ""
    words += ", attention in one kernel" if cell["decode_attention"] == "pallas" else ""
    return words + (f", command buffers {cell['command_buffers']}" if cell["command_buffers"] != "default" else "")


def rows_of(cell: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The cells of a table, as text."""
    for job in cell["jobs"]:
        row = {"setting": job["setting"], "form": job["layout"] + ("*" if job["memory"] == "chosen" else "")}
        row["median_ms"], row["min_ms"] = (f"{job[name]:.3f}" for name in ("median_ms", "min_ms"))
        row["quartiles"] = f"{job['lower_quartile_ms']:.3f}-{job['upper_quartile_ms']:.3f}"
        if job.get("speedup") is not None:
            row["speedup"] = f"{job['speedup']:.2f}x"
            row["of_min"] = f"{job['speedup_of_min']:.2f}x"
        for name in ("fraction_of_copy", "fraction_of_matmul", "mfu"):
            if job.get(name):
                row[name] = f"{job[name]:.0%}"
        if job.get("peak_bytes") is not None:
            row |= {"peak_bytes": f"{job['peak_bytes'] / 1e6:.0f}", "compile_s": f"{job['compile_s']:.1f}"}
        if job.get("kernels") is not None:
            row["kernels"] = str(job["kernels"])
        yield row


def terminal_table(cell: dict[str, Any]) -> Table:
    rows = list(rows_of(cell))
    used = {name: title for name, title in _NUMBERS.items() if any(name in row for row in rows)}
    columns = (Column(title, justify="right") for title in used.values())
    table = Table("setting", "form", *columns, title=title_of(cell), padding=(0, 0))
    for row in rows:
        table.add_row(row["setting"], row["form"], *(row.get(name, "-") for name in used))
    return table


def leaders(cells: list[dict[str, Any]]) -> Iterator[tuple[str, float, dict[str, tuple[float, str]]]]:
    """Of every cell with a twin, over all command buffers: its name, the median of the fastest sequential form, and of
    every setting that of its fastest with the form it had."""
    names = ("kind", "shape", "dtype", "batch", "length", "context", "decode_attention")
    by_key: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        by_key.setdefault(tuple(cell[name] for name in names), []).append(cell)
    for same in by_key.values():
        best: dict[str, tuple[float, str]] = {}
        for cell in same:
            for job, row in zip(cell["jobs"], rows_of(cell), strict=True):
                form = f"{row['form']}, command buffers {cell['command_buffers']}"
                best[job["setting"]] = min(best.get(job["setting"], (float("inf"), "")), (job["median_ms"], form))
        if "seq" in best and len(best) > 1:
            yield title_of(same[0] | {"command_buffers": "default"}), best.pop("seq")[0], best


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    device, lines = report["device"], []
    load = [f"{report['load_average'].get(end, 0):.1f}" for end in ("start", "end")]
    lines += [f"# Speed on {device['kind']}", ""]
    lines += [f"{report['date']}, commit {report['commit']}, jax {report['versions']['jax']};"]
    lines += [f"{device['num_cores']} host cores under a load of {load[0]} to {load[1]}. Medians of interleaved"]
    lines += ["rounds; speed-up against the fastest sequential form of the cell. A star: XLA chose how weights lie in"]
    lines += ["memory."]
    for dtype, limit in report["limits"].items():
        rates = f"{limit['copy_bytes_per_s'] / 1e9:.1f} GB/s copied, {limit['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s"
        lines += ["", f"Limits, {dtype}: {rates}."]
    if any(cell["command_buffers"] != "default" for cell in report["cells"]):
        lines += ["", "## Against the fastest sequential form under any command buffers", ""]
        lines += ["| cell | sequential ms | setting | ms | speed-up | form |", "|---|---|---|---|---|---|"]
        for title, twin, best in leaders(report["cells"]):
            for setting, (ms, form) in best.items():
                lines += [f"| {title} | {twin:.3f} | `{setting}` | {ms:.3f} | {twin / ms:.2f}x | {form} |"]
    for cell in report["cells"]:
        rows = list(rows_of(cell))
        used = {name: title for name, title in _NUMBERS.items() if any(name in row for row in rows)}
        lines += ["", f"## {title_of(cell)}", "", "| setting | form | " + " | ".join(used.values()) + " |"]
        lines += ["|" + "---|" * (2 + len(used))]
        for row in rows:
            lines += [f"| `{row['setting']}` | {row['form']} | " + " | ".join(row.get(n, "") for n in used) + " |"]
    if report["skipped"] or report["failed"]:
        lines += ["", "## Not measured", ""]
        lines += ["- " + ", ".join(f"{k} {v}" for k, v in row.items()) for row in report["skipped"] + report["failed"]]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], out: Path) -> bool:
    """Bars of the speed-ups of every cell with a twin, and of the parts' times; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(title, {s: twin / ms for s, (ms, _) in best.items()}) for title, twin, best in leaders(report["cells"])]
    parts = [
        (title_of(cell) + ", ms", {job["setting"]: job["median_ms"] for job in cell["jobs"]})
        for cell in report["cells"]
        if cell["kind"] == "parts"
    ]
    if not bars + parts:
        return False
    sizes = [len(values) for _, values in bars + parts]
    figure, axes = plt.subplots(
        len(sizes),
        1,
        figsize=(8, 0.3 * sum(sizes) + 0.8 * len(sizes)),
        gridspec_kw={"height_ratios": sizes},
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, values) in zip(axes[:, 0], bars + parts, strict=True):
        axis.barh(list(values), list(values.values()), color="#4477aa")
        axis.bar_label(axis.containers[0], fmt="%.2f", fontsize=7, padding=2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        if (title, values) in bars:
            axis.axvline(1.0, color="black", linewidth=0.8)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return True
