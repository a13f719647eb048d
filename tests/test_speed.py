"""The speed benchmark: what it counts, and one run of it. Its times and its files are not tested."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_params

from benchmarks import gpu
from benchmarks.machine import SHAPES, work
from benchmarks.speed import Args, cells_of, main, summarize
from benchmarks.speed_cells import Cell, Form, Job, Setup, forward_jobs, region_jobs
from benchmarks.speed_parts import part_jobs, product_jobs, train_jobs
from benchmarks.speed_presets import PRESETS, default_settings, first_settings
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule

CUSTOM = dict(shape="demo", num_layers=3, embed_dim=32, num_heads=2, vocab_size=64, seq_len=16, window_pattern="SL")
MODEL = ModelConfig(num_layers=3, embed_dim=32, num_heads=2, num_kv_heads=2, vocab_size=64, seq_len=16)
SETTING = "idn:n=2,k=1"


@pytest.fixture(scope="module")
def setup():
    model = LanguageModel(MODEL, MachineConfig(compute_dtype="float32"))
    return Setup(model, random_params(model), (SETTING,))


@pytest.mark.slow
def test_a_run(tmp_path):
    """Every cell has every form, and speed-ups are those over the fastest sequential one."""
    out = tmp_path / "below" / "speed.json"
    args = Args(**CUSTOM, kinds=("cached",), contexts=(8,), solvers=(SETTING,), repeats=2, out=str(out))
    report = main(args)
    assert out.is_file() and out.with_suffix(".md").is_file() and not report["skipped"] and not report["failed"]
    (cell,) = report["cells"]
    assert [(job["setting"], job["layout"]) for job in cell["jobs"]] == [
        ("seq", "stack"),
        ("seq", "list"),
        (SETTING, "mixed"),
    ]
    fastest = min(job["median_ms"] for job in cell["jobs"] if job["setting"] == "seq")
    for job in cell["jobs"]:
        assert job["is_finite"] and job["speedup"] == pytest.approx(fastest / job["median_ms"])


def test_units_limits_and_peaks():
    """Times are those of one unit; fractions are bytes and FLOPs over time and limit."""
    job = Job({"setting": "seq"}, make=None, num_bytes=100, flops=60.0, seconds=[2.0, 2.0], dispatch=[1.0, 1.0])
    job.facts["peak_flops"] = 300.0
    (row,) = summarize([job], {"copy_bytes_per_s": 100.0, "matmul_flops_per_s": 60.0})["jobs"]
    assert row["limit_ms"] == 1000 and row["fraction_of_copy"] == row["fraction_of_matmul"] == 0.5
    assert row["mfu"] == pytest.approx(0.1)


@pytest.mark.slow
def test_forward_is_the_same_in_every_form(setup):
    cell = Cell("forward", "custom", "float32", 2, 8)
    forms = {"seq": [Form("stack"), Form("list", True)], SETTING: [Form("mixed", True)]}
    stack, layers, once = (np.asarray(job.make(job)()) for job in forward_jobs(setup, cell, forms))
    np.testing.assert_allclose(stack, layers, atol=1e-4)  # logits of order 1; sums in another order
    assert np.abs(stack - once).max() > 1e-3  # one iteration is not the sequential pass


def test_region_work_is_that_of_its_layers_and_of_its_parts(setup):
    cell, forms = Cell("region", "custom", "float32", 1, 1, 8), {"seq": [Form("list")], SETTING: [Form("stack")]}
    seq, iteration, reading = region_jobs(setup, cell, SETTING, forms, 4)
    D, cache = 32, 2 * 2 * 32 * 8  # keys and values of two layers
    weights = 2 * 12 * D * D
    gathered = [job.num_bytes - 4 * (weights + cache) for job in (seq, iteration)]
    assert seq.num_bytes == iteration.num_bytes == reading.num_bytes
    assert 0 <= gathered[0] <= 4 * 2 * D  # value embeddings of the token
    assert seq.flops == iteration.flops == 2 * weights + 4 * 2 * D * (1 + 8)
    parts = part_jobs(setup, dataclasses.replace(cell, kind="parts"), SETTING, Form("stack"))
    assert sum(job.flops for job in parts) == pytest.approx(iteration.flops, rel=1e-6)


def test_products_in_order_and_at_once_read_the_same_bytes(setup):
    cell = Cell("product", "custom", "float32", 1, 1)
    in_order, at_once = product_jobs(setup, cell, SETTING, 3)
    assert in_order.is_sequential and not at_once.is_sequential
    assert in_order.num_bytes == at_once.num_bytes == 4 * 2 * 8 * 32 * 32 and in_order.units == 3
    for job in (in_order, at_once):
        assert np.isfinite(np.asarray(job.make(job)())).all()


def test_settings_of_a_first_gpu_fit_any_depth():
    assert first_settings(32) == ("idn:n=24,k=1", "idn:n=24,k=2", "idn:n=24,k=1,stage=12xF2", "idn:n=32,k=1")
    for num_layers in (3, 4, 6):
        for setting in first_settings(num_layers):
            parse_schedule(setting, num_layers)


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    """The file is there after each cell, with what was measured so far."""
    report = gpu.main(gpu.Args(minutes=0.5, out=str(tmp_path / "gpu.json")))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["cells"] and not report["failed"]
    assert {cell["kind"] for cell in report["cells"]} <= {"region", "cached", "product", "forward", "parts", "train"}
    with pytest.raises(InputError, match="--minutes is 0"):
        gpu.Args(minutes=0)


def test_presets_name_cells_that_exist():
    for name, cells in PRESETS.items():
        assert len(set(cells)) == len(cells)
        for cell in cells:
            assert cell.shape in SHAPES and (cell.kind not in ("forward", "train") or cell.context == 0)
            assert cell.length + cell.context <= SHAPES[cell.shape].max_context
            assert name != "cpu" or cell.dtype == "float32"


def test_flags_choose_cells():
    preset, _ = cells_of(Args(preset="gpu", kinds=("train",)), on_cpu=True)
    assert [cell.kind for cell in preset] == ["train"]
    custom, config = cells_of(Args(shape="d32s", kinds=("cached", "forward"), contexts=(64,), lengths=(1, 4)), False)
    expected = [("cached", 1, 64), ("cached", 4, 64), ("forward", 1, 0), ("forward", 4, 0)]
    assert [(cell.kind, cell.length, cell.context) for cell in custom] == expected
    assert config.embed_dim == 640 and {cell.dtype for cell in custom} == {"bfloat16"}


@pytest.mark.slow
def test_training_steps_run():
    jobs = train_jobs(MODEL, Cell("train", "custom", "float32", 2, 8))
    assert bool(jnp.isfinite(jobs[1].make(jobs[1])()["loss"]))  # the one with an iteration compared
    assert jobs[0].flops == jobs[1].flops and jobs[1].facts["flops_counted"] > 0


def test_work_counts_by_hand():
    config = ModelConfig(
        vocab_size=64, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, seq_len=8, window_pattern="SL",
        short_window=1, use_value_embeds=False,
    )  # fmt: skip
    layer, head, tokens = 12 * 32 * 32, 32 * 64, 2 * 4
    pairs = [1 + 2 + 2 + 2, 1 + 2 + 3 + 4]  # of four queries: a left window of one, and everything
    num_bytes, flops = work(config, Schedule.of(2), 2, 4, "bfloat16")
    assert num_bytes == 2 * (2 * layer + head + tokens * 32)
    assert flops == 2 * tokens * (2 * layer + head) + 4 * 2 * 32 * sum(pairs)
    num_bytes, flops = work(config, parse_schedule("idn:n=1,k=3", 2), 2, 4, "bfloat16")
    assert num_bytes == 2 * (4 * layer + head + tokens * 32)
    assert flops == 2 * tokens * (4 * layer + head) + 4 * 2 * 32 * (pairs[0] + 3 * pairs[1])


def test_default_settings_are_the_papers_rows():
    assert default_settings(32)[:3] == ("idn:n=24,k=1", "idn:n=24,k=2", "idn:n=24,k=1,stage=12xF2")
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
