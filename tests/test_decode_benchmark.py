"""The decoding benchmark: its bookkeeping on a shape that runs in seconds. The times themselves are not tested."""

import dataclasses
import json
import weakref

import pytest

from benchmarks.decode import Args, main, step_bytes
from benchmarks.draft_costs import Costs, fit_costs
from benchmarks.machine import work
from benchmarks.timing import GROUP, time_beside_first
from snlp_jax.config import ModelConfig
from snlp_jax.notation import parse_schedule

CUSTOM = dict(shape="demo", num_layers=2, embed_dim=32, num_heads=2, vocab_size=64, seq_len=16, window_pattern="L")
SOLVER, DRAFTER = "idn:n=2,k=2", "idn:n=2,k=1"
CONFIG = ModelConfig(
    vocab_size=64, num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=8, window_pattern="SL",
    short_window=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / "decode.json"
    settings = dict(solvers=(SOLVER,), drafters=(DRAFTER,), draft_lens=(0, 1), batches=(2,), contexts=(5,))
    report = main(Args(**CUSTOM, **settings, new_tokens=6, repeats=1, out=str(out)))
    assert json.loads(json.dumps(report)) == json.loads(out.read_text())
    return report


@pytest.mark.slow
def test_exact_arms_give_the_twins_text_and_costs_are_read(saved):
    """K = N is sequential, and greedy speculation verifies: rounding aside, which these margins are far above. Every
    program is compiled once."""
    assert saved["skipped"] == [] and saved["failed"] == []
    (cell,) = saved["cells"]
    assert [arm["draft_len"] for arm in cell["arms"]] == [None, None, None, 0, 1]
    for arm in cell["arms"]:
        assert (arm["equal_tokens"], arm["rows_different"], arm["first_difference"]) == (1, 0, None)
    compiled = [set(arm["compile_s"]) for arm in cell["arms"]]
    assert compiled == [{"prefill", "decode"}] * 3 + [{"prefill", "decode", "speculate 3"}, {"prefill", "speculate 1"}]
    (costs,) = cell["costs"]
    assert costs["plain_ms"] > 0 and set(costs["verify_ms"]) == {"1", "3"}


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
