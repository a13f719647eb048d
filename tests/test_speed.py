"""The speed benchmark: its bookkeeping on a shape that runs in seconds. The times themselves are not tested."""

import dataclasses
import json
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import speed
from benchmarks.machine import SHAPES, random_params, work
from benchmarks.speed import Args, cells_of, flags_of, main, summarize
from benchmarks.speed_cells import Cell, Form, Job, Setup, cached_jobs, forward_jobs, reading_job, region_jobs
from benchmarks.speed_parts import part_jobs, train_jobs
from benchmarks.speed_presets import PRESETS, default_settings
from benchmarks.speed_report import leaders, markdown
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule

CUSTOM = dict(shape="demo", num_layers=3, embed_dim=32, num_heads=2, vocab_size=64, seq_len=16, window_pattern="SL")
MODEL = ModelConfig(num_layers=3, embed_dim=32, num_heads=2, num_kv_heads=2, vocab_size=64, seq_len=16)
SETTING = "idn:n=2,k=1"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed") / "below" / "speed.json"
    args = Args(**CUSTOM, kinds=("cached", "region"), contexts=(8,), solvers=(SETTING,), repeats=4, out=str(out))
    report = main(args)
    return report, json.loads(out.read_text()), out


@pytest.fixture(scope="module")
def setup():
    model = LanguageModel(dataclasses.replace(MODEL, compute_dtype="float32"))
    return Setup(model, random_params(model), (SETTING,))


def test_files_hold_the_report(result):
    report, saved, out = result
    assert saved == json.loads(json.dumps(report))
    assert {"date", "commit", "device", "versions", "model", "args", "limits", "load_average"} <= set(saved)
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["model"]["num_layers"] == 3 and saved["model"]["num_kv_heads"] == 2
    assert set(saved["limits"]["float32"]) == {"copy_bytes_per_s", "matmul_flops_per_s"}
    assert min(saved["limits"]["float32"].values()) > 0
    assert saved["skipped"] == [] and saved["failed"] == []
    table = out.with_suffix(".md").read_text()
    assert table == markdown(saved) and "## cached, custom, float32, batch 1, 1 tokens after 8" in table


def test_every_cell_has_every_form(result):
    _, saved, _ = result
    assert [(cell["kind"], cell["length"], cell["context"]) for cell in saved["cells"]] == [
        ("cached", 1, 8),
        ("region", 1, 8),
    ]
    settings = [[(SETTING, "mixed")], [("one iteration of 2", "stack"), ("reading 0 MB", "stack")]]
    for cell, others in zip(saved["cells"], settings, strict=True):
        names = [(job["setting"], job["layout"]) for job in cell["jobs"]]
        assert names == [("seq", "stack"), ("seq", "list"), *others]
        for job in cell["jobs"]:
            assert job["runs"] == 4 and job["is_finite"] and job["compile_s"] >= 0 and job["limit_ms"] > 0
            assert job["min_ms"] <= job["lower_quartile_ms"] <= job["median_ms"] <= job["upper_quartile_ms"]
            assert job["setting"] == "reading 0 MB" or (job["peak_bytes"] > 0 and job["kernels"] > 10)


def test_twin_is_the_fastest_sequential_form(result):
    _, saved, _ = result
    for cell in saved["cells"]:
        sequential = {job["layout"]: job for job in cell["jobs"] if job["setting"] == "seq"}
        medians = {layout: job["median_ms"] for layout, job in sequential.items()}
        assert medians[cell["twin"]["layout"]] == min(medians.values())
        for job in cell["jobs"]:
            assert job["speedup"] == pytest.approx(min(medians.values()) / job["median_ms"])
            fastest = min(job["min_ms"] for job in sequential.values())
            assert job["speedup_of_min"] == pytest.approx(fastest / job["min_ms"])


def test_units_limits_and_peaks():
    """Times are those of one unit; fractions are bytes and FLOPs over time and limit."""
    job = Job({"setting": "seq"}, make=None, num_bytes=100, flops=60.0, seconds=[2.0, 2.0], dispatch=[1.0, 1.0])
    job.facts["peak_flops"] = 300.0
    (row,) = summarize([job], {"copy_bytes_per_s": 100.0, "matmul_flops_per_s": 60.0})["jobs"]
    assert row["limit_ms"] == 1000 and row["fraction_of_copy"] == row["fraction_of_matmul"] == 0.5
    assert row["mfu"] == pytest.approx(0.1)


def test_leaders_look_at_all_command_buffers():
    cell = dataclasses.asdict(Cell("cached", "d32s", "bfloat16", context=512))
    job = {"layout": "list", "memory": "default", "lower_quartile_ms": 1.0, "upper_quartile_ms": 1.0, "min_ms": 1.0}
    jobs = lambda seq, idn: [job | {"setting": "seq", "median_ms": seq}, job | {"setting": "idn", "median_ms": idn}]  # noqa: E731
    cells = [cell | {"command_buffers": "off", "jobs": jobs(4.0, 3.0)}]
    cells += [cell | {"command_buffers": "default", "jobs": jobs(6.0, 2.0)}]
    ((title, twin, best),) = leaders(cells)
    assert title == "cached, d32s, bfloat16, batch 1, 1 tokens after 512"
    assert twin == 4.0 and best == {"idn": (2.0, "list, command buffers default")}


def test_a_block_on_a_cache_is_the_same_however_weights_lie(setup):
    """XLA's choice of a memory layout changes no number but by the order of sums."""
    forms = {SETTING: [Form("mixed"), Form("mixed", is_chosen=True)]}
    jobs = cached_jobs(setup, Cell("cached", "custom", "float32", 2, 3, 8), forms, 1)
    rings = [jax.tree.leaves(job.make(job)()) for job in jobs]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *rings)


def test_forward_is_the_same_in_every_form(setup):
    cell = Cell("forward", "custom", "float32", 2, 8)
    forms = {"seq": [Form("stack"), Form("list", True)], SETTING: [Form("stack"), Form("mixed", True)]}
    outs = []
    for job in forward_jobs(setup, cell, forms):
        outs.append(np.asarray(job.make(job)()))
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-4)  # logits of order 1; sums in another order
    np.testing.assert_allclose(outs[2], outs[3], atol=1e-4)
    assert np.abs(outs[0] - outs[2]).max() > 1e-3  # one iteration is not the sequential pass


def test_region_work_is_that_of_its_layers(setup):
    cell = Cell("region", "custom", "float32", 1, 1, 8)
    seq, iteration, reading = region_jobs(setup, cell, SETTING, {"seq": [Form("list")], SETTING: [Form("stack")]}, 4)
    D, cache = 32, 2 * 2 * 32 * 8  # keys and values of two layers
    weights = 2 * 12 * D * D
    own = [job.num_bytes for job in (seq, iteration)]
    gathered = [num_bytes - 4 * (weights + cache) for num_bytes in own]
    assert own[0] == own[1] == reading.num_bytes and 0 <= gathered[0] <= 4 * 2 * D  # value embeddings of the token
    assert seq.flops == iteration.flops == 2 * weights + 4 * 2 * D * (1 + 8)
    assert seq.units == reading.units == 4


def test_limit_of_reading_reads_in_every_step():
    def fastest_s(steps: int) -> float:
        run = reading_job(Cell("region", "custom", "float32"), 2**24, steps).make(job)
        return min(timeit.repeat(lambda: jax.block_until_ready(run()), number=1, repeat=5))

    job = reading_job(Cell("region", "custom", "float32"), 2**24, 1)
    assert fastest_s(64) > 8 * fastest_s(1)  # both alike if the sum were taken out of the loop


@pytest.mark.parametrize("cell", [Cell("parts", "c", "float32", 1, 1, 8), Cell("parts", "c", "float32", 2, 8)])
def test_parts_run_and_cover_the_work_of_an_iteration(setup, cell):
    jobs = part_jobs(setup, cell, SETTING, Form("stack"))
    assert [job.name["setting"] for job in jobs][1:4] == ["projections", "attention", "MLP"]
    for job in jobs:
        job.run = job.make(job)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(job.run()))
    whole = region_jobs(setup, cell, SETTING, {SETTING: [Form("stack")]}, 1)[0]
    assert sum(job.flops for job in jobs) == pytest.approx(whole.flops, rel=1e-6)


def test_budget_and_memory_skip_and_say_so(tmp_path, monkeypatch):
    limits = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}
    monkeypatch.setattr(speed, "measure_limits", lambda *_: limits)
    settings = dict(CUSTOM, lengths=(1, 4), solvers=(SETTING,), out=str(tmp_path / "speed.json"))
    report = main(Args(**settings, time_budget=0))
    assert [(row["length"], row["why"]) for row in report["skipped"]] == [(1, "no time left"), (4, "no time left")]
    monkeypatch.setattr(speed, "memory_left", lambda: 10)
    report = main(Args(**settings))
    assert len(report["skipped"]) == 2 and "needs about" in report["skipped"][0]["why"] and report["cells"] == []


def test_presets_name_cells_that_exist():
    for name, cells in PRESETS.items():
        assert len(set(cells)) == len(cells)
        for cell in cells:
            assert cell.shape in SHAPES and (cell.kind not in ("forward", "train") or cell.context == 0)
            assert cell.length + cell.context <= SHAPES[cell.shape].max_context
            assert name != "cpu" or cell.dtype == "float32"
    timed = {(cell.kind, cell.length) for cell in PRESETS["gpu"] if cell.shape == "d32s"}
    assert {("cached", t) for t in (1, 128, 2048)} | {("forward", t) for t in (1, 128, 2048)} <= timed
    assert {cell.batch for cell in PRESETS["gpu"]} == {1, 8, 32}


def test_flags_choose_cells():
    preset, _ = cells_of(Args(preset="gpu", kinds=("train",)), on_cpu=True)
    assert [cell.kind for cell in preset] == ["train"]
    custom, config = cells_of(Args(shape="d32s", kinds=("cached", "forward"), contexts=(64,), lengths=(1, 4)), False)
    assert [(cell.kind, cell.length, cell.context) for cell in custom] == [
        ("cached", 1, 64),
        ("cached", 4, 64),
        ("forward", 1, 0),
        ("forward", 4, 0),
    ]
    assert config.embed_dim == 640 and {cell.dtype for cell in custom} == {"bfloat16"}
    assert flags_of(Args(batches=(1, 8), command_buffers="off")) == ["--batches", "1", "8", "--command-buffers", "off"]


@pytest.mark.slow
def test_training_steps_run():
    jobs = train_jobs(MODEL, Cell("train", "custom", "float32", 2, 8))
    for job in jobs:
        job.run = job.make(job)
        assert bool(jnp.isfinite(job.run()["loss"]))
    assert jobs[0].flops == jobs[1].flops and jobs[0].facts["flops_counted"] < jobs[1].facts["flops_counted"]


def test_work_counts_by_hand():
    config = ModelConfig(
        vocab_size=64, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, seq_len=8, window_pattern="SL",
        short_window=1, use_value_embeds=False, compute_dtype="bfloat16",
    )  # fmt: skip
    layer, head, tokens = 12 * 32 * 32, 32 * 64, 2 * 4
    pairs = [1 + 2 + 2 + 2, 1 + 2 + 3 + 4]  # of four queries: a left window of one, and everything
    num_bytes, flops = work(config, Schedule.of(2), 2, 4)
    assert num_bytes == 2 * (2 * layer + head + tokens * 32)
    assert flops == 2 * tokens * (2 * layer + head) + 4 * 2 * 32 * sum(pairs)
    num_bytes, flops = work(config, parse_schedule("idn:n=1,k=3", 2), 2, 4)
    assert num_bytes == 2 * (4 * layer + head + tokens * 32)
    assert flops == 2 * tokens * (4 * layer + head) + 4 * 2 * 32 * (pairs[0] + 3 * pairs[1])


def test_default_settings_are_the_papers_rows():
    assert default_settings(32)[:3] == ("idn:n=24,k=1", "idn:n=24,k=2", "idn:n=24,k=1,stage=12xF2")
    assert "idn:n=12,k=2,init=batch_forward" in default_settings(32) and "idn:n=8,k=4" in default_settings(32)
    for num_layers in (1, 2, 4, 12, 32):
        for has_streams in (False, True):
            settings = default_settings(num_layers, has_streams)
            regions = [parse_schedule(setting, num_layers).segments[-1] for setting in settings]
            assert settings and all(region.num_iters <= region.num_layers for region in regions)


def test_bad_flags_are_one_sentence():
    with pytest.raises(InputError, match="at least 1"):
        Args(lengths=(0,))
    with pytest.raises(InputError, match="unknown correction"):
        main(Args(**CUSTOM, lengths=(1,), solvers=("nope:n=1",), out="unused.json"))
