"""The command from a trained run to a linearised one, which everything else then reads."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_run import FAST_COMPILE, ROOT, tiny

from benchmarks import pretrained
from snlp_jax.cli.linearize import TABLE_NAME, Args, linearize_run
from snlp_jax.config import EvalConfig, LinearizeConfig, TrainConfig
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.linearize import linearize
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config, read_params
from snlp_jax.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A trained model of four layers; some ten thousand tokens of text."""
    folder = tmp_path_factory.mktemp("nbl")
    train(tiny(folder / "tiny"))
    return folder / "tiny"


FIT = "n=3,k=1,rank=2,init_rank=2,tokens=512"


@pytest.fixture(scope="module")
def linearised(run_dir):
    return make(run_dir, "made", {"calibrations": (f"c3:{FIT}",)}, attention=2, blocks=1)


def make(run_dir, name, args=None, **options):
    options = LinearizeConfig(**{"tokens": 2048, "batch_size": 16, **options})
    return linearize_run(Args(run_dir, options, out=str(run_dir.parent / name), **{"num_windows": 16, **(args or {})}))


def test_the_command_makes_a_run(run_dir, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "snlp_jax.linearize", str(run_dir), "--attention", "2", "--mlp", "1"]
    command += ["--tokens", "2048", "--batch-size", "16", "--num-windows", "16", "--out", str(out)]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
    said = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "chosen 1" in said.stdout and "perplexity on 16 held-out windows" in said.stdout
    config = read_config(out)
    model = config.model
    assert len(model.linear_attention) == 2 and len(model.linear_mlp) == 1 and config.name == "out"
    told = json.loads((out / TABLE_NAME).read_text())
    (table,) = (each["table"] for each in told["rounds"])
    assert len(table) == 8 and {row["branch"] for row in table} == {"attention", "mlp"}
    by_rank = sorted((row for row in table if row["branch"] == "attention"), key=lambda row: row["held_out"])
    assert tuple(sorted(row["layer"] for row in by_rank[:2])) == model.linear_attention
    assert all(0 <= row["nmse"] <= 1 and row["nmse_residual"] <= row["cca_bound"] for row in table)
    again = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists and is not empty; name another directory with --out" in again.stderr


def test_a_linearised_run_is_evaluated_calibrated_and_decoded(linearised):
    """What the command has calibrated is found by name, and is what eval.py fits to the new run by the same text."""
    config = read_config(linearised)
    assert len(config.model.linear_attention) == 2 and len(config.model.linear_mlp) == 1
    told = json.loads((linearised / TABLE_NAME).read_text())
    assert told["calibrations"] == {"c3": {"setting": "cal:1-4,k=1,init=cal,fit=c3", "tokens": 512}}
    solvers = ("idn:n=3,k=1", told["calibrations"]["c3"]["setting"], "cal:n=3,k=1,init=cal,fit=again")
    evaluation = EvalConfig(solvers=solvers, calibrations=(f"again:{FIT}",))
    evaluation = dataclasses.replace(
        evaluation, num_windows=16, batch_size=16, greedy_tokens=4, greedy_prompts=1, timing_repeats=0
    )
    report = evaluate_run(linearised, dataclasses.replace(config, eval=evaluation))
    sequential, identity, calibrated, again = (result.ppl for result in report.results)
    # The same windows in another program, float32.
    assert sequential == pytest.approx(told["ppl"]["after"], rel=1e-5)
    assert calibrated == again and calibrated != identity  # the same statistics of the same text by the same programs
    model = LanguageModel(config.model)
    params = read_params(linearised, model, "best")[1]
    schedule = parse_schedule(solvers[1], 4)
    engine = Engine(model, params, schedule, fits=load_fits(linearised, params, [schedule]))
    (done,) = engine.generate([Request([1, 2, 3], max_new_tokens=4)])
    assert len(done.tokens) == 4


def test_statistics_over_devices_are_those_of_one(run_dir, monkeypatch):
    tables, sizes = [], []

    def spy(*args, mesh, **settings):
        sizes.append(mesh.shape["data"] if mesh else 1)
        return linearize(*args, mesh=mesh, **settings)

    monkeypatch.setattr("snlp_jax.cli.linearize.linearize", spy)
    for num_devices in (1, 4):
        made = make(run_dir, f"over{num_devices}", {"mesh_data": num_devices}, attention=1, ridge=0.1)
        told = json.loads((made / TABLE_NAME).read_text())
        tables.append([{name: row[name] for name in ("nmse", "held_out")} for row in told["rounds"][0]["table"]])
    assert sizes == [1, 4]
    for one, four in zip(*tables, strict=True):
        # Covariances are known to 1e-7 of their largest eigenvalue, at most 32 means; the ridge is 0.1 of a mean.
        assert four == pytest.approx(one, rel=1e-4)


def test_greedy_choices_drops_and_chance(run_dir):
    greedy = make(run_dir, "greedy", attention=2, greedy=True, rank_by="cca", layers_at_once=3)
    told = json.loads((greedy / TABLE_NAME).read_text())
    assert [len(each["table"]) for each in told["rounds"]] == [4, 3]  # what remains, on the model so far
    dropped = make(run_dir, "dropped", attention=2, drop=True)
    one_shot = make(run_dir, "one_shot", attention=2, rank=3)
    ours, theirs = read_config(one_shot).model, read_config(dropped).model
    assert theirs.dropped_attention == ours.linear_attention and not theirs.linear_attention
    assert ours.linear_rank == 3 and read_params(one_shot, LanguageModel(ours), "best")[0] == 0
    seeds = {
        read_config(make(run_dir, f"random{seed}", attention=2, drop=True, rank_by="random", seed=seed)).model
        for seed in range(3)
    }
    assert len({config.dropped_attention for config in seeds}) > 1
    further = make(one_shot, "further", attention=1, rank=3)
    assert set(read_config(further).model.linear_attention) > set(ours.linear_attention)
    with pytest.raises(InputError, match="the model has maps of rank 3 already"):
        make(one_shot, "no", attention=1)


def test_the_maps_alone_are_trained(linearised):
    """``train.trainable`` names them; every other parameter keeps its bits."""
    config = read_config(linearised)
    fields = {"num_steps": 3, "batch_size": 4, "eval_batches": 2, "log_every": 1}
    tuned = dataclasses.replace(
        config,
        name="tuned",
        run_dir=str(linearised.parent / "tuned"),
        train=TrainConfig(init_from=str(linearised), trainable="blocks/linear_.*", **fields),
    )
    train(tuned)
    model = LanguageModel(config.model)
    before, after = (read_params(path, model, "last")[1] for path in (linearised, tuned.run_path))
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (not np.array_equal(old, new)) == name.startswith("blocks/linear_"), name


def test_input_is_checked_before_anything_is_compiled(run_dir, monkeypatch):
    monkeypatch.setattr("snlp_jax.cli.linearize.read_params", lambda *_: pytest.fail("too late"))
    calibrated = lambda *texts: {"attention": 1, "args": {"calibrations": texts}}  # noqa: E731
    cases = (
        (calibrated("c2:n=9"), "calibration 'c2:n=9': n=9 is outside the model"),
        (calibrated("c2:n=2,rank=0"), "calibration 'c2:n=2,rank=0': rank=0 is less than 1"),
        (calibrated("c2:n=2", "c2:n=3"), "calibration 'c2' is given 2 times; give each a name of its own"),
        (calibrated("c2:n=2,k=1,stage=1xF2"), "calibration 'c2' fuses layers as trained"),
        (calibrated("c2:n=2,tokens=16"), "calibration takes batches of 32 windows of 16 tokens.*raise tokens="),
        ({"attention": 1, "args": {"num_windows": 0}}, "--num-windows is 0; it must be at least 1"),
        ({"attention": 1, "args": {"mesh_data": 99}}, "a mesh of 99 x 1 x 1 needs 99 devices, but there are 8"),
        ({"attention": 1, "batch_size": 4, "args": {"mesh_data": 8}}, "--batch-size is 4, but each of 8 devices takes"),
        ({"attention": 5}, "--attention is 5, but the model has 4 whole attentions; lower it"),
        ({"attention": 3, "blocks": 2}, "--attention is 3 besides the 2 of --blocks, but the model has 4 whole"),
        ({"blocks": 5}, "--blocks is 5, but the model has 4 whole blocks; lower it"),
        ({"attention": 1, "rank": 33}, "--rank is 33, but the model's width is 32"),
        ({"attention": 1, "tokens": 32}, "32 tokens are too few to fit maps of width 32; give at least 64"),
        ({"attention": 1, "skip_first": 16}, "--skip-first is 16, but windows have 16 tokens"),
    )
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            make(run_dir, "never", **options)
    short = run_dir.parent / "short.jsonl"
    short.write_text('{"text": "a few words"}\n{"text": "and others"}\n')
    with pytest.raises(InputError, match="0 tokens are too few to fit maps of width 32"):
        make(run_dir, "never", {"data": str(short)}, attention=1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="linearised by one process, but there are 2; .* with --mesh.data"):
        make(run_dir, "never", attention=1)
    assert not (run_dir.parent / "never").exists()


def test_the_benchmark_compares_methods(run_dir, tmp_path):
    """Sizes of seconds; the figures themselves mean nothing."""
    config = read_config(run_dir)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    args = pretrained.Args(run_dir, batch_size=8, distances=(8,), num_keys=4, quick=True, out=str(out), plot=str(plot))
    report = pretrained.main(args)
    assert json.loads(json.dumps(report)) == json.loads(out.read_text()) and plot.stat().st_size > 10_000
    assert report["failed"] == []
    rows = {row["name"]: row for row in report["methods"]}
    families = ["sequential", "nbl attention", "drop attention", "nbl block", "drop block"]
    families += ["nbl, ranking", "idn", "sid", "pairs", "skip", "cal", "cal tuned", "nbl + cal tuned"]
    assert list(dict.fromkeys(row["family"] for row in report["methods"])) == families
    assert rows["seq"]["ppl_change"] == 0 and rows["seq"]["retrieval"]["8"]["change"] == 0
    L, (m,) = config.model.num_layers, report["args"]["attention"]
    for row in rows.values():
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0 and 0 <= row["retrieval"]["absent"]["exact"] <= 1
    # All windows are shorter than the text: a layer's share of the cache is its window's, the others' bytes are gone.
    assert rows[f"nbl attention {m}"]["cache_bytes"] < rows["seq"]["cache_bytes"]
    assert rows[f"drop attention {m}"]["cache_bytes"] == rows[f"nbl attention {m}"]["cache_bytes"]
    # K = N is the sequential pass.
    assert L // 2 == 2 and rows["idn:n=2,k=2"]["ppl"] == pytest.approx(rows["seq"]["ppl"], rel=1e-5)
    with pytest.raises(InputError, match="--attention is 9, but the model has 4 whole attentions"):
        pretrained.main(dataclasses.replace(args, attention=(9,)))
