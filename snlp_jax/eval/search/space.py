"""The settings that a search chooses from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from snlp_jax.config import ModelConfig, Objective, SearchConfig
from snlp_jax.errors import InputError
from snlp_jax.infer.rules import CacheRule, check_settings
from snlp_jax.layout import check_schedule
from snlp_jax.linearize import About
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule

NUM_SIZES = 12
"""About so many region sizes, where none are asked for."""
MAX_CUT_ITERS = 2
"""Most iterations of regions that are cut in two and of fused ones."""
DRAFT_LEN = 4
"""Drafts a round."""


@dataclass(frozen=True)
class Candidate:
    """A setting, or the sequential pass with a drafter."""

    setting: str
    schedule: Schedule
    speculate: str = ""
    family: str = ""
    """The correction; candidates of one family are ordered by what follows."""
    size: int = 0
    """Layers from the first region's start to the last one's end."""
    num_iters: int = 0
    tolerance: float = 0.0
    guess_iters: float = 0.0
    """Iterations that the guess is worth: an evaluation without a correction counts as half of one."""
    coupling: int = 0
    """How much is solved at once: pairs of layers, two regions, one, one of fused layers."""

    @property
    def name(self) -> str:
        return f"{self.setting}, drafts of {self.speculate}" if self.speculate else self.setting

    @property
    def is_lossless(self) -> bool:
        """Whether its text is that of the sequential pass by construction."""
        return self.schedule.is_sequential

    def is_harder_than(self, other: "Candidate") -> bool:
        """Whether it asks more of the model than another of its family: no fewer layers, no more iterations, no sharper
        tolerance, no smaller regions.

        A guide, no theorem: a model may have been trained for the larger region.
        """
        mine = (self.size, -self.num_iters - self.guess_iters, self.tolerance, self.coupling)
        its = (other.size, -other.num_iters - other.guess_iters, other.tolerance, other.coupling)
        return self.family == other.family != "" and mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


def candidates_of(
    model: ModelConfig, search: SearchConfig, calibrations: Mapping[str, About] | None = None
) -> list[Candidate]:
    """The sequential pass, then every setting of the space that the model can run.

    Left out is what has no fewer dependent evaluations than the sequential pass, K >= N (which is exact) among it: it
    evaluates more blocks besides, and so cannot be faster by any objective. For objective ``decode`` the cache keeps
    every evaluation, because then the decoded text has the perplexity that is measured on whole windows; settings for
    which that does not hold are left out too.

    Args:
        calibrations: those that were fitted to the checkpoint, by name.

    Raises:
        InputError: a region size larger than the model.
    """
    L = model.num_layers
    too_large = [size for size in search.region_sizes if size > L]
    if too_large:
        raise InputError(f"region size {too_large[0]} exceeds the model's {L} layers; give at most {L}.")
    found = {"seq": Candidate("seq", Schedule.of(L))}
    for text, family, size, num_iters, tolerance, coupling in _texts(model, search, calibrations or {}):
        schedule = parse_schedule(text, L)
        guess = 0.5 * max(region.init.num_evals for region in schedule.regions)
        # Iterations that stop by themselves may stop after the first.
        fewest = schedule.depth - (num_iters - 1 if tolerance else 0)
        if fewest >= L or not _can_run(model, schedule, search.objective):
            continue
        found.setdefault(text, Candidate(text, schedule, "", family, size, num_iters, tolerance, guess, coupling))
    drafters = _drafters(model) if search.objective == "decode" else ()
    return [*found.values(), *(Candidate("seq", Schedule.of(L), drafter) for drafter in drafters)]


def region_sizes(num_layers: int) -> tuple[int, ...]:
    """About ``NUM_SIZES`` numbers of layers, evenly spaced, all of them among these."""
    step = -(-num_layers // NUM_SIZES)
    return tuple(sorted({*range(max(step, 2), num_layers + 1, step), num_layers}))


def rule_of(schedule: Schedule) -> CacheRule:
    """The cache rule under which the decoded text has the perplexity of whole windows, where there is one."""
    return "last_eval" if any(region.tolerance > 0 for region in schedule.regions) else "per_iteration"


def _texts(
    model: ModelConfig, search: SearchConfig, calibrations: Mapping[str, About]
) -> Iterator[tuple[str, str, int, int, float, int]]:
    """Setting, family, size, iterations, tolerance and coupling."""
    L, sizes = model.num_layers, sorted(set(search.region_sizes)) or region_sizes(model.num_layers)
    corrections = ("hcn", "idn") if model.num_streams else ("idn", "sid") if model.use_x0_resid else ("idn",)
    for name in corrections:
        for n in sizes:
            for k in range(1, min(search.max_iters, n) + 1):
                yield f"{name}:n={n},k={k}", name, n, k, 0.0, 2
                yield f"{name}:n={n},k={k},init=batch_forward", name, n, k, 0.0, 2
            for tolerance in search.tolerances:
                most = min(search.max_iters, n)
                yield f"{name}:n={n},k={most},tol={tolerance:g}", name, n, most, tolerance, 2
    name = corrections[0]
    for n in sizes:
        first, middle = L - n, L - n // 2
        for k in range(1, min(MAX_CUT_ITERS, search.max_iters) + 1):
            if n >= 4:
                yield f"{name}:{first}-{middle},k={k}+{name}:{middle}-{L},k={k}", name, n, k, 0.0, 1
            if n >= 4 and n % 2 == 0:
                yield f"{name}:n={n},k={k},stage={n // 2}xF2", name, n, k, 0.0, 3
        if n % 2 == 0:
            yield f"pairs:n={n}", "idn", n, 1, 0.0, 0
    for fit, about in calibrations.items():
        stage = f",stage={about.stage}" if about.stage else ""
        head = f"cal:{about.start}-{about.stop},k={about.num_iters},init={about.init or 'h0'},fit={fit}{stage}"
        yield head, "", about.stop - about.start, about.num_iters, 0.0, 2


def _can_run(model: ModelConfig, schedule: Schedule, objective: Objective) -> bool:
    try:
        check_schedule(model, schedule)
        if objective == "decode":
            check_settings(schedule, "per_iteration")
    except InputError:
        return False
    return True


def _drafters(model: ModelConfig) -> tuple[str, ...]:
    """Few layers, the solver's own drafts, and the model's heads."""
    L = model.num_layers
    few = [f"skip:{start}-{L - 1}" for start in sorted({max(1, L // 4), max(1, L // 2)}) if start < L - 1]
    own = [f"idn:n={max(2, 3 * L // 4)},k=1"] if L > 2 else []
    return (*few, *own, *(["mtp"] if model.num_mtp_heads else []))
