"""Neural block linearization: measure every candidate, replace the best, again until enough are replaced.

rank by          lowest first
heldout          NMSE with the residual, of text that the maps were not fitted to
nmse_residual    the same of the text that they were fitted to
nmse             the same without the residual, tr(C_yy) alone below the line
cca              the authors' bound (:func:`snlp_jax.linearize.maps.cca_bound`)
random           a control
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from snlp_jax.config import LinearizeConfig
from snlp_jax.errors import InputError
from snlp_jax.linearize.maps import BranchMap, cca_bound, check_samples, fit_map, nmse
from snlp_jax.linearize.replace import check_rank, replace
from snlp_jax.linearize.statistics import PARTS, Batches, Branch, Place, branch_moments, whole_layers
from snlp_jax.memory import free_host_bytes
from snlp_jax.model import LanguageModel
from snlp_jax.seeds import folded
from snlp_jax.types import Params


@dataclass(frozen=True)
class Candidate:
    """What a map in place of a branch would do; a row of the table."""

    layer: int
    branch: Branch
    fit: BranchMap
    nmse: float
    nmse_residual: float
    held_out: float
    """NMSE with the residual."""
    cca_bound: float

    @property
    def place(self) -> Place:
        return self.branch, self.layer

    def row(self) -> dict[str, Any]:
        """For a report: all but the map itself, an infinite condition as None."""
        condition = self.fit.condition if math.isfinite(self.fit.condition) else None
        numbers = {name: value for name, value in vars(self).items() if name != "fit"}
        return numbers | {"ridge": self.fit.ridge, "condition": condition}

    def score(self, rank_by: str) -> float:
        names = {"heldout": "held_out", "cca": "cca_bound"}
        return float(getattr(self, names.get(rank_by, rank_by)))


class Round(NamedTuple):
    """The candidates of one choice, in order of depth, and those that were chosen, best first."""

    candidates: tuple[Candidate, ...]
    chosen: tuple[Place, ...]


class Linearized(NamedTuple):
    """The model with its new branches, and how they were chosen."""

    model: LanguageModel
    params: Params
    rounds: tuple[Round, ...]


def linearize(
    model: LanguageModel,
    params: Params,
    fit: Batches,
    held_out: Batches,
    config: LinearizeConfig,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_round: Callable[[Round], None] = lambda _: None,
) -> Linearized:
    """Replace, or with ``config.drop`` drop, as many branches as ``config`` asks for.

    One shot chooses all from one pass over the text, as the authors do; ``greedy`` takes the statistics of what remains
    on the model so far, ``config.every`` replacements at a time.

    Args:
        fit, held_out: different text; the second chooses ridges and, by default, ranks.
        on_step: called after every batch of a pass and every map that was fitted, see :func:`num_steps`.

    Raises:
        InputError: see :func:`check_linearize`, :func:`snlp_jax.linearize.statistics.branch_moments`.
    """
    check_linearize(model, config)
    rounds = []
    for number, counts in enumerate(_rounds(config)):
        places = {branch: whole_layers(model, branch) for branch in counts}
        candidates = measure(model, params, fit, held_out, places, config, mesh=mesh, on_step=on_step)
        chosen = choose(candidates, counts, config, seed=config.seed + number)
        model, params = apply(model, params, candidates, chosen, drop=config.drop, rank=config.rank)
        rounds.append(Round(tuple(sorted(candidates, key=lambda each: each.layer)), chosen))
        on_round(rounds[-1])
    return Linearized(model, params, tuple(rounds))


def apply(
    model: LanguageModel,
    params: Params,
    candidates: Sequence[Candidate],
    chosen: Sequence[Place],
    *,
    drop: bool = False,
    rank: int = 0,
) -> tuple[LanguageModel, Params]:
    """The model with the maps of the chosen candidates in place of their branches, or with nothing there.

    ``rank`` is what the maps were fitted with.
    """
    maps = {each.place: None if drop else each.fit.affine for each in candidates if each.place in chosen}
    attention = {layer: new for (branch, layer), new in maps.items() if branch == "attention"}
    attention |= {layer: None for branch, layer in chosen if branch == "block"}
    mlp = {layer: new for (branch, layer), new in maps.items() if branch != "attention"}
    config, params = replace(model.config, params, attention=attention, mlp=mlp, rank=rank)
    return LanguageModel(config, model.machine, backend=model.backend), params


def measure(
    model: LanguageModel,
    params: Params,
    fit: Batches,
    held_out: Batches,
    places: Mapping[Branch, Sequence[int]],
    config: LinearizeConfig,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """The map of every place and what it leaves, from a pass over both texts for each ``config.layers_at_once``."""
    layers = sorted({layer for each in places.values() for layer in each})
    step = layers_at_once(model, config)
    found = []
    run = functools.partial(branch_moments, skip_first=config.skip_first, mesh=mesh, on_batch=on_step)
    for start in range(0, len(layers), step):
        part = layers[start : start + step]
        wanted = {branch: [layer for layer in each if layer in part] for branch, each in places.items()}
        fitted, other = (run(model, params, text, wanted) for text in (fit, held_out))
        for (branch, layer), moments in fitted.items():
            check_samples(int(moments.count), model.config.embed_dim)
            unseen = other[branch, layer]
            best = fit_map(moments, unseen, ridge=config.ridge, shrinkage=config.shrinkage, rank=config.rank)
            errors = nmse(best, moments), nmse(best, moments, residual=True), nmse(best, unseen, residual=True)
            found.append(Candidate(layer, branch, best, *errors, cca_bound(moments.with_residual())))
            on_step()
    return found


def choose(
    candidates: Sequence[Candidate], counts: dict[Branch, int], config: LinearizeConfig, *, seed: int = 0
) -> tuple[Place, ...]:
    """The best of every branch, whole blocks first, of whose layers the others then keep off; of equals the deeper."""
    chosen: list[Place] = []
    for position, branch in enumerate(PARTS):
        taken = {layer for name, layer in chosen if name == "block"}
        free = [each for each in candidates if each.branch == branch and each.layer not in taken]
        if config.rank_by == "random":
            order = np.random.default_rng([folded(seed), position]).permutation(len(free))
            free = [free[i] for i in order]
        else:
            free.sort(key=lambda each: (each.score(config.rank_by), -each.layer))
        chosen += [each.place for each in free[: counts.get(branch, 0)]]
    return tuple(chosen)


def check_linearize(model: LanguageModel, config: LinearizeConfig) -> None:
    """Refuse what a model cannot lose.

    Raises:
        InputError: more branches than there are, blocks of a model with residual streams, a rank above the width or
            unlike that of the maps which the model has.
    """
    width = model.config.embed_dim
    if config.blocks and model.config.num_streams:
        raise InputError("a block on several residual streams is no map of one; linearise attention or MLPs.")
    for branch, count in _counts(config).items():
        flag, others = ("blocks", 0) if branch == "block" else (branch, config.blocks)
        have = len(whole_layers(model, branch))
        if count + others > have:
            rest = f" besides the {others} of --blocks" if others else ""
            raise InputError(f"--{flag} is {count}{rest}, but the model has {have} whole {branch}s; lower it.")
    if config.rank > width:
        raise InputError(f"--rank is {config.rank}, but the model's width is {width}; lower it, or give 0.")
    if not config.drop:
        check_rank(model.config, config.rank)


def num_steps(model: LanguageModel, config: LinearizeConfig, num_batches: int) -> int:
    """Batches of all passes over both texts, of which there are ``num_batches``, and maps of all rounds, at most."""
    num_layers = model.config.num_layers
    num_passes = -(-num_layers // layers_at_once(model, config))
    return sum(num_passes * num_batches + num_layers * len(counts) for counts in _rounds(config))


def layers_at_once(model: LanguageModel, config: LinearizeConfig) -> int:
    """Layers whose statistics are held at once: as many as were asked for, or else as half of the free memory holds."""
    if config.layers_at_once:
        return config.layers_at_once
    most = free_host_bytes() // 2 // layer_bytes(model, config)
    return min(max(most, 1), model.config.num_layers)


def layer_bytes(model: LanguageModel, config: LinearizeConfig) -> int:
    """What the statistics of a layer take on the host while they are gathered: of each branch three matrices in float64
    for the text that is done and for the text at hand, these again while a batch is merged into them, and the batch's
    in float32."""
    matrix, num_branches = model.config.embed_dim**2, len(_counts(config))
    return num_branches * 3 * matrix * (3 * 8 + 4)


def statistics_bytes(model: LanguageModel, config: LinearizeConfig) -> int:
    """That of the layers at once, and the maps of all candidates in float64, which are kept until some are chosen."""
    maps = 8 * model.config.num_layers * len(_counts(config)) * model.config.embed_dim**2
    return layers_at_once(model, config) * layer_bytes(model, config) + maps


def _counts(config: LinearizeConfig) -> dict[Branch, int]:
    """How many of each branch are asked for, in the order in which they are chosen."""
    counts: dict[Branch, int] = {"block": config.blocks, "attention": config.attention, "mlp": config.mlp}
    return {branch: count for branch, count in counts.items() if count}


def _rounds(config: LinearizeConfig) -> list[dict[Branch, int]]:
    """How many of each branch are chosen at once, time after time."""
    counts = _counts(config)
    if not config.greedy:
        return [counts]
    starts = [(branch, start) for branch, count in counts.items() for start in range(0, count, config.every)]
    return [{branch: min(config.every, counts[branch] - start)} for branch, start in starts]
