"""The speed benchmark: its bookkeeping on a shape that runs in seconds. The times themselves are not tested."""

import json

import jax
import pytest

from benchmarks import speed
from benchmarks.speed import Args, Arm, default_settings, main, make_arms, random_params, work
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule

SETTINGS = ("idn:n=2,k=1", "sid:n=2,k=2,init=batch_forward")
CUSTOM = dict(shape="demo", num_layers=3, embed_dim=32, num_heads=2, vocab_size=64, seq_len=16, window_pattern="SL")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed") / "below" / "speed.json"
    args = Args(**CUSTOM, lengths=(4,), batches=(2,), solvers=SETTINGS, layouts=("mixed",), repeats=4, out=str(out))
    report = main(args)
    return report, json.loads(out.read_text())


def test_file_holds_the_report(result):
    report, saved = result
    assert saved == json.loads(json.dumps(report))
    assert {"date", "commit", "device", "versions", "model", "args", "limits", "load_average"} <= set(saved)
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["model"]["num_layers"] == 3 and saved["model"]["num_kv_heads"] == 2
    assert set(saved["limits"]["float32"]) == {"copy_bytes_per_s", "matmul_flops_per_s"}
    assert min(saved["limits"]["float32"].values()) > 0
    assert saved["skipped"] == [] and saved["failed"] == []


def test_every_cell_has_every_arm(result):
    _, saved = result
    assert [(cell["batch"], cell["length"]) for cell in saved["cells"]] == [(2, 4)]
    for cell in saved["cells"]:
        names = [(arm["setting"], arm["layout"]) for arm in cell["arms"]]
        assert names == [("seq", "stack"), ("seq", "list"), *((setting, "mixed") for setting in SETTINGS)]
        assert [arm["depth"] for arm in cell["arms"]] == [3, 3, 2, 4]
        for arm in cell["arms"]:
            assert arm["runs"] == 4 and arm["is_finite"]
            assert arm["min_ms"] <= arm["lower_quartile_ms"] <= arm["median_ms"] <= arm["upper_quartile_ms"]
            assert arm["compile_s"] >= 0 and arm["peak_bytes"] > 0 and arm["fraction_of_limit"] > 0


def test_twin_is_the_faster_sequential_arm(result):
    _, saved = result
    for cell in saved["cells"]:
        sequential = {arm["layout"]: arm["median_ms"] for arm in cell["arms"] if arm["setting"] == "seq"}
        assert cell["twin_ms"] == min(sequential.values()) == sequential[cell["twin"]]
        for arm in cell["arms"]:
            assert arm["speedup"] == pytest.approx(cell["twin_ms"] / arm["median_ms"])


def test_budget_skips_and_says_so(tmp_path, monkeypatch):
    arms = [Arm(name, "stack", parse_schedule(name, 3), weights=None) for name in ("seq", *SETTINGS)]
    monkeypatch.setattr(speed, "make_arms", lambda *_: arms)
    monkeypatch.setattr(speed, "measure_limits", lambda *_: {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0})
    report = main(Args(**CUSTOM, lengths=(1, 4), solvers=SETTINGS, time_budget=0, out=str(tmp_path / "speed.json")))
    names = [(row["length"], row["setting"], row["layout"]) for row in report["skipped"]]
    assert names == [(length, arm.setting, "stack") for length in (1, 4) for arm in arms]
    assert all(cell["twin"] is None and cell["arms"] == [] for cell in report["cells"])


def test_layouts_and_random_weights():
    model = LanguageModel(
        ModelConfig(num_layers=3, embed_dim=32, num_heads=2, num_kv_heads=2, compute_dtype="bfloat16")
    )
    params = random_params(model)
    assert params["blocks"]["attn"]["out"].dtype == "bfloat16"
    assert all(float(abs(params["blocks"][part][name]).max()) > 0 for part, name in (("attn", "out"), ("mlp", "down")))
    arms = make_arms(model, ("idn:n=2,k=1",), ("stack", "list", "mixed"))
    kinds = {(arm.setting, arm.layout): [type(blocks) is list for blocks in arm.weights.blocks] for arm in arms}
    # A sequential pass ends a segment where the head reads its mid-layer state.
    assert kinds[("seq", "stack")] == [False, False] and kinds[("seq", "list")] == [True, True]
    assert kinds[("idn:n=2,k=1", "stack")] == [False, False]
    assert kinds[("idn:n=2,k=1", "list")] == [True, True]
    assert kinds[("idn:n=2,k=1", "mixed")] == [True, False]


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
    assert default_settings(32)[:2] == ("idn:n=24,k=1,init=h0", "idn:n=24,k=2,init=h0")
    assert "idn:n=12,k=2,init=batch_forward" in default_settings(32) and "idn:n=8,k=4,init=h0" in default_settings(32)
    for num_layers in (1, 2, 4, 12, 32):
        regions = [parse_schedule(setting, num_layers).segments[-1] for setting in default_settings(num_layers)]
        assert all(region.num_iters <= region.num_layers for region in regions)


def test_bad_flags_are_one_sentence():
    with pytest.raises(InputError, match="at least 1"):
        Args(lengths=(0,))
    with pytest.raises(InputError, match="unknown correction"):
        main(Args(**CUSTOM, lengths=(1,), solvers=("nope:n=1",), out="unused.json"))
