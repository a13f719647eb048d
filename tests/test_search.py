"""The search: its space, the lines that it bisects, and what it says of a setting that is confirmed."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import MODEL

from snlp_jax.config import Config, ModelConfig, SearchConfig, parse_share
from snlp_jax.errors import InputError
from snlp_jax.eval.search.quality import EXACT, Measured
from snlp_jax.eval.search.search import Search
from snlp_jax.eval.search.space import lines_of, lossless_of
from snlp_jax.linearize import About
from snlp_jax.notation import parse_schedule

DEPTH = SearchConfig(objective="depth")
TWELVE = dataclasses.replace(MODEL, num_layers=12)
W = 256
"""Windows to choose on, of 32 tokens; as many confirm."""


def candidates_of(model, search, calibrations=None):
    return [
        *lossless_of(model, search),
        *(c for line in lines_of(model, search, calibrations or {}) for c in line.candidates),
    ]


def test_shares_and_bad_fields():
    for text, share in (("1%", 0.01), ("0.01", 0.01), (" 2.5% ", 0.025), ("0", 0.0)):
        assert parse_share(text) == SearchConfig(max_ppl_increase=text).limit == pytest.approx(share)
    for fields, keyword in (
        ({"max_ppl_increase": "a bit"}, "a bit"),
        ({"max_ppl_increase": "-1%"}, "no share"),
        ({"max_ppl_increase": "nan"}, "no share"),
        ({"max_ppl_increase": "1"}, "percent sign"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_iters": 0}, "max_iters"),
        ({"region_sizes": (1,)}, "at least 2"),
        ({"tolerances": (1.5,)}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=keyword):
            SearchConfig(**fields)


# -- Space -------------------------------------------------------------------------------------------------------------


def test_space_holds_what_can_gain_and_no_other():
    candidates = candidates_of(TWELVE, DEPTH)
    names = [candidate.name for candidate in candidates]
    assert names[0] == "seq" and len(set(names)) == len(names)
    assert {"idn:n=8,k=2", "sid:n=2,k=1", "idn:n=12,k=4", "idn:n=8,k=1,init=batch_forward", "pairs:n=8"} <= {*names}
    assert {"idn:4-8,k=1+idn:8-12,k=1", "idn:n=8,k=1,stage=4xF2", "idn:n=8,k=4,tol=0.2"} <= {*names}
    assert "idn:n=3,k=3" not in names, "K = N is exact, as deep as the sequential pass, and evaluates more"
    assert all(each.least_cost[0] < 12 and parse_schedule(each.setting, 12) == each.schedule for each in candidates[1:])
    for line in lines_of(TWELVE, DEPTH, {}):
        sizes = [candidate.num_layers for candidate in line.candidates]
        assert sizes == sorted(set(sizes)), "the fewest layers first"
    streams = dataclasses.replace(TWELVE, num_streams=2, use_x0_resid=False)
    by_streams = [candidate.name for candidate in candidates_of(streams, DEPTH)]
    assert "hcn:n=8,k=1" in by_streams and not any(name.startswith("sid") for name in by_streams)


def test_space_of_decoding_keeps_to_what_the_cache_reproduces():
    candidates = candidates_of(dataclasses.replace(TWELVE, num_mtp_heads=2), SearchConfig(objective="decode"))
    assert not any(region.tolerance for candidate in candidates for region in candidate.schedule.regions)
    drafters = [candidate for candidate in candidates if candidate.speculate]
    assert "mtp" in [candidate.speculate for candidate in drafters] and len(drafters) >= 3
    assert all(candidate.is_lossless for candidate in drafters)


def test_space_follows_sizes_and_calibrations():
    about = About("basis", 4, 12, 2, 64, 0, "", init="cal")
    search = SearchConfig(objective="depth", region_sizes=(4, 8), tolerances=())
    names = [candidate.name for candidate in candidates_of(TWELVE, search, {"mine": about})]
    assert "cal:4-12,k=2,init=cal,fit=mine" in names
    assert {name.split("n=")[1].split(",")[0] for name in names if "n=" in name} == {"4", "8"}
    with pytest.raises(InputError, match="region size 13"):
        candidates_of(TWELVE, SearchConfig(region_sizes=(13,)))
    deep = [candidate.num_layers for candidate in candidates_of(ModelConfig(num_layers=100), DEPTH)]
    assert 10 <= len(set(deep) - {0}) <= 14 and max(deep) == 100


# -- The search, on made-up differences --------------------------------------------------------------------------------


def draw(change, seed, noise=0.03, num=W):
    """Differences of 32 tokens a window with the given mean PPL change."""
    d_W = math.log1p(change) + noise * np.random.default_rng(seed).standard_normal(num)
    return 32 * d_W, np.full(num, 32.0)


def search_on(change, seed=0, noise=0.03, ms=None, **fields):
    """A search that measures ``change(candidate, is_fresh)`` and reads ``ms(candidate)``."""
    search = Search.__new__(Search)
    search.search = SearchConfig(**{"objective": "depth" if ms is None else "prefill"} | fields)
    search.config = Config(model=TWELVE)
    search.lines, search.lossless = lines_of(TWELVE, search.search, {}), lossless_of(TWELVE, search.search)
    search.candidates = candidates_of(TWELVE, search.search)
    place = {candidate.schedule: index for index, candidate in enumerate(search.candidates)}

    def measure(schedule, start, stop):
        candidate = search.candidates[place[schedule]]
        halves = [draw(change(candidate, fresh), (seed, place[schedule], fresh), noise) for fresh in (0, 1)]
        total_W, weight_W = (np.concatenate(parts)[start:stop] for parts in zip(*halves, strict=True))
        return Measured(
            total_W, weight_W, [np.full(stop - start, float(region.num_iters)) for region in schedule.regions]
        )

    search.quality = SimpleNamespace(
        measure=measure, num_windows=2 * W, num_tokens=32, model=SimpleNamespace(dtype="float32")
    )
    search.num_windows, search.fingerprint = W, ""
    search.about = {"checkpoint": "best", "step": 1}
    search.measured, search.status, search.times_ms = {}, {}, {}
    search.clock = (
        None
        if ms is None
        else SimpleNamespace(what="ms", reader=lambda candidate, layout: lambda number: ms(candidate))
    )
    return search


def monotone(candidate, is_fresh=False):
    """Grows with the layers and falls with the iterations."""
    if candidate.is_lossless:
        return 0.0
    num_iters = max(region.num_iters for region in candidate.schedule.regions)
    return 0.02 * (candidate.num_layers / 8) ** 3 / num_iters**2


def test_the_best_of_monotone_lines_is_found():
    """Over 10 searches none loses the best of those that keep four standard errors from the limit, nor takes one that
    is as far above."""
    for seed in range(10):
        search = search_on(monotone, seed)
        found = search.run()
        clear = [c for c in search.candidates if monotone(c) < 0.002]  # 0.03 / 16 is one standard error on all windows
        assert (found.winner.depth, found.winner.num_block_evals) <= min(
            (c.schedule.depth, c.schedule.num_block_evals) for c in clear
        )
        assert next(monotone(c) for c in search.candidates if c.name == found.winner.name) < 0.018
        assert len(search.measured) < len(search.candidates) / 5
        assert found.solver.measured["ppl_interval"][1] <= 0.01


def test_error_rates_are_kept():
    """A setting at the limit fails, and one just above it passes, in 5 % of cases at most."""
    rates = []
    for above in (0.0, 1e-9):
        search = search_on(lambda candidate, _, above=above: 0.01 + above)
        candidates = search.candidates[1:201]
        within = [search._is_within(candidate) for candidate in candidates]
        wrong = within if above else [search.status[candidate] == "failed" for candidate in candidates]
        rates.append(np.mean(wrong))
    # 20 of 200 or more has probability below 0.3 %
    assert max(rates) < 0.1, rates


def test_limit_of_nothing_leaves_the_sequential_pass():
    found = search_on(monotone, noise=1e-4, max_ppl_increase="0%").run()
    assert found.winner.name == "seq" and found.solver.measured["ppl_interval"] == [0.0, 0.0]
    better = search_on(
        lambda c, _: -0.05 if c.name == "idn:n=12,k=1" else monotone(c), noise=1e-4, max_ppl_increase="0%"
    )
    assert better.run().winner.name == "idn:n=12,k=1", "better than the sequential pass is within any limit"


def test_fresh_windows_refute_and_the_line_falls_back():
    first = search_on(monotone).run().winner
    refuted = lambda c, is_fresh: 0.5 if is_fresh and c.name == first.name else monotone(c)  # noqa: E731
    search = search_on(refuted)
    found = search.run()
    status = {row.name: row.status for row in found.rows}
    assert status[first.name] == "refuted" and found.winner.name != "seq"
    assert found.winner.depth >= first.depth


def test_time_decides_among_what_may_be_fastest(monkeypatch):
    """The clock knows better than depth: sweeps of two iterations are dearer here than layers in order."""
    monkeypatch.setattr("snlp_jax.eval.search.search.LEAST_SECONDS", 0.0)

    def ms(candidate):
        return 10.0 + sum(region.num_layers * (region.num_iters - 1.5) for region in candidate.schedule.regions)

    search = search_on(lambda c, _: 0.0, ms=ms, tolerances=())
    found = search.run()
    best = min(search.candidates, key=ms)
    assert ms(next(c for c in search.candidates if c.name == found.winner.name)) == ms(best) < 10
    assert found.solver.measured["speedup"] == pytest.approx(10 / ms(best)) and found.winner.ms == ms(best)
    slow = search_on(lambda c, _: 0.0, ms=lambda c: 10.0 if c.is_lossless else 11.0)
    assert slow.run().winner.name == "seq"


def test_bounds_cover_and_know_exactness():
    assert Measured(np.zeros(16), np.ones(16)).bounds(0.01) == EXACT
    assert Measured(np.ones(1), np.ones(1)).bounds(0.05).high > 1e300
    rng = np.random.default_rng(0)
    weight = rng.uniform(0, 2, 64)
    missed = 0
    for _ in range(200):
        low, _, high = Measured(weight * (0.02 + 0.05 * rng.standard_normal(64)), weight).bounds(0.05)
        missed += not low < math.expm1(0.02) < high
    assert 5 <= missed <= 40, "10 % of 200 with a binomial's room"
