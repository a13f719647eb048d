"""What kernels of eight bits cost a trained model in perplexity, in order and under the solver.

    python benchmarks/quantized.py runs/demo
    python benchmarks/quantized.py runs/demo --settings seq idn:n=8,k=2 --weight-calibration 16384 --num-windows 64

Forms of the weights (snlp_jax/quantize.py): those of the compute dtype, int8 without clipping, int8 clipped on training
text, float8 without clipping. Each is compared with the compute dtype under the same setting, on the same held-out
windows, by a paired bootstrap over windows: what the setting itself costs is no part of the change.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import header, out_path
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import WeightPrecision, check_weights
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import make_compare_fn
from snlp_jax.eval.perplexity import paired_interval, perplexity, relative_change
from snlp_jax.eval.run import open_run
from snlp_jax.eval.weights import prepare_all
from snlp_jax.io.files import atomic_write
from snlp_jax.run import quantized_params, read_config


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    """What training wrote."""
    settings: tuple[str, ...] = ()
    """Solver settings beside seq; by default the first of the run's eval.solvers."""
    weight_calibration: int = 65536
    """Tokens of training text on which the clipped form is clipped."""
    num_windows: int = 0
    """Held-out windows; 0 takes the run's number."""
    checkpoint: Literal["best", "last"] = "best"
    out: str = ""
    """A JSON file; by default benchmarks/results/quantized_DEVICE_DATE.json."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    report = measure(args)
    print_table(report)
    out = out_path(args.out, "quantized", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")


def measure(args: Args) -> dict[str, Any]:
    """The report; a cell for every form of the weights under every setting.

    Raises:
        InputError: no tokens to calibrate on, a number of windows below 0; see also
            :func:`snlp_jax.eval.run.open_run`.
    """
    check_weights("int8", args.weight_calibration)
    if args.weight_calibration == 0:
        raise InputError("weight_calibration is 0, but one of the forms is calibrated; give some tokens.")
    if args.num_windows < 0:
        raise InputError(f"num_windows is {args.num_windows}; give 0 for the run's own number, or more.")
    config = read_config(args.run_dir)
    its = config.eval
    solvers = ("seq", *(args.settings or its.solvers[:1]))
    changes: dict[str, Any] = {"solvers": solvers, "weights": "compute", "weight_calibration": 0}
    changes |= {"num_windows": args.num_windows or its.num_windows, "calibrations": ()}
    config = dataclasses.replace(config, eval=dataclasses.replace(its, **changes))
    run = open_run(args.run_dir, config, args.checkpoint)
    batch_size = min(config.eval.batch_size, config.eval.num_windows)
    sizes = {"batch_size": batch_size, "num_batches": config.eval.num_windows // batch_size}
    batches = held_out_batches(run.data, seq_len=config.model.seq_len, **sizes)
    weight_WT = np.concatenate([batch["weight"] for batch in batches]) if "weight" in batches[0] else None
    nll_fn, reference = make_compare_fn(run.model), {}
    report = header(config.model, vars(args) | {"run_dir": str(args.run_dir)}) | {"run": run.about}
    forms: list[tuple[str, WeightPrecision, int]] = [("compute", "compute", 0), ("int8", "int8", 0)]
    forms += [("int8 calibrated", "int8", args.weight_calibration), ("float8", "float8", 0)]
    for form, precision, calibration in forms:
        params = quantized_params(run.model, run.params, precision, calibration, run.data)
        shape: dict[str, Any] = {"num_tokens": batches[0]["tokens"].size, "layout": "stack", "fits": run.fits}
        laid_out = prepare_all(run.model, params, list(run.settings.values()), **shape)
        for setting, weights in zip(run.settings, laid_out, strict=True):
            found = [nll_fn(weights, batch["tokens"], batch.get("document"))[1].nll_BT for batch in batches]
            nll_WT = np.concatenate([np.asarray(nll_BT) for nll_BT in found])
            its_reference = reference.setdefault(setting, nll_WT)
            interval = paired_interval(
                nll_WT, its_reference, num_bootstrap=config.eval.num_bootstrap, weight_WT=weight_WT
            )
            cell = {"weights": form, "setting": setting, "ppl": perplexity(nll_WT, weight_WT)}
            cell |= {"ppl_change": relative_change(nll_WT, its_reference, weight_WT), "ppl_interval": interval}
            report["cells"].append(cell | {"num_bytes": weights.num_bytes, "num_windows": len(nll_WT)})
    return report


def print_table(report: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, title="kernels of eight bits beside the compute dtype, under the same setting")
    for name in ("setting", "weights", "MB", "PPL", "change (95 % interval)"):
        table.add_column(name, justify="left" if name in ("setting", "weights") else "right")
    for cell in sorted(report["cells"], key=lambda cell: cell["setting"] != "seq"):
        low, high = cell["ppl_interval"] or (float("nan"),) * 2
        change = f"{cell['ppl_change']:+.3%} ({low:+.3%} to {high:+.3%})" if cell["weights"] != "compute" else ""
        size = f"{cell['num_bytes'] / 1e6:.1f}"
        table.add_row(cell["setting"], cell["weights"], size, f"{cell['ppl']:.4f}", change)
    Console(width=110).print(table)


if __name__ == "__main__":
    run_entry(main)
