"""A controlled study: one model trained under many losses, and the plain models that each is compared with."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snlp_jax.config import Config, ModelConfig, SolverTerm, load_binding
from snlp_jax.config.check import require
from snlp_jax.errors import InputError
from snlp_jax.train.flops import run_flops


@dataclass(frozen=True)
class Study:
    """Arms x seeds of one base config, screened with one short run each; the best go on to equal steps and equal FLOPs.

    A config file binds ``study = Study(...)`` and benchmarks/study.py runs it. Beside the arms stand plain models that
    are shallower and wider, with as many parameters in their blocks: ``shallow_D`` has D layers.
    """

    base: Config
    """A plain model; ``train.num_steps`` are those of a final run."""
    arms: Mapping[str, Mapping[str, Any]]
    """Name -> overrides of the base, nested: ``{"loss": {"hidden_norm": {"weight": 0.5}}}``; ``{}`` is the base."""
    depths: tuple[int, ...]
    """Dependent depths at which every run is evaluated."""
    main_depth: int
    """The one that arms are ranked by; its shallow twin has all the seeds, those of other depths the first one."""
    iterations: tuple[int, ...] = (1, 2, 3, 4)
    """Solver iterations k; the region that gives depth d has the last L - d + k layers."""
    text: str = "builtin"
    """``data.source``, relative to the root of the repository; the builtin corpus where it does not exist."""
    screen_steps: int = 250
    screen_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    num_finalists: int = 4
    finalists: tuple[str, ...] = ()
    """Arms that go on, named in advance; empty: the best of the screen."""
    has_shallow: bool = True
    head_multiple: int = 2
    """Head sizes of the shallow twins are multiples of it."""
    workers: int = 1
    """Runs at a time, each with its share of the cores."""
    plot: str = "docs/study.png"

    def __post_init__(self) -> None:
        L = self.base.model.num_layers
        require(not self.base.loss.terms, "the base of a study is a plain model; move its loss terms into arms.")
        for depth in self.depths:
            require(1 <= depth < L, f"the study's depth {depth} is not below the {L} layers of its base.")
            require(
                len(self._regions(depth)) > 0, f"no region of {L} layers gives depth {depth}; add k=1 to iterations."
            )
        require(self.main_depth in self.depths, f"main_depth {self.main_depth} is not one of {self.depths}.")
        for field in ("depths", "iterations", "seeds"):
            values = getattr(self, field)
            require(len(set(values)) == len(values) > 0, f"the study's {field} {values} are empty or repeat a value.")
        require(self.screen_steps >= 1, f"screen_steps is {self.screen_steps}; it must be at least 1.")
        require(self.num_finalists >= 1, f"num_finalists is {self.num_finalists}; it must be at least 1.")
        require(self.workers >= 1, f"workers is {self.workers}; it must be at least 1.")
        for arm in (*self.arms, *self.finalists):
            self.reference(arm)
        require(self.plain in self.arms, "the study has no plain arm; add one with no overrides.")

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shallow(self) -> dict[str, int]:
        """Name -> layers of the shallow, wide twins."""
        return {f"shallow_{depth}": depth for depth in self.depths} if self.has_shallow else {}

    @property
    def plain(self) -> str:
        """The arm that is the base itself."""
        return next((arm for arm, overrides in self.arms.items() if not overrides), "")

    def config(self, arm: str) -> Config:
        """The arm's config; ``eval.solvers`` are its settings of every depth, then the controls.

        Raises:
            InputError: no such arm, or an override that names no field.
        """
        known = (*self.arms, *self.shallow)
        require(arm in known, f"unknown arm {arm!r}; choose among {', '.join(known)}.")
        if arm in self.shallow:
            model = widened(self.base.model, self.shallow[arm], self.head_multiple)
            return _with_solvers(dataclasses.replace(self.base, model=model), ("seq",))
        config = override(self.base, self.arms[arm], f"arm {arm!r}")
        solvers = (text for settings in self.settings(config).values() for text in settings)
        controls = (text for depth in self.depths for text in self.controls(depth))
        return _with_solvers(config, tuple(dict.fromkeys((*solvers, *controls))))

    def reference(self, arm: str) -> str:
        """The plain arm that this one is compared with: the same model without loss terms; the base for shallow twins.

        Raises:
            InputError: the study has none.
        """
        if arm in self.shallow:
            return self.plain
        require(arm in self.arms, f"unknown arm {arm!r}; choose among {', '.join(self.arms)}.")
        without_loss = {name: value for name, value in self.arms[arm].items() if name != "loss"}
        for plain, overrides in self.arms.items():
            if overrides == without_loss:
                return plain
        raise InputError(f"arm {arm!r} has no plain twin; add an arm with the overrides {without_loss} and no loss.")

    def settings(self, config: Config) -> dict[int, tuple[str, ...]]:
        """Depth -> solver settings of that depth: of the correction that fits the model and of those trained for.

        A model that is trained to be skipped counts that as a setting of its own.
        """
        model = config.model
        fitting = "hcn" if model.num_streams else "sid" if model.use_x0_resid else "idn"
        terms = config.loss.terms
        trained = [term.correction for term in terms.values() if isinstance(term, SolverTerm)]
        found = {}
        for depth in self.depths:
            names = dict.fromkeys((fitting, *trained))
            texts = (f"{name}:n={n},k={k}" for name in names for n, k in self._regions(depth))
            found[depth] = (*texts, *(self.controls(depth)[:1] if "layer_skip" in terms else ()))
        return found

    def controls(self, depth: int) -> tuple[str, ...]:
        """Trivial passes of the same depth: layers left out, the head early, and layers two by two where they can."""
        left_out = self.base.model.num_layers - depth
        pairs = (f"pairs:n={2 * left_out}",) if 2 * left_out <= self.base.model.num_layers else ()
        return (f"skip:n={left_out}", f"exit:{depth}", *pairs)

    def _regions(self, depth: int) -> list[tuple[int, int]]:
        """(n, k) with L - n + k = depth and k <= n <= L."""
        L = self.base.model.num_layers
        return [(L - depth + k, k) for k in self.iterations if k <= depth]


def load_study(path: str | Path) -> Study:
    """Run a config file and return its ``study``."""
    return load_binding(path, "study", Study)


def override(value: Any, overrides: Mapping[str, Any], where: str) -> Any:
    """``dataclasses.replace``, nested.

    Raises:
        InputError: names the field that does not exist.
    """
    names = {field.name for field in dataclasses.fields(value)}
    for name in overrides:
        require(name in names, f"{where}: {type(value).__name__} has no field {name!r}.")
    fields = {
        name: override(getattr(value, name), item, where) if isinstance(item, Mapping) else item
        for name, item in overrides.items()
    }
    return dataclasses.replace(value, **fields)


def widened(model: ModelConfig, num_layers: int, head_multiple: int = 2) -> ModelConfig:
    """A model of ``num_layers`` layers with as many parameters in its blocks' matrices: L' D'^2 = L D^2, nearly.

    Of the widths within 2.5 % of that number the one whose head size is nearest to the model's is taken, else the
    width that is nearest.
    """
    group = model.num_heads // model.num_kv_heads
    wanted = model.num_layers * model.embed_dim**2 / num_layers

    def badness(choice: tuple[int, int]) -> tuple[float, float, float]:
        heads, head_dim = choice
        error = abs(math.log((heads * head_dim) ** 2 / wanted))
        return max(error, 0.025), abs(math.log(head_dim / model.head_dim)), error

    most = 4 * model.num_heads * math.isqrt(math.ceil(model.num_layers / num_layers) + 1)
    sizes = range(head_multiple, 2 * model.head_dim + head_multiple, head_multiple)
    choices = ((heads, size) for heads in range(group, most + 1, group) for size in sizes if size % 2 == 0)
    heads, head_dim = min(choices, key=badness)
    return dataclasses.replace(
        model, num_layers=num_layers, embed_dim=heads * head_dim, num_heads=heads, num_kv_heads=heads // group
    )


def _with_solvers(config: Config, solvers: tuple[str, ...]) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, solvers=solvers))


def steps_within(config: Config, budget: float) -> int:
    """The most steps, at least 1 and at most ``train.num_steps``, whose :func:`run_flops` do not exceed ``budget``.

    A loss that starts late starts at the same share of fewer steps.
    """

    def total(num_steps: int) -> float:
        return run_flops(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num_steps)))

    most = num_steps = config.train.num_steps
    while num_steps > 1 and (flops := total(num_steps)) > budget:
        num_steps = max(1, min(num_steps - 1, int(num_steps * budget / flops)))
    while num_steps < most and total(num_steps + 1) <= budget:
        num_steps += 1
    return num_steps
