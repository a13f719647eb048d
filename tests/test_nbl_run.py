"""The command from a trained run to a linearised one, which everything else then reads."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from tiny_run import random_run

from snlp_jax.cli.linearize import TABLE_NAME, Args, linearize_run, main
from snlp_jax.config import EvalConfig, LinearizeConfig, TrainConfig
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config, read_params
from snlp_jax.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Four layers of random weights; some ten thousand tokens of text."""
    return random_run(tmp_path_factory.mktemp("nbl") / "tiny")


FIT = "n=3,k=1,rank=2,init_rank=2,tokens=512"


@pytest.fixture(scope="module")
def linearised(run_dir):
    return make(run_dir, "made", {"calibrations": (f"c3:{FIT}",)}, attention=2, blocks=1)


def make(run_dir, name, args=None, **options):
    options = LinearizeConfig(**{"tokens": 2048, "batch_size": 16, **options})
    return linearize_run(Args(run_dir, options, out=str(run_dir.parent / name), **{"num_windows": 16, **(args or {})}))


def test_the_command_makes_a_run(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ["--attention", "2", "--mlp", "1", "--tokens", "2048", "--batch-size", "16", "--num-windows", "16", "--out"]
    monkeypatch.setattr(sys, "argv", ["linearize", str(run_dir), *flags, str(out)])
    main()
    said = capsys.readouterr().out
    assert "chosen 1" in said and "perplexity on 16 held-out windows" in said
    config = read_config(out)
    model = config.model
    assert len(model.linear_attention) == 2 and len(model.linear_mlp) == 1 and config.name == "out"
    told = json.loads((out / TABLE_NAME).read_text())
    (table,) = (each["table"] for each in told["rounds"])
    assert len(table) == 8 and {row["branch"] for row in table} == {"attention", "mlp"}
    by_rank = sorted((row for row in table if row["branch"] == "attention"), key=lambda row: row["held_out"])
    assert tuple(sorted(row["layer"] for row in by_rank[:2])) == model.linear_attention
    assert all(0 <= row["nmse"] <= 1 and row["nmse_residual"] <= row["cca_bound"] for row in table)
    with pytest.raises(InputError, match="--out"):
        main()


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


def test_greedy_choices_drops_and_chance(run_dir):
    greedy = make(run_dir, "greedy", attention=2, greedy=True, rank_by="cca", layers_at_once=3)
    told = json.loads((greedy / TABLE_NAME).read_text())
    assert [len(each["table"]) for each in told["rounds"]] == [4, 3]  # what remains, on the model so far
    dropped = make(run_dir, "dropped", attention=2, drop=True)
    one_shot = make(run_dir, "one_shot", attention=2, rank=3)
    ours, theirs = read_config(one_shot).model, read_config(dropped).model
    assert theirs.dropped_attention == ours.linear_attention and not theirs.linear_attention
    assert ours.linear_rank == 3 and read_params(one_shot, LanguageModel(ours), "best")[0] == 0
    further = make(one_shot, "further", attention=1, rank=3)
    assert set(read_config(further).model.linear_attention) > set(ours.linear_attention)
    with pytest.raises(InputError, match="which is 3"):
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
        (calibrated("c2:n=9"), "n=9"),
        (calibrated("c2:n=2,rank=0"), "rank=0"),
        (calibrated("c2:n=2", "c2:n=3"), "given 2 times"),
        (calibrated("c2:n=2,k=1,stage=1xF2"), "fuses layers"),
        (calibrated("c2:n=2,tokens=16"), "raise tokens="),
        ({"attention": 1, "args": {"num_windows": 0}}, "--num-windows"),
        ({"attention": 1, "args": {"mesh_data": 99}}, "99 devices"),
        ({"attention": 1, "batch_size": 4, "args": {"mesh_data": 8}}, "--batch-size"),
        ({"attention": 5}, "--attention is 5"),
        ({"attention": 3, "blocks": 2}, "besides the 2 of --blocks"),
        ({"blocks": 5}, "--blocks is 5"),
        ({"attention": 1, "rank": 33}, "--rank is 33"),
        ({"attention": 1, "tokens": 32}, "too few"),
        ({"attention": 1, "skip_first": 16}, "--skip-first"),
    )
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            make(run_dir, "never", **options)
    short = run_dir.parent / "short.jsonl"
    short.write_text('{"text": "a few words"}\n{"text": "and others"}\n')
    with pytest.raises(InputError, match="too few"):
        make(run_dir, "never", {"data": (str(short),)}, attention=1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="one process"):
        make(run_dir, "never", attention=1)
    assert not (run_dir.parent / "never").exists()
