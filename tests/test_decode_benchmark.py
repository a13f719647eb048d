"""The decoding benchmark: its bookkeeping on a shape that runs in seconds. The times themselves are not tested."""

import dataclasses
import json
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.decode import Args, Summary, main, step_bytes
from benchmarks.draft_costs import Costs, fit_costs
from benchmarks.machine import work
from benchmarks.timing import GROUP, Arm, Run, time_beside_first
from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.notation import parse_drafter, parse_schedule

CUSTOM = dict(shape="demo", num_layers=2, embed_dim=32, num_heads=2, vocab_size=64, seq_len=16, window_pattern="L")
SOLVER, DRAFTER = "idn:n=2,k=2", "idn:n=2,k=1"
CONFIG = ModelConfig(
    vocab_size=64, num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=8, window_pattern="SL",
    short_window=2, compute_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / "decode.json"
    settings = dict(solvers=(SOLVER,), drafters=(DRAFTER,), draft_lens=(0, 1), batches=(2,), contexts=(5,))
    report = main(Args(**CUSTOM, **settings, new_tokens=6, repeats=1, out=str(out)))
    assert json.loads(json.dumps(report)) == json.loads(out.read_text())
    return report


@pytest.mark.slow
def test_report_is_whole(saved):
    assert {"date", "commit", "device", "versions", "model", "args", "load_average", "elapsed_s"} <= set(saved)
    assert saved["skipped"] == [] and saved["failed"] == [] and saved["limits"]["float32"]["copy_bytes_per_s"] > 0
    (cell,) = saved["cells"]
    names = [(arm["setting"], arm["layout"], arm["draft_len"]) for arm in cell["arms"]]
    plain = [("seq", "stack", None), ("seq", "list", None), (SOLVER, "auto", None)]
    assert names == [*plain, (DRAFTER, "auto", 0), (DRAFTER, "auto", 1)]
    assert (cell["batch"], cell["context"]) == (2, 5)
    for arm in cell["arms"]:
        assert arm["runs"] == 1 and arm["prefill_ms"] > 0 and arm["weight_bytes"] > 0 and arm["cache_bytes"] > 0
    # Every program is compiled once: the lengths of a drafter share theirs.
    compiled = [set(arm["compile_s"]) for arm in cell["arms"]]
    assert compiled == [{"prefill", "decode"}] * 3 + [{"prefill", "decode", "speculate 1"}, set()]


@pytest.mark.slow
def test_twin_is_the_faster_sequential_engine(saved):
    (cell,) = saved["cells"]
    times = {arm["layout"]: arm["ms_per_token"] for arm in cell["arms"] if arm["setting"] == "seq"}
    assert times[cell["twin"]] == min(times.values())
    for arm in cell["arms"][:3]:
        assert arm["ratio"] == pytest.approx(times[cell["twin"]] / arm["ms_per_token"])
        assert arm["tokens_per_s"] == pytest.approx(2 * 1e3 / arm["ms_per_token"])
        assert arm["rounds"] == {"0": 5}  # of six tokens the first comes out of the prefill


@pytest.mark.slow
def test_exact_arms_give_the_twins_text(saved):
    # K = N is sequential, and greedy speculation verifies: rounding aside, which these margins are far above.
    for arm in saved["cells"][0]["arms"]:
        assert (arm["equal_tokens"], arm["rows_different"], arm["first_difference"]) == (1, 0, None)


@pytest.mark.slow
def test_random_weights_have_costs_but_no_acceptance(saved):
    (cell,) = saved["cells"]
    for arm in cell["arms"][3:]:
        assert arm["ms_per_round"] > 0 and not {"acceptance", "ratio", "ms_per_token"} & set(arm)
    (costs,) = cell["costs"]
    assert costs["setting"] == DRAFTER and "acceptance" not in costs and costs["plain_ms"] > 0
    assert set(costs["verify_ms"]) == {"1"} and [point[:2] for point in costs["points"]] == [[1, 0], [1, 1]]


def test_row_of_a_trained_model():
    """Ratios pair the rounds; bytes follow from the rounds that were made; drafts are pooled over the runs."""
    text_BT = np.zeros((2, 11), np.int32)

    def arm(setting, draft_len, seconds, rounds, tested=0, accepted=0):
        found = SimpleNamespace(prefill_seconds=1.0, tested=tested, accepted=accepted, iterations=0)
        engine = SimpleNamespace(schedule=parse_schedule("seq", 4), num_weight_bytes=1, num_cache_bytes=1)
        runs = [Run(each, found, text_BT, Counter(rounds)) for each in seconds]
        return Arm(setting, "auto", parse_drafter(setting, 4), engine, draft_len, runs=runs)

    twin = arm("seq", None, [2.0, 4.0, 8.0], {0: 10})
    summary = Summary(CONFIG, 2, 3, 100.0, twin, True)
    drafts = arm("exit:2", 0, [1.0, 1.0, 2.0], {0: 1, 2: 4}, tested=8, accepted=6)
    drafts.runs[1] = drafts.runs[1]._replace(text_BT=text_BT + (np.arange(11) >= 7) * np.array([[0], [1]]))
    row = summary.row(drafts)
    assert (row["ratio_lower"], row["ratio"], row["ratio_upper"]) == (3.0, 4.0, 4.0)
    assert row["acceptance"] == 0.75 and row["tokens_per_round"] == 2 and row["tokens_per_s"] == 2
    assert (row["rows_different"], row["first_difference"]) == (1, 7)
    assert row["equal_tokens"] == pytest.approx(1 - 4 / 66)
    of = lambda setting, length: step_bytes(CONFIG, parse_schedule(setting, 4), 2, length, 3 + 5)  # noqa: E731
    assert row["bytes_per_token"] == (of("seq", 1) + 4 * (of("seq", 3) + 2 * of("exit:2", 1))) / 10
    assert row["fraction_of_copy"] == pytest.approx(row["bytes_per_token"] / 100)
    heads = summary.row(arm("mtp", 2, [1.0, 1.0, 1.0], {2: 5}))  # two matrices and the projection, in float32
    assert heads["bytes_per_token"] == 5 * (of("seq", 3) + 4 * (2 * 32 * 32 + 32 * 64)) / 10


def test_step_bytes_by_hand():
    pair, batch = 2 * 16 * 4, 3  # one head of 16 keys and values in float32
    for setting, evals in (("seq", (1, 1, 1, 1)), ("idn:n=2,k=2", (1, 1, 2, 2)), ("exit:2", (1, 1, 0, 0))):
        schedule = parse_schedule(setting, 4)
        cache = sum(count * min(window, 5) for count, window in zip(evals, (2, 8, 2, 8), strict=True))
        assert step_bytes(CONFIG, schedule, batch, 1, 5) == work(CONFIG, schedule, batch, 1)[0] + batch * pair * cache


def test_cost_model():
    known = Costs(1.0, {1: 1.1, 3: 1.4}, 0.2)
    points = [(width, length, known.verify[width] + 0.2 * length) for width in (1, 3) for length in (0, width)]
    costs, error = fit_costs(1.0, points)
    assert error < 1e-12 and costs.draft == pytest.approx(0.2) and costs.verify == pytest.approx(known.verify)
    assert known.ratio(0.5, 1) == pytest.approx(1.5 / 1.3)
    assert known.ratio(0.5, 2) == pytest.approx(1.75 / 1.8)  # by the program for three
    assert known.best(0.5)[0] == 1 and known.best(1.0) == (3, pytest.approx(4 / 2.0))
    assert known.best(known.acceptance_for(1.15))[1] == pytest.approx(1.15)
    assert known.acceptance_for(2.01) is None
    assert dataclasses.replace(known, draft=10.0).acceptance_for(1.0) is None


def test_bad_flags_are_one_sentence():
    with pytest.raises(InputError, match="at least 2"):
        Args(new_tokens=1)
    with pytest.raises(InputError, match="not be negative"):
        Args(draft_lens=(-1,))
    for wrong, match in (
        ({"solvers": ("nope:n=1",)}, "unknown correction"),
        ({"solvers": ("idn:n=2,k=1,stage=1xF2",)}, "fused layers"),
        ({"drafters": ("seq",)}, "saves nothing"),
        ({"drafters": ("mtp",)}, "no multi-token-prediction heads"),
        ({"contexts": (160,)}, "lower --contexts"),
    ):
        with pytest.raises(InputError, match=match):
            main(Args(**CUSTOM, **({"contexts": (4,), "new_tokens": 2} | wrong), out="unused.json"))


def test_things_are_timed_beside_the_first_and_let_go_of():
    """Thing i takes 2^-i s as a stack and twice that as a list, and all of it slows down from group to group."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Thing:
        def __init__(self, index, layout):
            nonlocal most
            if (index, layout) == (3, "list"):
                raise ValueError("no such list\nand more")
            self.index, self.layout = index, layout
            alive.add(self)
            most = max(most, len(alive))

    def seconds_of(thing, _):
        slower = 1 + max(other.index for other in alive) // GROUP
        return slower * (2.0 if thing.layout == "list" else 1.0) / 2**thing.index

    rows, failed = time_beside_first(2 * GROUP, ("stack", "list"), Thing, seconds_of, 3)
    assert failed == [(3, "list", "no such list")]
    assert [rows[index]["ratio"] for index in range(2 * GROUP)] == [2**index for index in range(2 * GROUP)]
    assert {row["layout"] for row in rows.values()} == {"stack"}
    assert most <= 2 * (1 + GROUP)
    assert rows[1]["ms"] == rows[0]["ms"] / 2


def test_nothing_is_timed_beside_what_could_not_be_made():
    def make(index, layout):
        if index == 0:
            raise ValueError(f"no {layout}")
        return index

    rows, failed = time_beside_first(3, ("stack", "list"), make, lambda thing, _: 1.0, 3)
    assert rows == {} and failed == [(0, "stack", "no stack"), (0, "list", "no list")]
