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
from snlp_jax.config import EvalConfig, SearchConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.search import measure, print_found, search_run, write_found
from snlp_jax.eval.search.measure import Prefill, Quality, interleave
from snlp_jax.eval.search.race import Sums
from snlp_jax.eval.search.record import verdict
from snlp_jax.eval.solver_file import SolverFile, read_solver_file, setting_of, with_settings, write_solver_file
from snlp_jax.linearize import About, fingerprint, save_calibration, stored_calibrations
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Calibration
from snlp_jax.train.loop import train
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


@pytest.mark.parametrize(
    ("content", "num_layers", "sentence"),
    (
        (FOUND.to_json(), 12, "is for a model of 4 layers, but this one has 12; search again"),
        ("{", 4, "is no solver file of format 1"),
        ("[]", 4, "is no solver file of format 1"),
        (json.dumps({"format": 2, "setting": "seq", "num_layers": 4}), 4, "is no solver file of format 1"),
        (json.dumps({"format": 1, "setting": "seq"}), 4, "is no solver file of format 1"),
        (json.dumps({"format": 1, "setting": "seq", "num_layers": 4, "rule": "none"}), 4, "is no solver file"),
        (json.dumps({"format": 1, "setting": "idn:n=9", "num_layers": 4}), 4, "solver setting 'idn:n=9'"),
        (json.dumps({"format": 1, "setting": "seq", "num_layers": 4, "speculate": "x"}), 4, "solver setting 'x'"),
    ),
)
def test_other_files_are_refused(tmp_path, content, num_layers, sentence):
    (tmp_path / "solver.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_solver_file("auto", num_layers, tmp_path)


def test_missing_files_say_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"holds no solver.json; make one with eval.py .* --search"):
        setting_of("auto", 4, tmp_path)
    with pytest.raises(InputError, match=r"solver file 'x.json' does not exist"):
        setting_of("x.json", 4, tmp_path)


def test_training_and_inference_read_it(run_dir, capsys):
    config = tiny(run_dir)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, solvers=("auto",)))
    with pytest.raises(InputError, match="holds no solver.json"):
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
    """Exact settings differ by rounding alone, weights leave tokens out, and a last batch that is not full is cut."""
    model = LanguageModel(MODEL)
    rng = np.random.default_rng(0)
    weight = np.zeros((5, 16))
    weight[:, :3] = 2.0
    windows = {"tokens": rng.integers(MODEL.vocab_size, size=(5, 17), dtype=np.int32), "weight": weight}
    quality = Quality(model, random_params(model), windows, 2, {})
    sums, made = quality.measure(parse_schedule("idn:n=2,k=2", 4), 0, 5)
    # float32 rounding of batched against scanned products, three tokens of weight 2
    np.testing.assert_allclose(sums.total_W, 0, atol=6e-5)
    np.testing.assert_allclose(sums.weight_W, 6)
    assert made == [2.0]
    part, _ = quality.measure(parse_schedule("idn:n=3,k=1", 4), 1, 2)
    whole, _ = quality.measure(parse_schedule("idn:n=3,k=1", 4), 0, 5)
    assert abs(part.total_W[0]) > 1e-3
    np.testing.assert_allclose(part.total_W, whole.total_W[1:2], rtol=1e-4)
    _, made = quality.measure(parse_schedule("idn:n=3,k=3,tol=0.9", 4), 0, 2)
    assert 1 <= made[0] < 3


def test_readings_are_interleaved(monkeypatch):
    seen = []
    readers = [lambda number, name=name: seen.append((name, number)) or ord(name) for name in "abc"]
    times = interleave(readers, 5)
    assert times.tolist() == [[97, 98, 99]] * 50  # readings of no time at all, ten times as often
    rounds = [[name for name, _ in seen[start : start + 3]] for start in range(6, len(seen), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len({*map(tuple, rounds)}) > 1
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
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
    return search_run(run_dir, config, SearchConfig(**settings))


@pytest.fixture
def made_up(monkeypatch):
    """Differences that are made up: ``change(schedule, is_fresh)``, for 16 windows to choose on and as many more."""

    def use(change):
        def measure(self, schedule, start, stop):
            rng = np.random.default_rng(start)
            means_W = np.asarray([change(schedule, index >= 16) for index in range(start, stop)])
            return Sums(means_W + 1e-5 * rng.standard_normal(stop - start), np.ones(stop - start)), []

        monkeypatch.setattr(Quality, "measure", measure)

    return use


def test_search_with_an_impossible_limit_stays_sequential(run_dir, made_up):
    made_up(lambda schedule, _: 0.001 * schedule.num_block_evals)
    found = search_of(run_dir, max_ppl_increase="0%")
    assert found.solver.setting == "seq" and found.winner.name == "seq"
    assert found.solver.measured["ppl_interval"] == [0.0, 0.0]
    assert found.solver.num_layers == 4 and found.solver.fingerprint
    assert verdict(found) == "Nothing faster keeps within at most 0 % of perplexity: the sequential pass stays."


def test_search_finds_the_shallowest_and_writes_it(run_dir, made_up):
    made_up(lambda schedule, _: 0.02 * (4 - schedule.depth))
    found = search_of(run_dir, max_ppl_increase="5%")
    assert found.winner.depth == 2 and found.solver.measured["sequential_depth"] == 4
    low, high = found.solver.measured["ppl_interval"]
    assert low < math.expm1(0.04) < high < 0.05
    paths, _ = write_found(found, run_dir)
    assert {path.name for path in paths} >= {"search.json", "search.csv", "solver.json"}
    assert read_solver_file("auto", 4, run_dir) == found.solver
    (run_dir / "solver.json").unlink()
    print_found(found)


def test_fresh_windows_may_refute_the_winner(run_dir, made_up):
    made_up(lambda schedule, is_fresh: 0.02 * (4 - schedule.depth) + (0.02 if is_fresh and schedule.depth < 3 else 0))
    found = search_of(run_dir, max_ppl_increase="5%")
    assert found.winner.depth == 3
    refuted = [row for row in found.rows if row.status == "refuted"]
    assert refuted and all(row.depth == 2 for row in refuted)


def test_search_times_what_predictions_cannot_tell_from_the_sequential_pass(run_dir, made_up, monkeypatch):
    """No sum of parts says that one setting is faster; it is predicted to be dearer than the sequential pass."""
    odd, place = "idn:n=3,k=2", 4

    def reader(self, candidate, layout="auto"):
        ms = 10.0 if candidate.is_lossless else 8.0 if candidate.name == odd else 10.1
        return lambda number: ms

    monkeypatch.setattr(Prefill, "reader", reader)
    monkeypatch.setattr(
        "snlp_jax.eval.search.run.choose_probes", lambda parts: [i for i in range(len(parts)) if i != place]
    )
    made_up(lambda schedule, _: 0.0)
    found = search_of(run_dir, objective="prefill")
    assert found.winner.name == odd and found.solver.measured["speedup"] == 1.25
    assert all(row.is_cost_measured for row in found.rows if row.status in ("winner", "passed"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ("decode", "prefill"))
def test_search_by_time(run_dir, objective):
    found = search_of(run_dir, objective=objective, max_ppl_increase="50%", region_sizes=(2, 4))
    measured = found.solver.measured
    assert measured["speedup"] > 0 and measured["speedup_quartiles"][0] <= measured["speedup_quartiles"][1]
    assert found.info["cost_model"]["ms"]["layer"] >= 0 and found.info["slack"] >= 0.05
    assert found.winner.is_cost_measured


@pytest.mark.slow
def test_script_searches_a_trained_run(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run")
    train(config)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))

    def script(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", str(config.run_path), *flags])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return capsys.readouterr().out

    sizes = ("--num-windows", "32", "--batch-size", "8")
    out = script("--search", "--objective", "depth", "--max-ppl-increase", "10%", "--max-iters", "2", *sizes)
    assert "solver.json" in out and "search.png" in out
    record = json.loads((config.run_path / "eval" / "search.json").read_text())
    winner = next(row for row in record["rows"] if row["status"] == "winner")
    file = json.loads((config.run_path / "solver.json").read_text())
    assert file["measured"]["step"] == 12 and file["measured"]["limit"] == pytest.approx(0.1)
    assert winner["depth"] < 4 and file["setting"] == winner["name"]
    assert file["measured"]["ppl_interval"][1] <= 0.1 and not math.isnan(file["measured"]["ppl_change"])
    flags = ("--timing-repeats", "0", "--greedy-tokens", "0", "--num-bootstrap", "50", *sizes)
    assert file["setting"] in script("--solvers", "auto", *flags)

    with pytest.raises(SystemExit):
        script("--search", "--diagnose")
    assert "different evaluations" in capsys.readouterr().err

    from benchmarks.search import Args as Benchmark
    from benchmarks.search import main

    search = SearchConfig(objective="depth", max_ppl_increase="10%", region_sizes=(2, 4), max_iters=1, tolerances=())
    report = main(Benchmark(config.run_path, search=search, num_windows=16, out=str(tmp_path / "out.json")))
    assert report["verdict"]["is_as_deep"]
    assert json.loads((tmp_path / "out.json").read_text())["grid"]["winner"] == report["verdict"]["grid_winner"]
