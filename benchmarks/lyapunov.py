"""Does the growth of perturbations down the depth say how many iterations a region needs?

    python benchmarks/lyapunov.py --runs runs/demo runs/smollm2 --text 'wikipedia/*.txt'

The given runs and random models (twelve layers; output projections of three sizes; a skip path that shrinks); Identity
on a quarter, half and all of the layers from the end and half from the start, Jacobi on two of these, from ``h0``. For
each the largest Lyapunov exponent, the iterations until the output's relative error stays within a tolerance, and those
that docs/math.md, section 2, derives: from the exponent, from what the correction leaves of the same perturbations, and
from the norms. Prints a table at one tolerance and how far each prediction is off at all of them; writes
benchmarks/results/lyapunov_DEVICE_DATE.json after every model, and goes on from there when it is started again.
"""

import dataclasses
import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.machine import header, out_path, random_params
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.diagnose import RegionDiagnosis, diagnose, parallel_regions
from snlp_jax.eval.iterations import Predictions, iterations_needed, predict
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import load_run
from snlp_jax.types import Params

TOLERANCES = (0.1, 0.01, 0.001)
RANDOM = {
    "random, branches / 4": (0.25, 1.0),
    "random": (1.0, 1.0),
    "random, branches x 4": (4.0, 1.0),
    "random, skip path / 2": (1.0, 0.5),
}
"""Name -> factors of the output projections, and of the skip paths."""


@dataclass(frozen=True)
class Args:
    """Compare predicted iterations with those that are needed."""

    runs: tuple[Path, ...] = ()
    """Trained models, beside the random ones."""
    text: str = ""
    """Files of text for all models; empty: this repository's documentation."""
    num_windows: int = 2
    window_len: int = 64
    shown: float = 0.01
    """Tolerance of the table that is printed."""
    out: str = ""
    """Empty: benchmarks/results/lyapunov_DEVICE_DATE.json."""


def text_of(args: Args) -> str:
    """
    Raises:
        InputError: no file matches.
    """
    paths = sorted(glob.glob(args.text or str(Path(__file__).resolve().parents[1] / "docs" / "*.md")))
    if not paths:
        raise InputError(f"--text {args.text!r} matches no file; name some.")
    return "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)


def windows_of(tokenizer: Any, text: str, args: Args) -> np.ndarray:
    """[B, T] tokens from places spread evenly over the text, behind what the model's windows begin with."""
    prefix = tokenizer.special.prefix_ids if tokenizer.special.opens_windows else ()
    length = args.window_len - len(prefix)
    piece = 12 * args.window_len  # characters; more than the tokens need
    rows = []
    for window in range(args.num_windows):
        start = window * (len(text) - piece) // args.num_windows
        rows.append(
            np.concatenate([np.asarray(prefix, np.int32), tokenizer.encode(text[start : start + piece])[:length]])
        )
    if len({len(row) for row in rows}) > 1 or len(rows[0]) < args.window_len:
        raise InputError(f"the text gives windows shorter than --window-len {args.window_len}; give more text.")
    return np.stack(rows)


def random_model(factors: tuple[float, float]) -> tuple[LanguageModel, Params]:
    config = ModelConfig(num_layers=12, embed_dim=128, use_mid_subtract=False)
    model = LanguageModel(config, MachineConfig(compute_dtype="float32"))
    params = random_params(model)
    blocks, (branch, skip) = params["blocks"], factors
    for part, name in (("attn", "out"), ("mlp", "down")):
        blocks[part][name] = branch * blocks[part][name]
    blocks["resid_scale"] = skip * blocks["resid_scale"]
    return model, params


def models(args: Args, done: set[str]) -> Iterator[tuple[str, LanguageModel, Params, Any]]:
    """Name, model, parameters and tokenizer of what has not been measured yet, one at a time."""
    for path in args.runs:
        if path.name not in done:
            machine = MachineConfig(compute_dtype="float32")
            model, params, tokenizer, _ = load_run(path, machine=machine)
            yield path.name, model, params, tokenizer
    for name, factors in RANDOM.items():
        if name not in done:
            yield name, *random_model(factors), ByteTokenizer()


def settings_of(num_layers: int) -> list[str]:
    half, quarter = num_layers // 2, num_layers // 4
    identity = (f"n={quarter}", f"n={half}", f"n={num_layers}", f"0-{half}")
    return [f"idn:{place}" for place in identity] + [f"jac:n={half}", f"jac:n={num_layers}"]


def row_of(region: RegionDiagnosis) -> dict[str, Any]:
    output = [errors[-1] for errors in region.errors]
    counts = {}
    for tolerance in TOLERANCES:
        predicted = predict(region.errors[0], region.gains, region.contractions, tolerance)
        counts[str(tolerance)] = {"needed": iterations_needed(output, tolerance), **vars(predicted)}
    growth, left = np.asarray(region.gains.log_growth), np.asarray(region.gains.left)
    norms = {"spectral_norm": region.spectral_norms, "contraction": region.contractions}
    return {
        "setting": region.setting,
        "num_layers": len(region.layers),
        "exponent": region.exponent,
        "growth_range": [float(growth.min()), float(growth.max())],
        "left": float(np.exp(np.log(np.maximum(left, 1e-30)).mean())),
        **{name: float(np.median(values)) for name, values in norms.items()},
        "output_errors": output,
        "counts": counts,
    }


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(cells: list[dict[str, Any]]) -> str:
    """How far the predictions are off, over all regions and tolerances that take more than no iteration."""
    columns = ("correction", "prediction", "cases", "exact", "within 1", "predicted less needed: mean", "least", "most")
    rows = []
    for correction in ("idn", "jac"):
        regions = [row for cell in cells for row in cell["regions"] if row["setting"].startswith(correction)]
        counts = [each for row in regions for each in row["counts"].values() if each["needed"]]
        for name in (field.name for field in dataclasses.fields(Predictions)):
            off = np.asarray([each[name] - each["needed"] for each in counts])
            shares = [f"{100 * np.mean(np.abs(off) <= most):.0f} %" for most in (0, 1)]
            numbers = (f"{off.mean():+.1f}", f"{off.min():+d}", f"{off.max():+d}")
            rows.append((f"`{correction}`", name.replace("_", " "), str(len(off)), *shares, *numbers))
    return markdown(columns, rows)


def shown(cells: list[dict[str, Any]], tolerance: float) -> str:
    columns = ("model", "region", "exponent", "left", "norm left", "needed", "by exponent", "by left", "by norms")
    rows = []
    for cell in cells:
        for row in cell["regions"]:
            numbers = (f"{row['exponent']:+.3f}", f"{row['left']:.2f}", f"{row['contraction']:.1f}")
            counts = map(str, row["counts"][str(tolerance)].values())
            rows.append((cell["name"], f"`{row['setting']}`", *numbers, *counts))
    return markdown(columns, rows)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.shown not in TOLERANCES:
        raise InputError(f"--shown is {args.shown}; choose one of {', '.join(map(str, TOLERANCES))}.")
    asked = {"text": Path(args.text).name, "num_windows": args.num_windows, "window_len": args.window_len}
    report = header(ModelConfig(num_layers=12), asked)
    out, text = out_path(args.out, "lyapunov", report), text_of(args)
    if out.is_file():
        saved = json.loads(out.read_text())
        if saved["args"] != asked:
            raise InputError(f"{str(out)!r} holds another study; remove it or name another file by --out.")
        report["cells"] = saved["cells"]
    for name, model, params, tokenizer in models(args, {cell["name"] for cell in report["cells"]}):
        tokens_BT = windows_of(tokenizer, text, args)
        settings = {
            text: parse_schedule(f"{text},k=1", model.config.num_layers)
            for text in settings_of(model.config.num_layers)
        }
        found = diagnose(model, params, tokens_BT, parallel_regions(settings))
        cell = {"name": name, "num_layers": model.config.num_layers, "exponent": found.exponent}
        report["cells"].append(cell | {"regions": [row_of(region) for region in found.regions]})
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        print(f"{name}: exponent {found.exponent:+.3f} a layer", flush=True)
        del model, params
        jax.clear_caches()
    print(f"\n{shown(report['cells'], args.shown)}\n\n{summary(report['cells'])}\n\nwrote {out}")


if __name__ == "__main__":
    run_entry(main)
