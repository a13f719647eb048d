"""What a controlled study says: summaries of its rows, markdown tables, a plot. Of benchmarks/study.py."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_config import Study

Row = dict[str, Any]


def best_setting(rows: Sequence[Row], settings: Sequence[str]) -> str:
    """The setting of the lowest mean PPL over the rows."""
    return min(settings, key=lambda text: statistics.mean(row["ppl"][text] for row in rows))


def summarise(study: Study, rows: Sequence[Row], stage: str) -> list[Row]:
    """One entry an arm: PPL of the sequential pass and at every depth, of each seed, and changes in percent.

    ``own`` is against the arm's own sequential pass, ``plain`` against that of its deep plain twin of the same seed.
    Plain models, whose FLOPs are the budget, stand in the stage ``flops`` as they do in ``steps``.
    """

    def is_plain(arm: str) -> bool:
        return arm in study.shallow or study.reference(arm) == arm

    def of_stage(arm: str) -> dict[int, Row]:
        name = "steps" if stage == "flops" and is_plain(arm) else stage
        return {row["seed"]: row for row in rows if (row["arm"], row["stage"]) == (arm, name) and row["ppl"]}

    summary = []
    for arm in (*study.arms, *study.shallow):
        mine, twins = of_stage(arm), of_stage(study.reference(arm))
        if not mine:
            continue
        entry: Row = {"arm": arm, "seeds": sorted(mine), "steps": next(iter(mine.values()))["steps"]}
        pairs = [(row, twins[seed]) for seed, row in mine.items() if seed in twins]
        entry["flops_ratio"] = (
            statistics.mean((row["flops"] / row["steps"]) / (twin["flops"] / twin["steps"]) for row, twin in pairs)
            if pairs
            else None
        )
        timed = [
            row["step_seconds"] / twin["step_seconds"]
            for row, twin in pairs
            if row["step_seconds"] and twin["step_seconds"]
        ]
        entry["time_ratio"] = statistics.mean(timed) if timed else None

        def passes(setting: str, mine: dict[int, Row] = mine, pairs: list[tuple[Row, Row]] = pairs) -> Row:
            change = lambda row, base: 100 * (row["ppl"][setting] / base["ppl"]["seq"] - 1)  # noqa: E731
            return {
                "setting": setting,
                "ppl": [row["ppl"][setting] for row in mine.values()],
                "own": [change(row, row) for row in mine.values()],
                "plain": [change(row, twin) for row, twin in pairs],
            }

        entry["seq"] = passes("seq")
        if arm in study.shallow:
            entry["num_block_params"] = next(iter(mine.values()))["num_block_params"]
            entry["depths"] = {str(study.shallow[arm]): entry["seq"]}
            entry["controls"] = {}
        else:
            every = list(mine.values())
            own = study.settings(study.config(arm))
            entry["depths"] = {str(d): passes(best_setting(every, texts)) for d, texts in own.items()}
            entry["controls"] = {str(d): [passes(text) for text in study.controls(d)] for d in study.depths}
        summary.append(entry)
    return summary


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean and, of several, the range."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):{form}}{unit}"
    return text + (f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else "")


def percent(values: Sequence[float]) -> str:
    return spread(values, "+.2f", " %")


def markdown(study: Study, summary: Sequence[Row], stage: str) -> str:
    """The tables of one stage."""
    titles = {"screen": "Screen", "steps": "Equal steps", "flops": "Equal FLOPs"}
    ratio = lambda value: "-" if value is None else f"{value:.2f}x"  # noqa: E731
    lines = [f"**{titles[stage]}.**", ""]
    header = ["arm", "seeds", "steps", "FLOPs a step", "time a step", "sequential PPL", "against plain"]
    header += [f"depth {depth}, against plain" for depth in study.depths]
    cells = []
    for entry in summary:
        line = [f"`{entry['arm']}`", str(len(entry["seeds"])), str(entry["steps"]), ratio(entry["flops_ratio"])]
        versus = "" if study.reference(entry["arm"]) == entry["arm"] else percent(entry["seq"]["plain"])
        line += [ratio(entry["time_ratio"]), spread(entry["seq"]["ppl"], ".3f"), versus]
        depths = [entry["depths"].get(str(depth)) for depth in study.depths]
        cells.append(line + ["" if best is None else percent(best["plain"]) for best in depths])
    lines += _table(header, cells)
    for depth in study.depths:
        cells = []
        for entry in summary:
            best = entry["depths"].get(str(depth))
            controls = entry["controls"].get(str(depth), [])
            for one in [best] * (best is not None) + [one for one in controls if one["setting"] != best["setting"]]:
                name = "" if one["setting"] == "seq" else f"`{one['setting']}`"
                own = "" if one["setting"] == "seq" else percent(one["own"])
                values = spread(one["ppl"], ".3f"), own, percent(one["plain"])
                cells.append((statistics.mean(one["ppl"]), [f"`{entry['arm']}`", name, *values]))
        header = ["arm", "setting", "PPL", "against own sequential", "against plain sequential"]
        ordered = [line for _, line in sorted(cells, key=lambda cell: cell[0])]
        lines += ["", f"Depth {depth} of {study.base.model.num_layers}:", "", *_table(header, ordered)]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def draw(study: Study, summaries: dict[str, list[Row]], path: Path) -> None:
    """PPL against the plain twin's sequential pass over depth: arms as lines, shallow twins as stars, seeds as bars."""
    try:
        import matplotlib
    except ImportError:
        print('no plot: it needs matplotlib, which `pip install "snlp-jax[plots]"` brings.', file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"screen": "screen, one seed", "steps": "equal steps", "flops": "equal FLOPs"}
    stages = [stage for stage in ("steps", "flops") if summaries.get(stage)] or ["screen"]
    figure, axes = plt.subplots(1, len(stages), figsize=(6.5 * len(stages), 5), squeeze=False, sharey=True)
    L = study.base.model.num_layers
    with_loss = [arm for arm in study.arms if study.reference(arm) != arm]
    shown = [arm for arm in with_loss if any(arm == entry["arm"] for stage in stages for entry in summaries[stage])]
    plain = iter(["o--", "s--", "v--"] * len(study.arms))
    styles: dict[str, dict[str, Any]] = {arm: {"fmt": "o-", "color": f"C{i % 10}"} for i, arm in enumerate(shown)}
    styles |= {arm: {"fmt": next(plain), "color": "gray"} for arm in study.arms if arm not in with_loss}
    styles |= {arm: {"fmt": "*", "color": "black", "ms": 12} for arm in study.shallow}
    framed = [0.0]
    for axis, stage in zip(axes[0], stages, strict=True):
        for entry in summaries[stage]:
            arm = entry["arm"]
            passes = {int(depth): one["plain"] for depth, one in entry["depths"].items()}
            if arm not in study.shallow:
                passes[L] = entry["seq"]["plain"]
            points = sorted((depth, values) for depth, values in passes.items() if values)
            if not points:
                continue
            means = [statistics.mean(values) for _, values in points]
            bars = [[mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]]
            bars += [[max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]]
            if arm in shown or arm in study.shallow:
                framed += [value for _, values in points for value in values]
            label = "shallow and wide" if arm in study.shallow else arm
            label = "" if label in axis.get_legend_handles_labels()[1] else label
            axis.errorbar([depth for depth, _ in points], means, yerr=bars, capsize=3, label=label, **styles[arm])
        axis.axhline(0, color="black", lw=0.5)
        axis.set(title=titles[stage], xlabel=f"dependent depth (sequential: {L})")
        axis.set_xticks(sorted((*study.depths, L)))
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("PPL against the plain model's sequential pass, %")
    margin = 0.08 * max(max(framed) - min(framed), 1.0)
    axes[0, 0].set_ylim(min(framed) - margin, max(framed) + margin)  # deep plain models may leave the frame
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
