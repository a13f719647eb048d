"""The settings that a search chooses from: lines of settings that differ in their number of layers alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snlp_jax.checks import check_schedule
from snlp_jax.config import ModelConfig, SearchConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import mean_cost
from snlp_jax.infer import ngram
from snlp_jax.infer.rules import CacheRule, check_settings
from snlp_jax.linearize import About
from snlp_jax.notation import parse_schedule, registered
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
    draft_len: int = 0
    """Drafts a round that are timed; 0 without a drafter."""

    @property
    def name(self) -> str:
        return f"{self.setting}, drafts of {self.speculate}" if self.speculate else self.setting

    @property
    def num_layers(self) -> int:
        """From the first region's start to the last one's end."""
        regions = self.schedule.regions
        return regions[-1].stop - regions[0].start if regions else 0

    @property
    def is_lossless(self) -> bool:
        """Whether its text is that of the sequential pass by construction."""
        return self.schedule.is_sequential

    @property
    def rule(self) -> CacheRule:
        """The cache rule under which the decoded text has the perplexity of whole windows, where there is one."""
        return "last_eval" if any(region.tolerance > 0 for region in self.schedule.regions) else "per_iteration"

    @property
    def least_cost(self) -> tuple[float, float]:
        """Dependent block evaluations and all of them, where a tolerance stops every iteration after the first."""
        regions = self.schedule.regions
        return mean_cost(self.schedule, [1 if region.tolerance else region.num_iters for region in regions])


@dataclass(frozen=True)
class Line:
    """Settings of one form, the fewest layers first."""

    family: str
    """Lines of one family come with ever more iterations, so that each keeps at least what the one before it keeps."""
    candidates: tuple[Candidate, ...]


def lines_of(model: ModelConfig, search: SearchConfig, calibrations: Mapping[str, About]) -> list[Line]:
    """Every setting of the space that the model can run.

    Left out is what has no fewer dependent evaluations than the sequential pass, K >= N (which is exact) among it: it
    evaluates more blocks besides, and so cannot be faster by any objective. For objective ``decode`` the cache keeps
    every evaluation, because then the decoded text has the perplexity that is measured on whole windows; settings for
    which that does not hold are left out too.

    Args:
        calibrations: those that were fitted to the checkpoint, by name.

    Raises:
        InputError: a region size larger than the model.
    """
    num_layers, largest = model.num_layers, max(search.region_sizes, default=0)
    if largest > num_layers:
        raise InputError(f"region size {largest} exceeds the model's {num_layers} layers; give at most {num_layers}.")
    step = -(-num_layers // NUM_SIZES)
    sizes = sorted(set(search.region_sizes)) or sorted({*range(max(step, 2), num_layers + 1, step), num_layers})
    settings = [*_forms(model, search, sizes)]
    for name, about in calibrations.items():
        stage, init = f",stage={about.stage}" if about.stage else "", about.init or "h0"
        settings.append(("", [f"cal:{about.start}-{about.stop},k={about.num_iters},init={init},fit={name}{stage}"]))
    lines = []
    for family, texts in settings:
        candidates = [Candidate(text, parse_schedule(text, num_layers)) for text in texts]
        shallow = [candidate for candidate in candidates if candidate.least_cost[0] < num_layers]
        can_run = tuple(each for each in shallow if _can_run(model, each.schedule, search.objective == "decode"))
        lines += [Line(family, can_run)] if can_run else []
    return lines


def lossless_of(model: ModelConfig, search: SearchConfig) -> list[Candidate]:
    """The sequential pass; for decoding also with drafts of the text, of few layers, of the solver, and of the model's
    heads."""
    L, sequential = model.num_layers, Schedule.of(model.num_layers)
    if search.objective != "decode":
        return [Candidate("seq", sequential)]
    drafters = [f"skip:{start}-{L - 1}" for start in sorted({max(1, L // 4), max(1, L // 2)}) if start < L - 1]
    drafters += [f"idn:n={max(2, 3 * L // 4)},k=1"] if L > 2 else []
    found = [Candidate("seq", sequential), *(Candidate("seq", sequential, each, DRAFT_LEN) for each in drafters)]
    found.append(Candidate("seq", sequential, "ngram", ngram.DRAFT_LEN))
    num_heads = model.num_mtp_heads
    return [*found, Candidate("seq", sequential, "mtp", min(DRAFT_LEN, num_heads))] if num_heads else found


def _forms(model: ModelConfig, search: SearchConfig, sizes: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """Family and settings of each line."""
    L, most = model.num_layers, search.max_iters
    corrections = ("hcn", "idn") if model.num_streams else ("idn", "sid") if model.use_x0_resid else ("idn",)
    for name in (*corrections, *registered()):
        for init in ("", ",init=batch_forward"):
            for k in range(1, most + 1):
                yield name + init, [f"{name}:n={n},k={k}{init}" for n in sizes if k <= n]
        for tolerance in search.tolerances:
            yield "", [f"{name}:n={n},k={min(most, n)},tol={tolerance:g}" for n in sizes]
    name = corrections[0]
    halves = [(L - n, L - n // 2) for n in sizes if n >= 4]
    for k in range(1, min(MAX_CUT_ITERS, most) + 1):
        yield "halves", [f"{name}:{first}-{middle},k={k}+{name}:{middle}-{L},k={k}" for first, middle in halves]
        yield "fused", [f"{name}:n={n},k={k},stage={n // 2}xF2" for n in sizes if n >= 4 and n % 2 == 0]
    yield "", [f"pairs:n={n}" for n in sizes if n % 2 == 0]


def _can_run(model: ModelConfig, schedule: Schedule, is_decode: bool) -> bool:
    try:
        check_schedule(model, schedule)
        if is_decode:
            check_settings(schedule, "per_iteration")
    except InputError:
        return False
    return True
