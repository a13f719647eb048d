"""Neural block linearization: measure every candidate, replace the best, again until enough are replaced.

rank by          lowest first
heldout          NMSE with the residual, of text that the maps were not fitted to
nmse_residual    the same of the text that they were fitted to
nmse             the same without the residual, tr(C_yy) alone below the line
cca              the authors' bound (:func:`snlp_jax.linearize.maps.cca_bound`)
random           a control
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from snlp_jax.config import LinearizeConfig
from snlp_jax.errors import InputError
from snlp_jax.linearize.maps import BranchMap, cca_bound, check_samples, fit_map, nmse
from snlp_jax.linearize.replace import replace
from snlp_jax.linearize.statistics import Batches, Branch, Place, branch_moments, check_wanted, whole_layers
from snlp_jax.model import LanguageModel
from snlp_jax.types import Params

ORDER: tuple[Branch, ...] = ("block", "attention", "mlp")
"""In which branches are chosen: what takes most of a layer first."""


@dataclass(frozen=True)
class Candidate:
    """What a map in place of a branch would do; a row of the table."""

    layer: int
    branch: Branch
    ridge: float
    condition: float
    """Of C_xx."""
    nmse: float
    nmse_residual: float
    held_out: float
    """NMSE with the residual."""
    cca_bound: float
    fit: BranchMap

    @property
    def place(self) -> Place:
        return self.branch, self.layer

    def row(self) -> dict[str, Any]:
        """For a report: all but the map, an infinite condition as None."""
        row = dict(vars(self), condition=self.condition if math.isfinite(self.condition) else None)
        del row["fit"]
        return row

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
    on_batch: Callable[[], None] = lambda: None,
    on_round: Callable[[Round], None] = lambda _: None,
) -> Linearized:
    """Replace, or with ``config.drop`` drop, as many branches as ``config`` asks for.

    One shot chooses all from one pass over the text, as the authors do; ``greedy`` takes the statistics of what remains
    on the model so far, ``config.every`` replacements at a time.

    Args:
        fit, held_out: different text; the second chooses ridges and, by default, ranks.
        on_batch: called after every batch of a pass, of which there are ``num_passes``.

    Raises:
        InputError: see :func:`check_linearize`, :func:`snlp_jax.linearize.statistics.branch_moments`.
    """
    check_linearize(model, config)
    rounds = []
    for number, counts in enumerate(_rounds(config)):
        places = {branch: whole_layers(model, branch) for branch in counts}
        candidates = measure(model, params, fit, held_out, places, config, mesh=mesh, on_batch=on_batch)
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
    maps = {each.place: each.fit.affine for each in candidates if each.place in chosen and not drop}
    new: dict[str, dict[int, Any]] = {"attention": {}, "mlp": {}}
    for branch, layer in chosen:
        if branch == "block":
            new["attention"][layer] = None
        new["mlp" if branch == "block" else branch][layer] = maps.get((branch, layer))
    config, params = replace(model.config, params, **new, rank=rank)
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
    on_batch: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """The map of every place and what it leaves, from a pass over both texts for each ``config.layers_at_once``."""
    layers = sorted({layer for each in places.values() for layer in each})
    step = config.layers_at_once or max(len(layers), 1)
    found = []
    for start in range(0, len(layers), step):
        part = layers[start : start + step]
        wanted = {branch: [layer for layer in each if layer in part] for branch, each in places.items()}
        fitted, other = (
            branch_moments(model, params, text, wanted, skip_first=config.skip_first, mesh=mesh, on_batch=on_batch)
            for text in (fit, held_out)
        )
        for (branch, layer), moments in fitted.items():
            check_samples(int(moments.count), model.config.embed_dim)
            unseen = other.pop((branch, layer))
            best = fit_map(moments, unseen, ridge=config.ridge, shrinkage=config.shrinkage, rank=config.rank)
            errors = nmse(best, moments), nmse(best, moments, residual=True), nmse(best, unseen, residual=True)
            found.append(Candidate(layer, branch, best.ridge, best.condition, *errors, cca_bound(moments), best))
    return found


def choose(
    candidates: Sequence[Candidate], counts: dict[Branch, int], config: LinearizeConfig, *, seed: int = 0
) -> tuple[Place, ...]:
    """The best of every branch, whole blocks first, of whose layers the others then keep off; of equals the deeper."""
    chosen: list[Place] = []
    for branch in (name for name in ORDER if name in counts):
        taken = {layer for name, layer in chosen if name == "block"}
        free = [each for each in candidates if each.branch == branch and each.layer not in taken]
        if config.rank_by == "random":
            order = np.random.default_rng([seed, ORDER.index(branch)]).permutation(len(free))
            free = [free[i] for i in order]
        else:
            free.sort(key=lambda each: (each.score(config.rank_by), -each.layer))
        chosen += [each.place for each in free[: counts[branch]]]
    return tuple(chosen)


def check_linearize(model: LanguageModel, config: LinearizeConfig) -> None:
    """Refuse what a model cannot lose.

    Raises:
        InputError: more branches than there are, a rank above the width or unlike that of the maps which the model has.
    """
    width, num_blocks = model.config.embed_dim, config.blocks
    for flag, branch, count in (
        ("--blocks", "block", num_blocks),
        ("--attention", "attention", config.attention + num_blocks),
        ("--mlp", "mlp", config.mlp + num_blocks),
    ):
        have = len(whole_layers(model, branch))  # type: ignore[arg-type]
        if count > have:
            rest = f" besides the {num_blocks} of --blocks" if num_blocks and branch != "block" else ""
            wanted = count if branch == "block" else count - num_blocks
            raise InputError(f"{flag} is {wanted}{rest}, but the model has {have} whole {branch}s; lower it.")
    if num_blocks:
        check_wanted(model, {"block": whole_layers(model, "block")})
    if config.rank > width:
        raise InputError(f"--rank is {config.rank}, but the model's width is {width}; lower it, or give 0.")
    has_maps = bool(model.config.linear_attention or model.config.linear_mlp)
    if has_maps and not config.drop and config.rank != model.config.linear_rank:
        raise InputError(
            f"--rank is {config.rank}, but the model has maps of rank {model.config.linear_rank} already; give that."
        )


def num_passes(model: LanguageModel, config: LinearizeConfig) -> int:
    """Passes over both texts in all rounds, at most."""
    num_layers = model.config.num_layers
    return len(_rounds(config)) * -(-num_layers // (config.layers_at_once or num_layers))


def _rounds(config: LinearizeConfig) -> list[dict[Branch, int]]:
    """How many of each branch are chosen at once, time after time."""
    asked: dict[Branch, int] = {"block": config.blocks, "attention": config.attention, "mlp": config.mlp}
    counts = {branch: count for branch, count in asked.items() if count}
    if not config.greedy:
        return [counts]
    starts = [(branch, start) for branch, count in counts.items() for start in range(0, count, config.every)]
    return [{branch: min(config.every, counts[branch] - start)} for branch, start in starts]
