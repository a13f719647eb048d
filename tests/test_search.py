"""The search: its space, its costs, and a race that keeps the best."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from tiny_run import MODEL

from snlp_jax.config import ModelConfig, SearchConfig, parse_share
from snlp_jax.errors import InputError
from snlp_jax.eval.search.cost import CostModel, choose_probes, depth_cost, parts_of
from snlp_jax.eval.search.race import Bounds, Race, Sums, rungs_of
from snlp_jax.eval.search.space import candidates_of
from snlp_jax.linearize import About
from snlp_jax.notation import parse_schedule

DEPTH = SearchConfig(objective="depth")
TWELVE = dataclasses.replace(MODEL, num_layers=12)


@pytest.mark.parametrize(("text", "share"), (("1%", 0.01), ("0.01", 0.01), (" 2.5% ", 0.025), ("0", 0.0), ("0%", 0.0)))
def test_shares_are_read(text, share):
    assert parse_share(text) == pytest.approx(share)
    assert SearchConfig(max_ppl_increase=text).limit == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "sentence"),
    (
        ("a bit", "'a bit' is no share of 0 or more; write it as 1% or 0.01"),
        ("-1%", "is no share of 0 or more"),
        ("nan", "is no share of 0 or more"),
        ("1", "may mean 1% or 100%; write a percent sign"),
    ),
)
def test_bad_shares(text, sentence):
    with pytest.raises(InputError, match=sentence):
        SearchConfig(max_ppl_increase=text)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    (
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"max_iters": 0}, "max_iters is 0"),
        ({"region_sizes": (1,)}, "must all be at least 2"),
        ({"tolerances": (1.5,)}, "lie between 0 and 1"),
    ),
)
def test_bad_fields(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        SearchConfig(**fields)


# -- Space -------------------------------------------------------------------------------------------------------------


def test_space_holds_what_can_gain_and_no_other():
    candidates = candidates_of(TWELVE, DEPTH)
    names = [candidate.name for candidate in candidates]
    assert names[0] == "seq" and len(set(names)) == len(names)
    assert {"idn:n=8,k=2", "sid:n=2,k=1", "idn:n=12,k=4", "idn:n=8,k=1,init=batch_forward", "pairs:n=8"} <= {*names}
    assert {"idn:4-8,k=1+idn:8-12,k=1", "idn:n=8,k=1,stage=4xF2", "idn:n=8,k=4,tol=0.2"} <= {*names}
    assert "idn:n=3,k=3" not in names, "K = N is exact, as deep as the sequential pass, and evaluates more"
    assert all(each.schedule.depth < 12 for each in candidates[1:] if not each.tolerance)
    assert all(parse_schedule(each.setting, 12) == each.schedule for each in candidates)
    streams = dataclasses.replace(TWELVE, num_streams=2, use_x0_resid=False)
    by_streams = [candidate.name for candidate in candidates_of(streams, DEPTH)]
    assert "hcn:n=8,k=1" in by_streams and not any(name.startswith("sid") for name in by_streams)


def test_space_of_decoding_keeps_to_what_the_cache_reproduces():
    candidates = candidates_of(dataclasses.replace(TWELVE, num_mtp_heads=2), SearchConfig(objective="decode"))
    assert not any(candidate.tolerance for candidate in candidates)
    drafters = [candidate for candidate in candidates if candidate.speculate]
    assert "mtp" in [candidate.speculate for candidate in drafters] and len(drafters) >= 3
    assert all(candidate.is_lossless for candidate in drafters)


def test_space_follows_sizes_and_calibrations():
    about = About("basis", 4, 12, 2, 64, 0, "", init="cal")
    search = SearchConfig(objective="depth", region_sizes=(4, 8), tolerances=())
    names = [candidate.name for candidate in candidates_of(TWELVE, search, {"mine": about})]
    assert "cal:4-12,k=2,init=cal,fit=mine" in names
    assert {name.split("n=")[1].split(",")[0] for name in names if "n=" in name} == {"4", "8"}
    with pytest.raises(InputError, match="region size 13 exceeds the model's 12 layers"):
        candidates_of(TWELVE, SearchConfig(region_sizes=(13,)))
    deep = [c.size for c in candidates_of(ModelConfig(num_layers=100), DEPTH)]
    assert 10 <= len(set(deep) - {0}) <= 14 and max(deep) == 100


def test_harder_is_more_layers_or_fewer_iterations_of_one_family():
    by_name = {candidate.name: candidate for candidate in candidates_of(TWELVE, DEPTH)}
    harder = lambda one, other: by_name[one].is_harder_than(by_name[other])  # noqa: E731
    assert harder("idn:n=8,k=1", "idn:n=8,k=2") and harder("idn:n=9,k=2", "idn:n=8,k=2")
    assert harder("idn:n=8,k=4,tol=0.5", "idn:n=8,k=4,tol=0.2")
    assert not harder("idn:n=9,k=3", "idn:n=8,k=2") and not harder("idn:n=8,k=2", "idn:n=8,k=2")
    assert not harder("sid:n=9,k=1", "idn:n=8,k=1")
    ladder = ("idn:n=8,k=1,stage=4xF2", "idn:n=8,k=1", "idn:4-8,k=1+idn:8-12,k=1", "pairs:n=8")
    assert all(harder(one, other) for one, other in itertools.pairwise(ladder))
    ladder = ("idn:n=8,k=1", "idn:n=8,k=1,init=batch_forward", "idn:n=8,k=2")
    assert all(harder(one, other) for one, other in itertools.pairwise(ladder))
    assert harder("idn:n=8,k=4,tol=0.2", "idn:n=8,k=4") and not harder("idn:n=8,k=4,tol=0.2", "idn:n=8,k=3")


# -- Costs -------------------------------------------------------------------------------------------------------------


def test_depth_cost_orders_by_depth_then_evaluations():
    cost = lambda text: depth_cost(parse_schedule(text, 12))  # noqa: E731
    assert cost("idn:n=8,k=1") < cost("idn:n=8,k=2") < cost("idn:n=9,k=3") < cost("seq")
    assert math.floor(cost("idn:n=12,k=4,init=batch_forward")) == 5


def test_cost_model_recovers_what_is_linear():
    """Times that are linear in the parts are predicted exactly, from a few of them."""
    candidates = candidates_of(TWELVE, SearchConfig(objective="prefill"))
    parts = [parts_of(candidate.schedule) for candidate in candidates]
    true = {"ends": 0.5, "layer": 1.0, "sweep": 0.3, "swept": 0.4, "fused": 0.5, "scan Identity": 0.05}
    true |= {"scan ScaledIdentity": 0.07}
    times = [sum(count * true[name] for name, count in each.items()) for each in parts]
    probes = choose_probes(parts)
    assert probes[0] == 0 and len(probes) == len(set(probes)) == len(true) + 3 < len(parts) / 5
    model = CostModel.fit([parts[i] for i in probes], [times[i] for i in probes])
    assert model.error < 1e-9  # least squares in float64
    np.testing.assert_allclose([model.predict(each) for each in parts], times, rtol=1e-6)
    assert model.ms == pytest.approx(true, rel=1e-6)


def test_cost_model_of_noisy_times_says_how_far_off_it_is():
    parts = [parts_of(candidate.schedule) for candidate in candidates_of(TWELVE, DEPTH)]
    rng = np.random.default_rng(0)
    times = [(0.5 + each["layer"] + 0.5 * each["swept"]) * rng.uniform(0.9, 1.1) for each in parts]
    probes = choose_probes(parts)
    model = CostModel.fit([parts[i] for i in probes], [times[i] for i in probes])
    assert 0.005 < model.error < 0.1, "the noise is uniform within 10 %"
    assert min(model.ms.values()) >= 0


def test_parts_count_iterations_that_were_made():
    schedule = parse_schedule("idn:n=8,k=4,tol=0.1", 12)
    assert parts_of(schedule, [1.5]) == {
        "ends": 1,
        "layer": 4,
        "sweep": 1.5,
        "swept": 12,
        "scan Identity": 12,
    }


# -- Race --------------------------------------------------------------------------------------------------------------

W = 256


def draw(change: float, seed: int, noise: float = 0.03) -> Sums:
    """Differences of 32 tokens a window with the given mean PPL change."""
    rng = np.random.default_rng(seed)
    d_W = math.log1p(change) + noise * rng.standard_normal(W)
    return Sums(32 * d_W, np.full(W, 32.0))


def race_of(changes: dict[str, float], limit: float = 0.01, seed: int = 0, noise: float = 0.03):
    """The winner's name, the race, and how many candidates were measured."""
    candidates = candidates_of(TWELVE, DEPTH)
    costs = [depth_cost(candidate.schedule) for candidate in candidates]
    race = Race(candidates, costs, limit, alpha=0.05, num_windows=W)
    drawn = [draw(changes[candidate.name], 1000 * seed + i, noise) for i, candidate in enumerate(candidates)]

    def measure(index, start, stop):
        return Sums(*(values[start:stop] for values in drawn[index])), None

    standing = race.run(measure)
    return candidates[standing[0]].name, race


def made_up(seed: int, is_monotone: bool = True) -> dict[str, float]:
    """Changes that grow with the region and fall with the iterations; with bumps where they need not."""
    rng, changes = np.random.default_rng(seed), {}
    for candidate in candidates_of(TWELVE, DEPTH):
        change = 0.02 * (candidate.size / 8) ** 3 / max(candidate.num_iters, 1) ** 2 * (1 + candidate.tolerance)
        changes[candidate.name] = 0.0 if candidate.is_lossless else change * (1 if is_monotone else rng.uniform(0.8, 1))
    return changes


@pytest.mark.parametrize("is_monotone", (True, False))
def test_race_never_drops_the_best(is_monotone):
    """Over 10 races none loses the best of those that keep four standard errors from the limit, nor passes one that is
    as far above."""
    for seed in range(10):
        changes = made_up(seed, is_monotone)
        # One standard error on all windows is 0.03 / 16: whoever lies within 0.008 of the limit may go either way.
        winner, race = race_of(changes, seed=seed)
        clear = [c for c in race.candidates if changes[c.name] < 0.002]
        best = min(clear, key=lambda candidate: depth_cost(candidate.schedule))
        cost = {candidate.name: depth_cost(candidate.schedule) for candidate in race.candidates}
        assert cost[winner] <= cost[best.name]
        assert changes[winner] < 0.018
        measured = len(race.sums)
        assert measured < len(race.candidates) / 4, f"{measured} of {len(race.candidates)} were measured"


def test_race_keeps_its_error_rates():
    """One candidate at the limit, and a cheaper one above it: each goes wrong in 5 % of races at most."""
    candidates = [c for c in candidates_of(TWELVE, DEPTH) if c.name in ("seq", "idn:n=4,k=1", "sid:n=8,k=1")]
    wrong = {"failed": 0, "passed": 0}
    num_races = 200
    for seed in range(num_races):
        sums = [draw(0, 0), draw(0.01, 2 * seed), draw(0.01 + 1e-9, 2 * seed + 1)]
        for index, name in ((1, "failed"), (2, "passed")):
            race = Race(candidates, [12.0, 9.0, 5.0], 0.01, alpha=0.05, num_windows=W)
            race.run(lambda i, a, b, sums=sums: (Sums(*(values[a:b] for values in sums[i])), None))
            status = race.statuses()[index]
            wrong[name] += status == name
    # 5 % of 200 is 10 at most by the union bound; 20 or more has probability below 0.3 %.
    assert max(wrong.values()) < 20, wrong


def test_bounds_cover_and_know_exactness():
    exact = Sums(np.zeros(16), np.ones(16)).bounds(0.01)
    assert exact == Bounds(0.0, 0.0, 0.0)
    assert draw(0.02, 1).bounds(0.025).low < 0.02 < draw(0.02, 1).bounds(0.025).high
    assert Sums(np.ones(1), np.ones(1)).bounds(0.05).high == math.inf
    rng = np.random.default_rng(0)
    weight = rng.uniform(0, 2, 64)
    missed = 0
    for _ in range(200):
        low, _, high = Sums(weight * (0.02 + 0.05 * rng.standard_normal(64)), weight).bounds(0.05)
        missed += not low < math.expm1(0.02) < high
    assert 5 <= missed <= 40, "10 % of 200 with a binomial's room"


def test_limit_of_nothing_leaves_the_sequential_pass():
    winner, race = race_of(made_up(0), limit=0.0, noise=1e-4)
    assert winner == "seq"
    assert set(race.statuses()) <= {"passed", "failed", "implied", "beaten", "undecided"}
    winner, _ = race_of(dict.fromkeys(made_up(0), 0.0) | {"idn:n=12,k=1": -0.05}, limit=0.0, noise=1e-4)
    assert winner == "idn:n=12,k=1", "better than the sequential pass is within any limit"


def test_refuted_winner_gives_way_to_what_it_had_beaten():
    winner, race = race_of(made_up(0))
    first = next(i for i, candidate in enumerate(race.candidates) if candidate.name == winner)
    race.refuted.add(first)
    drawn = [draw(made_up(0)[candidate.name], i) for i, candidate in enumerate(race.candidates)]
    again = race.run(lambda i, a, b: (Sums(*(values[a:b] for values in drawn[i])), None))
    assert race.statuses()[first] == "refuted" and race.costs[again[0]] >= race.costs[first]


def test_slack_keeps_what_may_be_as_cheap():
    names = ("seq", "idn:n=8,k=2", "idn:n=8,k=3", "idn:n=8,k=4")
    candidates = [candidate for candidate in candidates_of(TWELVE, DEPTH) if candidate.name in names]
    race = Race(candidates, [10.0, 5.0, 5.2, 8.0], 0.01, alpha=0.05, num_windows=32, slack=0.1)
    standing = race.run(lambda i, a, b: (Sums(np.zeros(b - a), np.ones(b - a)), None))
    assert standing == [1, 2] and race.statuses()[0] == race.statuses()[3] == "beaten"


def test_rungs_double():
    assert rungs_of(128) == (16, 32, 64, 128) and rungs_of(100) == (16, 32, 64, 100)
    assert rungs_of(16) == (16,) and rungs_of(5) == (5,)
