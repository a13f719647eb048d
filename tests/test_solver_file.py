"""Solver files: what a search writes is what eval, infer and train read; and the search on a whole run."""

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from problems import random_params
from tiny_run import MODEL, random_run, tiny

from snlp_jax.cli.infer import Args, open_engine
from snlp_jax.config import EvalConfig, SearchConfig, to_json
from snlp_jax.errors import InputError
from snlp_jax.eval.search import Search, clock, search
from snlp_jax.eval.search.quality import Measured, Quality
from snlp_jax.eval.search.space import lines_of, lossless_of
from snlp_jax.eval.solver_file import SolverFile, read_solver_file, setting_of, with_settings, write_solver_file
from snlp_jax.eval.timing import interleave
from snlp_jax.linearize import About, fingerprint, save_calibration, stored_calibrations
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Calibration
from snlp_jax.train.observe import frontier_settings

ROOT = Path(__file__).parent.parent
FOUND = SolverFile("idn:n=3,k=2", 4, measured={"objective": "depth", "limit": 0.01, "ppl_interval": [0.0, 0.005]})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("search") / "run")


def test_file_comes_back_as_it_was(tmp_path):
    path = write_solver_file(tmp_path / "solver.json", FOUND)
    assert read_solver_file(str(path), 4, Path("elsewhere")) == FOUND
    assert read_solver_file("auto", 4, tmp_path) == FOUND
    assert setting_of("auto", 4, tmp_path) == setting_of(str(path), 4, tmp_path) == "idn:n=3,k=2"
    assert setting_of("sid:n=2", 4, tmp_path) == "sid:n=2"
    config = with_settings(EvalConfig(solvers=("sid:n=2", "auto")), 4, tmp_path)
    assert config.solvers == ("sid:n=2", "idn:n=3,k=2")


def test_other_files_are_refused(tmp_path):
    for content, num_layers, keyword in (
        (to_json(FOUND), 12, "4 layers"),
        ("{", 4, "format 1"),
        ("[]", 4, "format 1"),
        (json.dumps({"format": 2, "setting": "seq", "num_layers": 4}), 4, "format 1"),
        (json.dumps({"format": 1, "setting": "seq"}), 4, "format 1"),
        (json.dumps({"format": 1, "setting": "seq", "num_layers": 4, "rule": "none"}), 4, "format 1"),
        (json.dumps({"format": 1, "setting": "idn:n=9", "num_layers": 4}), 4, "idn:n=9"),
        (json.dumps({"format": 1, "setting": "seq", "num_layers": 4, "speculate": "x"}), 4, "'x'"),
        (json.dumps({"format": 1, "setting": "seq", "num_layers": 4, "draft_len": -1}), 4, "format 1"),
    ):
        (tmp_path / "solver.json").write_text(content)
        with pytest.raises(InputError, match=keyword):
            read_solver_file("auto", num_layers, tmp_path)
    for text, keyword in (("auto", "--search"), ("x.json", "x.json")):
        with pytest.raises(InputError, match=keyword):
            setting_of(text, 4, tmp_path / "empty")


def test_training_and_inference_read_it(run_dir, capsys):
    config = tiny(run_dir)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, solvers=("auto",)))
    with pytest.raises(InputError, match="no solver file"):
        frontier_settings(config)
    params = random_params(LanguageModel(MODEL))
    path = write_solver_file(run_dir / "solver.json", dataclasses.replace(FOUND, fingerprint=fingerprint(params)))
    assert list(frontier_settings(config)) == ["seq", "idn:n=3,k=2"]

    engine = open_engine(Args(run_dir, solver="auto"))
    assert engine.schedule == parse_schedule("idn:n=3,k=2", 4) and engine.rule == "per_iteration"
    assert "another checkpoint" not in capsys.readouterr().err
    assert open_engine(Args(run_dir, solver="auto", rule="refreshed")).rule == "refreshed", "what is given goes first"
    assert open_engine(Args(run_dir)).rule == "last_eval"

    other = run_dir / "other.json"
    write_solver_file(other, SolverFile("seq", 4, speculate="exit:2", draft_len=3, fingerprint="another"))
    engine = open_engine(Args(run_dir, solver=str(other)))
    assert engine.draft == parse_schedule("exit:2", 4) and engine.draft_len == 3 and engine.schedule.is_sequential
    assert "another checkpoint" in capsys.readouterr().err
    path.unlink()


def test_quality_is_paired_and_weighted():
    """Weights leave tokens out, a last batch that is not full is cut, and iterations that were made are counted."""
    model = LanguageModel(MODEL)
    rng = np.random.default_rng(0)
    weight = np.zeros((5, 16))
    weight[:, :3] = 2.0
    windows = {"tokens": rng.integers(MODEL.vocab_size, size=(5, 17), dtype=np.int32), "weight": weight}
    quality = Quality(model, random_params(model), windows, 2, {})
    stops = parse_schedule("idn:n=3,k=3,tol=0.9", 4)
    part, whole = quality.measure(stops, 1, 2), quality.measure(stops, 0, 5)
    assert abs(part.total_W[0]) > 1e-3
    np.testing.assert_allclose(part.total_W, whole.total_W[1:2], rtol=1e-4)
    np.testing.assert_allclose(whole.weight_W, 6)
    assert 1 <= part.iterations[0][0] == whole.iterations[0][1] < 3


def test_readings_are_interleaved():
    seen = []
    readers = [lambda number, name=name: seen.append((name, number)) or ord(name) for name in "abc"]
    times = interleave(readers, 5, least_seconds=1.0)
    assert times.tolist() == [[97, 98, 99]] * 50  # readings of no time at all, ten times as often
    rounds = [[name for name, _ in seen[start : start + 3]] for start in range(6, len(seen), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len({*map(tuple, rounds)}) > 1
    assert len(interleave(readers, 5)) == 5


def test_calibrations_of_the_checkpoint_are_found(tmp_path):
    about = About("scalar", 1, 4, 2, 64, 0, "mine", init="h0")
    fit = Calibration({"scale": np.ones(3)}, {})
    for name, its in (("a", about), ("b", dataclasses.replace(about, fingerprint="another"))):
        save_calibration(tmp_path, name, fit, its)
    (tmp_path / "calibrations" / "broken.npz").write_bytes(b"x")
    assert stored_calibrations(tmp_path, "mine") == {"a": about}
    assert stored_calibrations(tmp_path / "nowhere", "mine") == {}


def search_of(run_dir: Path, **fields):
    config = tiny(run_dir)
    config = dataclasses.replace(
        config, eval=EvalConfig(num_windows=16, batch_size=8, timing_repeats=3, greedy_prompt_len=4)
    )
    settings = {"search": True, "objective": "depth", "tolerances": (), "max_iters": 2} | fields
    return Search(run_dir, config, SearchConfig(**settings)).run()


def test_search_of_a_run_writes_what_it_finds(run_dir, monkeypatch):
    """On differences that are made up."""

    def measure(self, schedule, start, stop):
        d_W = 0.02 * (4 - schedule.depth) + 1e-5 * np.random.default_rng(start).standard_normal(stop - start)
        made = [np.full(stop - start, float(region.num_iters)) for region in schedule.regions]
        return Measured(d_W, np.ones(stop - start), made)

    monkeypatch.setattr(Quality, "measure", measure)
    found = search_of(run_dir, max_ppl_increase="5%")
    assert found.winner.depth == 2 and found.solver.measured["sequential_depth"] == 4
    low, high = found.solver.measured["ppl_interval"]
    assert low < math.expm1(0.04) < high < 0.05 and found.solver.fingerprint
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # the script draws
    paths, _ = found.write(run_dir)
    assert {path.name for path in paths} >= {"search.json", "search.csv", "solver.json"}
    assert read_solver_file("auto", 4, run_dir) == found.solver
    (run_dir / "solver.json").unlink()
    found.print()


@pytest.mark.slow
def test_search_for_decoding(run_dir, monkeypatch):
    """One setting and one drafter, each of which is an engine to compile."""
    monkeypatch.setattr(clock, "NEW_TOKENS", 8)
    monkeypatch.setattr(search, "lossless_of", lambda *args: lossless_of(*args)[:2])
    monkeypatch.setattr(search, "lines_of", lambda *args: lines_of(*args)[:1])
    found = search_of(run_dir, objective="decode", max_ppl_increase="50%", region_sizes=(4,), max_iters=1)
    measured = found.solver.measured
    assert measured["speedup"] > 0 and measured["speedup_quartiles"][0] <= measured["speedup_quartiles"][1]
    assert found.winner.ms > 0 and measured["twin"] in ("stack", "list")


@pytest.mark.slow
def test_script_searches_a_run(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))

    def script(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", str(run_dir), *flags])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return capsys.readouterr().out

    sizes = ("--num-windows", "32", "--batch-size", "8")
    flags = ("--objective", "prefill", "--max-ppl-increase", "50%", "--max-iters", "1", "--region-sizes", "2", "4")
    out = script("--search", *flags, *sizes)
    assert "solver.json" in out and "search.png" in out
    record = json.loads((run_dir / "eval" / "search.json").read_text())
    winner = next(row for row in record["rows"] if row["status"] == "winner")
    file = json.loads((run_dir / "solver.json").read_text())
    assert file["measured"]["step"] == 3 and file["measured"]["limit"] == pytest.approx(0.5)
    assert file["setting"] == winner["name"] and winner["ms"] > 0
    assert file["measured"]["ppl_interval"][1] <= 0.5 and not math.isnan(file["measured"]["ppl_change"])
    flags = ("--timing-repeats", "0", "--greedy-tokens", "0", "--num-bootstrap", "50", *sizes)
    assert file["setting"] in script("--solvers", "auto", *flags)

    with pytest.raises(SystemExit):
        script("--search", "--diagnose")
    assert "different evaluations" in capsys.readouterr().err
