"""Which loss makes a model layer-parallel, at what price: arms x seeds at equal steps and at equal FLOPs.

    python benchmarks/study.py configs/study_cpu.py                     # screen, choose, train the finals, report
    python benchmarks/study.py configs/study_cpu.py --stage screen --arms none idn ce_k1
    python benchmarks/study.py configs/study_cpu.py --stage final --finalists ce_k1 idn
    python benchmarks/study.py configs/study_cpu.py --stage report      # what is finished so far

Every arm of a seed starts from the same parameters and sees the same batches in the same order; its twin is the same
model without auxiliary losses. Stages: ``screen`` trains every arm once and briefly and ranks them by the perplexity of
their best setting at the main depth; ``steps`` trains the best of them, their twins and shallower, wider plain models
of equal parameters for equal steps; ``flops`` trains the best for as many steps as the twin's FLOPs pay for (matrix
products of the traced steps, recomputation and optimizer included). ``final`` is both of those.

Runs go to runs/study/NAME/ARM-STAGE-SEED, with the finished row beside each; a queue that was stopped goes on where it
was. Prints markdown tables and writes benchmarks/results/NAME_DATE.json after every run, and a plot. The best setting
of a depth is chosen on the windows it is reported on, one for all seeds. Times are those of training, on whatever else
the machine was doing.
"""

import bisect
import dataclasses
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from benchmarks.study_config import Study, load_study, steps_within
from benchmarks.study_report import Row, best_setting, draw, markdown, summarise
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, from_json, to_json
from snlp_jax.errors import DivergedError, InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, Checkpointer
from snlp_jax.io.files import atomic_write
from snlp_jax.io.metrics import FILE_NAME, read_metrics
from snlp_jax.io.provenance import circumstances
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.train.flops import run_flops
from snlp_jax.train.loop import train
from snlp_jax.train.loss import start_step

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Args:
    config: tyro.conf.Positional[Path]
    """A file that binds ``study = Study(...)``."""
    stage: Literal["screen", "steps", "flops", "final", "all", "report"] = "all"
    arms: tuple[str, ...] = ()
    """Only these; shallow twins are named shallow_DEPTH."""
    finalists: tuple[str, ...] = ()
    """Instead of the best of the screen."""
    source: str = ""
    """Text instead of the study's: 'builtin', or a file, folder or glob."""
    workers: int = 0
    """Runs at a time, each with its share of the cores; 0: as the study says."""
    runs: Path = ROOT / "runs" / "study"
    out: Path = Path("")
    """Empty: benchmarks/results/NAME_DATE.json."""
    plot: str = ""
    """Empty: as the study says."""
    job: str = ""
    """What a worker is given: its run, as ARM:STAGE:SEED:STEPS."""
    cores: tuple[int, ...] = ()
    """And its cores."""


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    stage: str
    seed: int
    num_steps: int

    @property
    def label(self) -> str:
        return f"{self.arm}-{self.stage}-{self.seed}"


@dataclass(frozen=True)
class Place:
    """A study on this machine: where its runs and its text are."""

    study: Study
    folder: Path
    source: str

    def config(self, job: Job) -> Config:
        base = self.study.config(job.arm)
        return dataclasses.replace(
            base,
            name=job.label,
            run_dir=str(self.folder / job.label),
            data=dataclasses.replace(base.data, source=self.source, seed=job.seed),
            train=dataclasses.replace(base.train, num_steps=job.num_steps, seed=job.seed),
        )

    def row_path(self, job: Job) -> Path:
        return self.folder / f"{job.label}.json"

    def row(self, arm: str, stage: str, seed: int) -> Row | None:
        """The finished row of a run; None where there is none, or one of another config."""
        path = self.row_path(Job(arm, stage, seed, 0))
        if not path.is_file():
            return None
        row = json.loads(path.read_text())
        try:
            saved = from_json(json.dumps(row["config"]))
        except InputError:
            return None
        return row if saved == self.config(Job(arm, stage, seed, row["steps"])) else None

    def rows(self) -> list[Row]:
        """All finished rows of the study."""
        study = self.study
        keys = [(arm, "screen", study.screen_seed) for arm in study.arms]
        keys += [
            (arm, how, s) for how in ("steps", "flops") for arm in (*study.arms, *study.shallow) for s in study.seeds
        ]
        return [row for key in keys if (row := self.row(*key)) is not None]

    def equal_flops_steps(self, arm: str) -> int:
        """Steps of the arm that its plain twin's FLOPs pay for, with the first seed's draws of region sizes."""
        seed, num_steps = self.study.seeds[0], self.study.base.train.num_steps
        budget = run_flops(self.config(Job(self.study.reference(arm), "steps", seed, num_steps)))
        return steps_within(self.config(Job(arm, "flops", seed, num_steps)), budget)


# -- The queue ---------------------------------------------------------------------------------------------------------


def screen_jobs(study: Study) -> list[Job]:
    return [Job(arm, "screen", study.screen_seed, study.screen_steps) for arm in study.arms]


def final_jobs(place: Place, finalists: Sequence[str], stages: Sequence[str]) -> list[Job]:
    """Seed by seed, so that a queue that is stopped leaves whole seeds; shallow twins of other depths come last."""
    study, jobs = place.study, []
    num_steps = study.base.train.num_steps
    twins = dict.fromkeys((study.plain, *map(study.reference, finalists)))
    main = [arm for arm, depth in study.shallow.items() if depth == study.main_depth]
    at_equal_flops: dict[str, int] = {}
    if "flops" in stages:
        at_equal_flops = {arm: place.equal_flops_steps(arm) for arm in finalists}
        for arm, steps in at_equal_flops.items():
            print(f"at equal FLOPs: {arm} {steps} of {num_steps} steps", flush=True)
    for seed in study.seeds:
        if "steps" in stages:
            jobs += [Job(arm, "steps", seed, num_steps) for arm in dict.fromkeys((*twins, *main, *finalists))]
        jobs += [Job(arm, "flops", seed, steps) for arm, steps in at_equal_flops.items()]
    if "steps" in stages:
        jobs += [Job(arm, "steps", study.seeds[0], num_steps) for arm in study.shallow if arm not in main]
    return jobs


def ranking(study: Study, rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """(arm, best setting, its PPL) at the main depth, best first, of the arms with a loss that the screen finished."""
    found = []
    for row in rows:
        if row["stage"] == "screen" and study.reference(row["arm"]) != row["arm"] and row["ppl"]:
            best = best_setting([row], study.settings(study.config(row["arm"]))[study.main_depth])
            found.append((row["arm"], best, row["ppl"][best]))
    return sorted(found, key=lambda entry: entry[2])


def choose(place: Place, args: Args) -> tuple[str, ...]:
    """The arms that go on.

    Raises:
        InputError: the screen has finished none.
    """
    study = place.study
    named = args.finalists or study.finalists
    for arm in named:
        study.reference(arm)
    if named:
        return named
    order = ranking(study, place.rows())
    if not order:
        raise InputError("no arm of the screen has finished; run --stage screen first, or name --finalists.")
    missing = [arm for arm in study.arms if place.row(arm, "screen", study.screen_seed) is None]
    if missing:
        print(f"note: chosen without {', '.join(missing)}, which the screen has not finished.", file=sys.stderr)
    return tuple(arm for arm, *_ in order[: study.num_finalists])


class Stopped(Exception):
    """A signal ended a run before its last step."""


def measure(place: Place, job: Job) -> Row:
    """Train (or continue) one run and evaluate its last checkpoint.

    Raises:
        Stopped: a signal ended the training early; its checkpoint is saved.
    """
    config, study = place.config(job), place.study
    twin = dataclasses.replace(job, arm=study.reference(job.arm))
    flops = run_flops(config)
    row: Row = {"arm": job.arm, "stage": job.stage, "seed": job.seed, "steps": job.num_steps, "flops": flops}
    row["flops_ratio"] = flops / run_flops(place.config(twin))
    params = LanguageModel(config.model).abstract_params()
    matrices = num_params(params["blocks"]["attn"]) + num_params(params["blocks"]["mlp"])
    row |= {"num_params": num_params(params), "num_block_params": matrices, "ppl": {}}
    try:
        train(config, resume=True)
    except DivergedError as error:
        row["failed"] = str(error)
    else:
        with Checkpointer(config.run_path / CHECKPOINT_NAME, read_only=True) as checkpoints:
            if checkpoints.latest_step != job.num_steps:
                raise Stopped
        report = evaluate_run(config.run_path, config, "last")
        row["ppl"] = {result.setting: result.ppl for result in report.results}
        row |= {name: report.info[name] for name in ("corpus_hash", "tokenizer", "num_windows", "window_len")}
    row["step_seconds"] = step_seconds(config)
    row |= circumstances() | {"num_cores": len(my_cores()) or os.cpu_count(), "config": json.loads(to_json(config))}
    atomic_write(place.row_path(job), json.dumps(row, indent=1) + "\n")
    jax.clear_caches()  # no later run shares a program of this one
    return row


def step_seconds(config: Config) -> float | None:
    """Mean time of a step, compilation left out: the median of each phase, between two terms' starts, by its length."""
    num_steps, tokens = config.train.num_steps, config.train.batch_size * config.model.seq_len
    starts = sorted({0, *(start_step(term, num_steps) for term in config.loss.terms.values())} - {num_steps})
    phases: list[list[float]] = [[] for _ in starts]
    for record in read_metrics(config.run_path / FILE_NAME):
        if "tokens_per_s" in record:
            phases[bisect.bisect_right(starts, record["step"] - 1) - 1].append(tokens / record["tokens_per_s"])
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], num_steps], strict=True)]
    known = [(length, statistics.median(times)) for length, times in zip(lengths, phases, strict=True) if times]
    total = sum(length for length, _ in known)
    return sum(length * seconds for length, seconds in known) / total if total else None


def run_queue(place: Place, jobs: Sequence[Job], args: Args, workers: int, publish: Any) -> None:
    """Make the runs that are not finished, calling ``publish`` after each.

    Raises:
        Stopped: a signal ended it; what was trained is saved.
    """
    todo = [job for job in jobs if (place.row(job.arm, job.stage, job.seed) or {}).get("steps") != job.num_steps]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished", flush=True)

    def tell(job: Job) -> None:
        row = place.row(job.arm, job.stage, job.seed)
        done = "diverged" if row is None or not row["ppl"] else f"sequential PPL {row['ppl']['seq']:.3f}"
        print(f"{datetime.datetime.now():%H:%M:%S}  {job.label}: {job.num_steps} steps, {done}", flush=True)
        publish()

    place.folder.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        for job in todo:
            measure(place, job)
            tell(job)
        return
    run_workers(place, todo, args, workers, tell)


def my_cores() -> list[int]:
    """The cores that this process may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_workers(place: Place, todo: list[Job], args: Args, workers: int, tell: Any) -> None:
    """The same in processes of their own, ``workers`` at a time, each bound to its share of the cores."""
    cores = my_cores()
    shares = [tuple(cores[i::workers]) for i in range(workers)]
    waiting, running = list(todo), {}

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                slot = next(slot for slot in range(workers) if slot not in running)
                job = waiting.pop(0)
                running[slot] = job, start_worker(place, job, args, shares[slot])
            time.sleep(0.5)
            for slot, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    log = place.folder / f"{job.label}.log"
                    raise InputError(f"the run {job.label!r} stopped with code {process.returncode}; see {str(log)!r}.")
                tell(job)
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def start_worker(place: Place, job: Job, args: Args, cores: tuple[int, ...]) -> subprocess.Popen:
    text = ":".join(map(str, (job.arm, job.stage, job.seed, job.num_steps)))
    command = [sys.executable, __file__, str(args.config), "--job", text, "--runs", str(args.runs)]
    command += ["--source", place.source] + (["--cores", *map(str, cores)] if cores else [])
    with open(place.folder / f"{job.label}.log", "a") as log:  # a group of its own: Ctrl-C reaches it through us, once
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


# -- The script --------------------------------------------------------------------------------------------------------


def find_text(study: Study, source: str) -> str:
    """``data.source`` of the runs: ``source`` if given, else the study's text where it exists, else the builtin one."""
    if source:
        return source if source == "builtin" else str(Path(source).resolve())
    path = (ROOT / study.text).resolve()
    return str(path) if path.exists() else "builtin"


def text_name(study: Study, place: Place, source: str) -> str:
    """What the record calls the text."""
    if place.source == "builtin":
        return "builtin"
    return Path(source).name if source else study.text


def run(args: Args) -> Row:
    """The queue and its record."""
    study = load_study(args.config)
    place = Place(study, args.runs.resolve() / study.name, find_text(study, args.source))
    if args.job:
        if args.cores:
            os.sched_setaffinity(0, args.cores)  # before the backend counts its threads
        arm, stage, seed, steps = args.job.rsplit(":", 3)
        return measure(place, Job(arm, stage, int(seed), int(steps)))
    for arm in args.arms:
        study.config(arm)
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"{study.name}_{datetime.date.today()}.json"
    workers = args.workers or study.workers
    text = text_name(study, place, args.source)
    print(f"{study.name}: text {text}, {workers} run(s) at a time, {place.folder}", flush=True)
    record: Row = {"finalists": list(args.finalists)}
    about = circumstances()

    def publish() -> Row:
        rows = place.rows()
        summaries = {stage: summarise(study, rows, stage) for stage in ("screen", "steps", "flops")}
        if not any(row["stage"] == "flops" for row in rows):
            summaries["flops"] = []
        plan = dataclasses.asdict(study)
        plan["base"]["data"]["source"] = text
        shown = [{name: value for name, value in row.items() if name != "config"} for row in rows]
        order = [{"arm": arm, "setting": setting, "ppl": ppl} for arm, setting, ppl in ranking(study, rows)]
        record.update(about | {"text": text, "study": plan, "ranking": order, "summary": summaries, "rows": shown})
        atomic_write(out, json.dumps(record, indent=1) + "\n")
        return record

    def go(jobs: list[Job]) -> None:
        wanted = [job for job in jobs if not args.arms or job.arm in args.arms]
        run_queue(place, wanted, args, workers, publish)

    if args.stage in ("screen", "all") and not (args.finalists or study.finalists):
        go(screen_jobs(study))
    if args.stage in ("steps", "flops", "final", "all"):
        record["finalists"] = list(choose(place, args))
        print(f"finalists: {', '.join(record['finalists'])}", flush=True)
        stages = (args.stage,) if args.stage in ("steps", "flops") else ("steps", "flops")
        go(final_jobs(place, record["finalists"], stages))
    summaries = publish()["summary"]
    if not record["rows"]:
        raise InputError("no run of this study has finished; start it without --stage report.")
    for stage, summary in summaries.items():
        if summary:
            print(markdown(study, summary, stage))
    draw(study, summaries, ROOT / (args.plot or study.plot))
    print(f"wrote {out} and {args.plot or study.plot}")
    return record


def main() -> None:
    try:
        run(tyro.cli(Args, description=__doc__))
    except Stopped:
        sys.exit("stopped; what was trained is saved, and the same command goes on.")


if __name__ == "__main__":
    run_entry(main)
