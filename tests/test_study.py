"""The controlled study: its arms, its budgets, its queue and what it reports."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import benchmarks.study as script
from benchmarks.study import Args, Job, Place, Stopped, ranking, run, step_seconds
from benchmarks.study_config import load_study, steps_within, widened
from snlp_jax.config import Config, LossConfig, ModelConfig, TrainConfig
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.notation import parse_schedule
from snlp_jax.train import flops
from snlp_jax.train.loss import Plan, make_plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.glob("study_*.py"))
TERM = {"weight": 1.0, "region_sizes": (2,), "ramp_fraction": 0.0}
FILE = """
from benchmarks.study_config import Study
from snlp_jax.config import *
study = Study(
    base=Config(
        name="study_tiny",
        model=ModelConfig(
            num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, seq_len=8,
            use_x0_resid=False, use_value_embeds=False, use_smear=False, use_mid_subtract=False,
        ),
        data=DataConfig(cache_dir={cache!r}),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(num_steps=4, batch_size=2, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=1),
        eval=EvalConfig(num_windows=2, batch_size=2, num_bootstrap=2, timing_repeats=0, greedy_tokens=0),
    ),
    arms={{"none": {{}}, "ce": {{"loss": {{"solver_ce": {term}}}}}, "skip": {{"loss": {{"layer_skip": {term}}}}}}},
    depths=(1,), main_depth=1, iterations=(1,), screen_steps=2, seeds=(0, 1), num_finalists=1,
)
"""


@pytest.fixture
def tiny(tmp_path):
    """A study of two layers and two losses on a text of its own."""
    words = np.random.default_rng(0).choice(["layer", "depth", "token", "state"], (50, 40))
    (tmp_path / "text.txt").write_text("\n\n".join(map(" ".join, words)) * 10)
    (tmp_path / "study_tiny.py").write_text(FILE.format(cache=str(tmp_path / "cache"), term=TERM))
    text, out, plot = (str(tmp_path / name) for name in ("text.txt", "out.json", "plot.png"))
    return Args(tmp_path / "study_tiny.py", source=text, runs=tmp_path / "runs", out=Path(out), plot=plot)


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time: the PPL of a setting is made up, an arm in ``stop_at`` is interrupted."""
    made: list[str] = []
    stop_at: set[str] = set()

    def measure(place: Place, job: Job) -> dict:
        if job.label in stop_at:
            raise Stopped
        made.append(job.label)
        config = place.config(job)
        level = {"none": 10.0, "ce": 11.0, "skip": 12.0}.get(job.arm, 9.0) + job.seed
        gain = {"ce": 1.5, "skip": 1.2}.get(job.arm, 2.0)
        ppl = {text: level * gain for text in config.eval.solvers} | {"seq": level}
        row = {"arm": job.arm, "stage": job.stage, "seed": job.seed, "steps": job.num_steps, "ppl": ppl}
        row |= {"flops": 2.0 * job.num_steps * (1 + (job.arm == "ce")), "num_block_params": 1}
        row |= {"step_seconds": 0.5, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
        atomic_write(place.row_path(job), json.dumps(row))
        return row

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "draw", lambda *_: None)
    return made, stop_at


def test_config_files_hold_what_their_settings_need():
    for path in FILES:
        study = load_study(path)
        assert study.name == path.stem
        L = study.base.model.num_layers
        for arm in study.arms:
            config = study.config(arm)
            for depth, texts in study.settings(config).items():
                settings = (*texts, *study.controls(depth))
                assert texts and all(parse_schedule(text, L).depth == depth for text in settings)
            for term in config.loss.terms.values():  # trained where it is measured
                assert L - term.region_sizes[-1] + getattr(term, "num_iters", 1) == study.main_depth
            twin = study.config(study.reference(arm))
            assert not twin.loss.terms and dataclasses.replace(config, loss=twin.loss, eval=twin.eval) == twin


def test_the_shallow_twins_have_as_many_parameters():
    study = load_study(CONFIGS / "study_cpu.py")
    count = lambda params: num_params(params["attn"]) + num_params(params["mlp"])  # noqa: E731
    deep = count(LanguageModel(study.base.model).abstract_params()["blocks"])
    assert set(study.shallow.values()) == set(study.depths)
    for arm, depth in study.shallow.items():
        config = study.config(arm)
        assert config.model.num_layers == depth and config.eval.solvers == ("seq",)
        assert config.model.head_dim % study.head_multiple == 0
        shallow = count(LanguageModel(config.model).abstract_params()["blocks"])
        assert abs(math.log(shallow / deep)) < 0.05


def test_widening_keeps_groups_of_query_heads():
    model = ModelConfig(num_layers=12, embed_dim=128, num_heads=4, num_kv_heads=2)
    wide = widened(model, 3)
    assert (wide.embed_dim, wide.num_heads, wide.num_kv_heads) == (256, 8, 4)


def test_a_late_term_is_counted_from_its_start(monkeypatch):
    """Plain steps cost 2, steps with the term 5: F(N) = 2 N + 3 (N - start(N))."""
    monkeypatch.setattr(flops, "step_flops", lambda _, plan: 5.0 if plan.sizes else 2.0)
    late = LossConfig(**{"solver_ce": dataclasses.replace(LossConfig().solver_ce, **TERM, start_fraction=0.6)})
    config = Config(loss=late, train=TrainConfig(num_steps=100))
    assert flops.run_flops(config) == 2 * 60 + 5 * 40
    steps = steps_within(config, 200.0)
    fewer, more = (dataclasses.replace(config, train=TrainConfig(num_steps=n)) for n in (steps, steps + 1))
    assert flops.run_flops(fewer) <= 200 < flops.run_flops(more)
    constant = dataclasses.replace(config, loss=dataclasses.replace(late, solver_ce=_from_start(late)))
    assert steps_within(constant, 200.0) == 40  # floor(budget / cost of a step)
    assert steps_within(constant, 1e9) == 100
    assert steps_within(dataclasses.replace(config, loss=LossConfig()), 200.0) == 100


def _from_start(loss: LossConfig):
    return dataclasses.replace(loss.solver_ce, start_fraction=0.0)


def test_traced_flops_of_a_plain_step():
    """Forward 2, backward 4 FLOPs a weight and token; Newton-Schulz and attention come on top, which one more batch
    row isolates from the optimizer."""
    model = ModelConfig(
        vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, seq_len=8, use_x0_resid=False,
        use_value_embeds=False, use_smear=False, use_mid_subtract=False, remat=False,
    )  # fmt: skip
    of = lambda rows: flops.step_flops(Config(model=model, train=TrainConfig(batch_size=rows)), Plan())  # noqa: E731
    D, L, T, V = 16, 2, 8, 64
    weights = L * 12 * D * D + V * D
    attention = of(2) - of(1) - 6.0 * weights * T
    # Scores and mixing, 2 T^2 D FLOPs each in the forward pass; the backward pass has twice that, and may recompute.
    assert 3 <= attention / (L * 4 * T * T * D) <= 4.5


def test_the_draws_of_sampled_sizes_are_counted():
    sampled = dataclasses.replace(LossConfig().solver_ce, **TERM | {"region_sizes": (1, 2)}, sample_region=True)
    config = Config(model=ModelConfig(num_layers=2), loss=LossConfig(solver_ce=sampled), train=TrainConfig(num_steps=6))
    drawn = [make_plan(config.loss, step, 6, 0).sizes[0][1] for step in range(6)]
    assert set(drawn) == {(1,), (2,)}


def test_the_best_of_the_screen_go_on_where_a_queue_stopped(tiny, fake):
    """12 * 1.2 < 11 * 1.5: the perplexity at that depth counts, not that of the sequential pass."""
    made, stop_at = fake
    stop_at.add("skip-screen-0")
    with pytest.raises(Stopped):
        run(tiny)
    assert made == ["none-screen-0", "ce-screen-0"]
    stop_at.clear()
    record = run(tiny)
    assert record["finalists"] == ["skip"] and [entry["arm"] for entry in record["ranking"]] == ["skip", "ce"]
    assert {"none-steps-0", "none-steps-1", "shallow_1-steps-1", "skip-steps-1", "skip-flops-0"} <= set(made)
    assert not any(label.startswith("ce-steps") for label in made)
    assert len(made) == len(set(made)) == len(record["rows"])  # nothing twice


def test_each_seed_is_compared_with_its_own_twin(tiny, fake):
    record = run(dataclasses.replace(tiny, stage="final", finalists=("ce",)))
    (ce,) = [entry for entry in record["summary"]["steps"] if entry["arm"] == "ce"]
    assert ce["flops_ratio"] == 2.0 and ce["seeds"] == [0, 1]
    assert ce["seq"]["plain"] == pytest.approx([10.0, 100 * (12 / 11 - 1)])
    assert ce["depths"]["1"]["setting"] == "idn:n=2,k=1"
    assert ce["depths"]["1"]["own"] == pytest.approx([50.0, 50.0])
    assert ce["depths"]["1"]["plain"] == pytest.approx([65.0, 100 * (18 / 11 - 1)])


def test_ranking_leaves_out_plain_and_diverged_arms(tiny):
    study = load_study(tiny.config)
    rows = [{"arm": arm, "stage": "screen", "ppl": ppl} for arm, ppl in (("none", {"idn:n=2,k=1": 1.0}), ("ce", {}))]
    assert ranking(study, rows) == []


def test_step_time_is_that_of_each_phase(tiny):
    """Six plain steps of 1 s and four with the term of 3 s; the first reading of each holds compilation."""
    place = Place(load_study(tiny.config), tiny.runs, "builtin")
    config = place.config(Job("ce", "steps", 0, 10))
    term = dataclasses.replace(config.loss.solver_ce, start_fraction=0.6)
    config = dataclasses.replace(config, loss=LossConfig(solver_ce=term))
    seconds = [50, 1, 1, 1, 1, 1, 70, 3, 3, 3]
    lines = [json.dumps({"step": i + 1, "tokens_per_s": 16 / s}) for i, s in enumerate(seconds)]
    config.run_path.mkdir(parents=True)
    (config.run_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert step_seconds(config) == pytest.approx(0.6 * 1 + 0.4 * 3)


def test_refusals(tiny):
    """Of flags, and of studies."""
    for change, word in (
        ({"arms": ("cee",)}, "unknown arm 'cee'"),
        ({"finalists": ("cee",), "stage": "final"}, "unknown arm 'cee'"),
        ({"stage": "final"}, "no arm of the screen has finished"),
        ({"stage": "report"}, "no run of this study has finished"),
    ):
        with pytest.raises(InputError, match=word):
            run(dataclasses.replace(tiny, **change))
    study = load_study(tiny.config)
    for change, word in (
        ({"arms": {"none": {}, "x": {"loss": {"entropy": 1}}}}, "no field 'entropy'"),
        ({"arms": {"none": {}, "x": {"model": {"num_heads": 1}, "loss": {}}}}, "no plain twin"),
        ({"arms": {"x": {"loss": {"solver_ce": TERM}}}}, "no plain twin"),
        ({"depths": (2,), "main_depth": 2}, "depth 2 is not below"),
        ({"main_depth": 3}, "main_depth 3"),
        ({"iterations": (2,)}, "gives depth 1"),
    ):
        with pytest.raises(InputError, match=word):
            dataclasses.replace(study, **change).config("x")


@pytest.mark.slow
def test_a_study_by_two_workers(tiny):
    """For real: two processes at once train the plain model with two seeds."""
    record = run(dataclasses.replace(tiny, stage="steps", finalists=("ce",), arms=("none",), workers=2))
    assert {(row["arm"], row["stage"], row["seed"]) for row in record["rows"]} == {
        ("none", "steps", 0),
        ("none", "steps", 1),
    }
    assert record["rows"][0]["ppl"]["seq"] != record["rows"][1]["ppl"]["seq"]
