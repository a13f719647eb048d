"""Evaluation: what is measured is what it is called, and the reports say so."""

import csv
import dataclasses
import json
import math
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from problems import random_params
from tiny_run import MODEL, random_run, tiny

import snlp_jax
from snlp_jax import memory
from snlp_jax.cli.evaluate import Args
from snlp_jax.config import Config, EvalConfig, MeshConfig, ModelConfig
from snlp_jax.data.pipeline import TokenData
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run, timing
from snlp_jax.eval.calibrations import fit_spec, load_fits, parse_calibration
from snlp_jax.eval.evaluate import default_solvers, evaluate, parse_settings
from snlp_jax.eval.fidelity import greedy_matches
from snlp_jax.eval.frontier import pareto_front
from snlp_jax.eval.perplexity import change_by_position, paired_interval, perplexity, relative_change, token_nll
from snlp_jax.eval.report import Report
from snlp_jax.forward import forward
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config

ROOT = Path(__file__).parent.parent
SMALL = dataclasses.replace(MODEL, num_layers=3)
SETTINGS = EvalConfig(
    solvers=("idn:n=2,k=2", "idn:0-1,k=1+sid:1-3,k=1"),
    num_bootstrap=200,
    greedy_tokens=0,  # see test_numbers_equal_a_direct_computation, and the script
    timing_repeats=0,  # two programs a setting; see the script
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SMALL)


@pytest.fixture(scope="module")
def params(model: LanguageModel) -> dict:
    return random_params(model)


@pytest.fixture(scope="module")
def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(MODEL.vocab_size, size=(3, 17), dtype=np.int32) for _ in range(2)]


@pytest.fixture(scope="module")
def report(model: LanguageModel, params: dict, batches: list[np.ndarray]) -> Report:
    return evaluate(model, params, batches, SETTINGS)


def test_exact_setting_changes_nothing_and_others_do(report: Report) -> None:
    sequential, exact, regions = report.results
    assert [result.setting for result in report.results] == ["seq", *SETTINGS.solvers]
    assert [result.depth for result in report.results] == [3, 3, 2]
    assert [result.num_block_evals for result in report.results] == [3, 5, 3]
    assert sequential.ppl_change == 0 and sequential.kl == 0 and sequential.top1 == 1
    # K = N is the sequential pass up to float32 rounding of batched against scanned products.
    assert abs(exact.ppl_change) < 1e-5 and exact.kl < 1e-6 and exact.top1 == 1
    assert exact.cosine == pytest.approx(1, abs=1e-5)
    assert regions.kl > 1e-3 and regions.cosine < 1 - 1e-4 and math.isfinite(regions.ppl)
    assert [len(norms) for norms in regions.residual_norms] == [1, 1], "one number an iteration, one row a region"
    assert exact.residual_norms[0][0] > 3 * exact.residual_norms[0][1]


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_rows_at_once(
    model: LanguageModel, params: dict, batches: list[np.ndarray], report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.TRACE_BYTES, "cpu", 1)
    for alone, together in zip(evaluate(model, params, batches, SETTINGS).results, report.results, strict=True):
        for name in ("ppl", "ppl_change", "kl", "top1", "state_error"):
            assert getattr(alone, name) == pytest.approx(getattr(together, name), rel=1e-4, abs=1e-6), name
        for one, other in zip(alone.residual_norms, together.residual_norms, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_setting_that_cannot_fit_is_refused_before_any_runs(
    model: LanguageModel, params: dict, batches: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"setting 'seq' on 3 windows of 16 tokens would take .*lower --seq-len"):
        evaluate(model, params, batches, SETTINGS)


def test_numbers_equal_a_direct_computation(
    model: LanguageModel, params: dict, batches: list[np.ndarray], report: Report
) -> None:
    windows = jnp.asarray(np.concatenate(batches))
    log_probs = jax.jit(lambda weights, tokens: jax.nn.log_softmax(forward(model, weights, tokens).logits_BTV))
    weights = [split(model, params, parse_schedule(text, 3)) for text in ("seq", SETTINGS.solvers[1])]
    p, q = (np.asarray(log_probs(each, windows[:, :-1]), np.float64) for each in weights)
    rows = np.arange(6)[:, None], np.arange(16)[None, :], np.asarray(windows[:, 1:])
    regions = report.results[2]
    # float32 logits summed in another order
    assert report.results[0].ppl == pytest.approx(math.exp(-p[rows].mean()), rel=1e-5)
    assert regions.ppl == pytest.approx(math.exp(-q[rows].mean()), rel=1e-5)
    assert regions.ppl_change == pytest.approx(regions.ppl / report.results[0].ppl - 1, abs=1e-6)
    assert regions.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert regions.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert sum(regions.nll_change_by_position) / 8 == pytest.approx((p[rows] - q[rows]).mean(), rel=1e-3)

    # Greedily, the fixed point of the parallel replacement equals writing one token after another, from any guess.
    tokens = np.asarray(windows[:, :-1])
    expected = tokens.copy()
    for position in range(13, 16):
        expected[:, position] = np.asarray(log_probs(weights[1], expected))[:, position - 1].argmax(-1)
    decode = make_greedy_fn(model, prompt_len=13, num_tokens=3)
    np.testing.assert_array_equal(decode(weights[1], tokens), expected[:, 13:])


def test_token_nll_and_perplexity() -> None:
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])
    nll = np.asarray(jax.jit(token_nll)(logits, np.asarray([[0, 2]])))
    np.testing.assert_allclose(nll, -np.log([[0.5, 0.8]]), rtol=1e-6)
    assert perplexity(nll) == pytest.approx(1 / math.sqrt(0.4))
    assert change_by_position(np.ones((2, 16)), np.zeros((2, 16)), num_bins=4) == (1, 1, 1, 1)


def test_paired_interval_covers_and_is_narrow() -> None:
    """Windows differ much more from each other than the passes do on any of them: pairing takes that out."""
    true_change, covered, widths, unpaired = 0.03, 0, [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        reference = rng.normal(2.0, 1.0, (64, 1)) + rng.normal(0, 0.1, (64, 32))
        nll = reference + math.log1p(true_change) + rng.normal(0, 0.2, (64, 32))
        low, high = paired_interval(nll, reference, num_bootstrap=300)
        covered += low <= true_change <= high
        widths.append(high - low)
        picks = rng.integers(64, size=(2, 300, 64))
        means = nll.mean(1)[picks[0]].mean(1) - reference.mean(1)[picks[1]].mean(1)
        unpaired.append(np.subtract(*np.quantile(means, [0.975, 0.025])))
        assert relative_change(nll, reference) == pytest.approx(np.expm1((nll - reference).mean()))
    assert covered >= 32, "a 95 % interval misses more than 8 of 40 with probability below 1e-3"
    assert np.mean(widths) < np.mean(unpaired) / 5
    assert paired_interval(np.ones((1, 4)), np.ones((1, 4)), num_bootstrap=10) is None


def test_greedy_matches() -> None:
    matches = greedy_matches(np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]]), np.asarray([[1, 2, 0, 4], [5, 6, 7, 8]]))
    assert (matches[-1].num_tokens, matches[-1].prefix_len, matches[-1].match_rate) == (4, 3.0, 7 / 8)


def test_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.5), (4.0, 1.0)]
    assert list(pareto_front(points)) == [True, True, False, False, True]


def test_report_files(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where nothing can draw; the script draws."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    paths, notice = report.write(tmp_path)
    by_suffix = {path.suffix: path for path in paths}
    assert set(by_suffix) == {".json", ".csv"} and "matplotlib" in notice
    saved = json.loads(by_suffix[".json"].read_text())
    assert saved["results"][2]["ppl"] == report.results[2].ppl
    assert len(list(csv.DictReader(by_suffix[".csv"].read_text().splitlines()))) == 3
    report.print()
    assert "Quality over 6 held-out windows of 16 tokens" in capsys.readouterr().out


def test_default_grid_and_bad_settings(model: LanguageModel, params: dict, batches: list[np.ndarray]) -> None:
    config = ModelConfig(num_layers=12)
    assert {"idn:n=8,k=1", "sid:n=8,k=2", "idn:n=8,k=1,init=batch_forward"} <= set(default_solvers(config))
    assert not any("sid" in text for text in default_solvers(dataclasses.replace(config, use_x0_resid=False)))
    assert len(parse_settings(config, EvalConfig())) == len(default_solvers(config)) + 1
    for solvers, expected in (
        (("idn:n=9,k=1",), "n=9"),
        (("nwt:n=2",), "nwt"),
        (("idn:n=2,k=0",), "k=0"),
        (("hcn:n=2",), "residual streams"),
    ):
        with pytest.raises(InputError, match=expected):
            evaluate(model, params, batches, dataclasses.replace(SETTINGS, solvers=solvers))
    for solvers, mesh, expected in (
        (("idn:n=2,k=1,stage=split",), MeshConfig(layer=2), "split stage"),
        (("idn:n=2,k=1",), MeshConfig(data=2), "eval.batch_size 3"),
    ):
        with pytest.raises(InputError, match=expected):
            evaluate(model, params, batches, dataclasses.replace(SETTINGS, solvers=solvers, mesh=mesh))


@pytest.mark.slow
def test_sharded_regions_are_measured(model: LanguageModel, params: dict, batches: list[np.ndarray]) -> None:
    config = dataclasses.replace(SETTINGS, solvers=("idn:n=2,k=1",), timing_repeats=0)
    alone = evaluate(model, params, batches, config).results[1]
    mesh = MeshConfig(data=3, layer=2)
    spread = evaluate(model, params, batches, dataclasses.replace(config, mesh=mesh, sequential="ring")).results[1]
    assert spread.ppl == pytest.approx(alone.ppl, rel=1e-5)
    assert spread.timing is None and spread.speedup is None


def test_every_field_is_a_flag_of_the_script() -> None:
    flags = ["runs/x", "--solvers", "seq", "--sequential", "ring", "--mesh.layer", "4", "--mesh.data", "2"]
    parsed = tyro.cli(Args, args=flags).eval
    assert parsed == EvalConfig(solvers=("seq",), sequential="ring", mesh=MeshConfig(layer=4, data=2))


SCRIPT_SOLVERS = ["idn:n=2,k=1", "cal:n=2,k=1,init=cal,fit=mine", "idn:n=3,tol=0.5", "idn:n=2,k=1,init=warm"]


def test_bad_calibrations(model: LanguageModel, params: dict) -> None:
    data = TokenData(ByteTokenizer(), np.zeros(1000, np.uint16), np.zeros(0, np.uint16), "hash")
    for text, keyword in (
        ("mine:n=2,kind=cubic", "kind=cubic"),
        ("mine:n=9", "n=9"),
        ("mine:n=2,init=warm", "init=warm"),
        ("mine:n=2,size=3", "size=3"),
        ("mine:n=2,tokens=1", "raise tokens="),
        ("mine:n=2,tune=-1", "tune=-1"),
        ("../mine:n=2,k=1,kind=scalar,init=h0,tokens=64", "letters, digits"),
    ):
        with pytest.raises(InputError, match=re.escape(keyword)):
            fit_spec(model, params, data, parse_calibration(text, 3))


@pytest.mark.slow
def test_an_unrolled_pass_that_takes_too_much_is_not_timed(
    model: LanguageModel, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "LIST_BYTES", 0)
    config, schedules = dataclasses.replace(SETTINGS, timing_repeats=1), [parse_schedule("idn:n=2,k=1", 3)]
    (found,) = timing.time_schedules(model, params, schedules, config)
    assert found.layout == "stack" and set(found.layout_medians_ms) == {"stack"} and found.median_ms > 0


@pytest.mark.slow
def test_a_run_is_evaluated_by_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config: Config = tiny(random_run(tmp_path / "run"))
    flags = ["--calibrations", "mine:n=2,k=1,rank=4,tokens=2048,init_rank=8"]
    flags += ["--solvers", *SCRIPT_SOLVERS, "--num-windows", "4", "--batch-size", "2", "--greedy-tokens", "4"]
    flags += ["--greedy-prompts", "2", "--greedy-prompt-len", "4", "--timing-repeats", "2", "--num-bootstrap", "50"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(sys, "argv", ["eval.py", str(config.run_path), *flags])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "idn:n=2,k=1" in output
    assert "eval.json" in output and "eval.png" in output
    saved = json.loads((config.run_path / "eval" / "eval.json").read_text())
    assert saved["info"]["step"] == 3
    assert [result["setting"] for result in saved["results"]] == ["seq", *SCRIPT_SOLVERS]
    assert all(result["timing"]["median_ms"] > 0 and result["speedup"] > 0 for result in saved["results"])
    assert saved["results"][0]["speedup"] == 1 and saved["results"][0]["timing"]["layout"] in ("stack", "list")

    # The calibration lies beside the checkpoint and is found by name; another checkpoint or region refuses it.
    assert (config.run_path / "calibrations" / "mine.npz").is_file()
    solver, model = parse_schedule("cal:n=2,k=1,fit=mine", 4), LanguageModel(config.model)
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpointer:
        _, params = checkpointer.restore_params(model.abstract_params(), "best")
    assert set(load_fits(config.run_path, params, [solver])) == {"mine"}
    with pytest.raises(InputError, match="another checkpoint"):
        load_fits(config.run_path, jax.tree.map(lambda leaf: leaf + 1, params), [solver])
    with pytest.raises(InputError, match="preheat"):
        its_fits = load_fits(config.run_path, params, [solver])
        split(model, params, parse_schedule("idn:n=2,k=1,init=preheat,fit=mine", 4), its_fits)
    with pytest.raises(InputError, match="layers 2-4"):
        load_fits(config.run_path, params, [parse_schedule("cal:n=3,k=1,fit=mine", 4)])

    flags = ["--diagnose", "--solvers", "idn:n=2,k=2", "cal:n=2,k=1,fit=mine", "skip:1-2"]
    monkeypatch.setattr(sys, "argv", ["eval.py", str(config.run_path), *flags])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert "diagnose.json" in capsys.readouterr().out
    (identity, calibrated) = json.loads((config.run_path / "eval" / "diagnose.json").read_text())["regions"]
    assert identity["setting"] == "idn:n=2" and calibrated["setting"] == "cal:n=2,fit=mine"
    for region in (identity, calibrated):
        assert np.shape(region["errors"]) == (3, 2) and np.shape(region["contractions"]) == (2,)
        assert max(region["errors"][-1]) < 1e-5 < region["errors"][1][1]  # float32 rounding of two layers
    assert (config.run_path / "eval" / "diagnose.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sys, "argv", ["eval.py", str(config.run_path), "--solvers", "idn:n=7,k=1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "outside the model" in capsys.readouterr().err


def test_a_run_is_loaded(tmp_path: Path) -> None:
    model, params, tokenizer, config = snlp_jax.load_run(random_run(tmp_path / "run"))
    assert model.config == config.model == MODEL and tokenizer.bos_id == ByteTokenizer.bos_id
    expected = random_params(LanguageModel(MODEL))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        snlp_jax.load_run(tmp_path / "run")


def test_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)
    config = tiny(tmp_path / "run")
    with pytest.raises(InputError, match="checkpoint"):
        evaluate_run(tmp_path / "run", config)
