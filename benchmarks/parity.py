"""Parity with the authors' PyTorch code: recompute what golden files hold and print the distances.

    python benchmarks/parity.py golden/*.npz

A golden file holds a small nanochat model (weights under ``w/``), inputs, and what the authors' code made of them;
``ref/KEY`` is an independent float64 reference for the array KEY where the authors' code is wrong or noisy, and is
compared in its place. Every array of a file ends in one of three lists: compared, not covered yet, or not reproduced
by design, each with its reason. Runs on the CPU in float32 at the highest matmul precision.

Exit code: 0 all within tolerance, 1 a family failed, 2 a file could not be read.
"""

import argparse
import dataclasses
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snlp_jax.config import HiddenNormConfig, LayerSkipConfig, LossConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward, layer_problem, split
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import from_nanochat, nanochat_config, to_nanochat
from snlp_jax.solver import (
    BatchForward,
    Correction,
    Exact,
    Identity,
    Init,
    Jacobi,
    ParallelSegment,
    PrefixState,
    ScaledIdentity,
    Schedule,
    SequentialSegment,
    safe_norm,
    sequential,
)
from snlp_jax.train.loss import Plan, loss_fn
from snlp_jax.types import Array, Params

LOGITS_TOLERANCE = 3e-5
"""Of logits (up to 15) and states (up to 16), absolute: the authors' float32 is up to 1.5e-5 from float64, so two
float32 programs may be twice that apart."""
LOSS_TOLERANCE = 5e-6
"""Of losses (up to 12), absolute: twice the 2.4e-6 between the authors' float32 and float64."""
GRAD_TOLERANCE = 5e-3
"""Of gradients, relative: twice the 2.4e-3 between the authors' float32 and float64."""
TIE_MARGIN = 2 * LOGITS_TOLERANCE
"""Greedy tokens may differ from where the two best logits are closer than this."""
REG_WEIGHT = 0.5
"""Weight of the solver losses in every golden file."""

INITS: dict[str, Init] = {"h0": PrefixState(), "batch_fwd": BatchForward()}


class Golden:
    """One golden file, the model in it, and what this library computes of it (each thing once)."""

    def __init__(self, path: Path):
        """Raises InputError: the file is not a golden file; one sentence says why."""
        try:
            with np.load(path) as file:
                self.arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as an .npz file ({error}).") from error
        for name in ("config", "meta", "idx", "targets", "pos", "hid_pos"):
            if name not in self.arrays:
                raise InputError(f"{path} is not a golden file: it lacks the array {name!r}.")
        try:
            self.config: dict[str, Any] = json.loads(str(self.arrays["config"]))
            self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not a golden file: its config or meta is not JSON ({error}).") from error
        self.num_layers: int = self.config["n_layer"]
        self.windows_matter: bool = self.meta["windows_matter"]
        self.has_mhc: bool = self.config["use_mhc"]
        if not self.has_mhc:
            self._import_model()

    def _import_model(self) -> None:
        model_config = dataclasses.replace(nanochat_config(self.config), compute_dtype="float32")
        weights = {name.removeprefix("w/"): array for name, array in self.arrays.items() if name.startswith("w/")}
        self.model = LanguageModel(model_config)
        self.params: Params = from_nanochat(weights, model_config)
        self.tokens_BT = jnp.asarray(self.arrays["idx"])
        self._solved: dict[ParallelSegment, tuple[np.ndarray, np.ndarray]] = {}
        self._loss_fns: dict[LossConfig, Callable[..., tuple[Array, Params]]] = {}

    def at_pos(self, array_BTD: np.ndarray) -> np.ndarray:
        """The stored positions of logits or states whose second axis from the end is time."""
        return np.take(array_BTD, self.arrays["pos"], axis=-2)

    @cached_property
    def logits_BTV(self) -> np.ndarray:
        weights = split(self.model, self.params, Schedule.of(self.num_layers))
        return np.asarray(jax.jit(lambda weights: forward(self.model, weights, self.tokens_BT).logits_BTV)(weights))

    @cached_property
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """x0 [B, T, D] and the outputs of all layers [L, B, T, D], in sequence."""

        @jax.jit
        def compute(params: Params) -> tuple[Array, Array]:
            x0_BTD = self.model.embed(params, self.tokens_BT)
            segment = SequentialSegment(0, self.num_layers)
            shared = self.model.shared(x0_BTD)
            problem = layer_problem(self.model, params, params["blocks"], self.tokens_BT, shared, segment, x0_BTD)
            return x0_BTD, sequential(problem, with_trace=True).trace

        return jax.tree.map(np.asarray, compute(self.params))

    def solve(
        self, size: int, num_iters: int, correction: Correction, init: Init | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, T, V] and states [size, B, T, D] of the last ``size`` layers after ``num_iters`` iterations."""
        start = self.num_layers - size
        region = ParallelSegment(start, self.num_layers, num_iters, correction, init or PrefixState())
        if region not in self._solved:

            @jax.jit
            def compute(weights: Any) -> tuple[Array, Array]:
                output = forward(self.model, weights, self.tokens_BT)
                return output.logits_BTV, output.solutions[0].trace

            weights = split(self.model, self.params, Schedule.of(self.num_layers, region))
            self._solved[region] = jax.tree.map(np.asarray, compute(weights))
        return self._solved[region]

    def greedy(self, prompt_T: np.ndarray, num_tokens: int) -> np.ndarray:
        """Free-running greedy continuation without a cache; causality makes the padding invisible."""
        weights = split(self.model, self.params, Schedule.of(self.num_layers))

        @jax.jit
        def next_token(weights: Any, tokens_1T: Array, length: Array) -> Array:
            logits_TV = forward(self.model, weights, tokens_1T).logits_BTV[0]
            return jnp.argmax(logits_TV[length - 1])

        tokens = np.zeros((1, len(prompt_T) + num_tokens), np.int32)
        tokens[0, : len(prompt_T)] = prompt_T
        for length in range(len(prompt_T), tokens.shape[1]):
            tokens[0, length] = next_token(weights, tokens, length)
        return tokens[0, len(prompt_T) :]

    def loss(self, case: str) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and its gradients, by the authors' names, of a case such as ``plain`` or ``idn_s3_d0_warm0.25``.

        Stride 0 is the layer-skip control. ``warm`` is the share of the weight that the warm-up has reached.
        """
        match = re.fullmatch(r"idn_s(?P<stride>\d+)_d(?P<detach>[01])(?:_warm(?P<warm>[\d.]+))?", case)
        config, plan, weights = LossConfig(), Plan(), {}
        if match:
            sizes, stride = tuple(self.meta["reg_npars"]), int(match["stride"])
            shared = {"weight": REG_WEIGHT, "region_sizes": sizes, "detach_target": match["detach"] == "1"}
            name = "hidden_norm" if stride else "layer_skip"
            term = HiddenNormConfig(**shared, stride=stride) if stride else LayerSkipConfig(**shared)
            config, plan = LossConfig(**{name: term}), Plan(((name, sizes),))
            weights = {name: REG_WEIGHT * float(match["warm"] or 1)}
        if config not in self._loss_fns:
            tokens_BT1 = jnp.concatenate([self.tokens_BT, self.arrays["targets"][:, -1:]], axis=1)

            def compute(params: Params, weights: dict[str, Any]) -> Array:
                return loss_fn(self.model, params, tokens_BT1, config, plan, weights)[0]

            self._loss_fns[config] = jax.jit(jax.value_and_grad(compute))
        loss, gradients = self._loss_fns[config](self.params, weights)
        return float(loss), to_nanochat(gradients, self.model.config)


def absolute_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    return float(np.abs(got - expected).max()) if got.shape == expected.shape else np.inf


def relative_error(got: np.ndarray, expected: np.ndarray, scale: np.ndarray | float) -> float:
    """Largest difference relative to ``scale``; infinite where the shapes differ."""
    return float((np.abs(got - expected) / scale).max()) if got.shape == expected.shape else np.inf


# ---- one function a family: how far is what we compute from the array ``key``? ---------------------------------------


def seq_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    expected = golden.arrays[key]
    x0_BTD, h_LBTD = golden.states
    if match["what"] == "hidden":
        return absolute_error(h_LBTD[:, :, golden.arrays["hid_pos"]], expected)
    got = x0_BTD if match["what"] == "x0" else golden.logits_BTV
    return absolute_error(got if expected.shape == got.shape else golden.at_pos(got), expected)


def solver_error(correction: type[Correction]) -> Callable[[Golden, str, re.Match[str]], float]:
    """Of logits of ``n{n}_K{K}[_{init}][_e{damping}]``; no n means all layers."""

    def error(golden: Golden, key: str, match: re.Match[str]) -> float:
        groups = match.groupdict()
        surrogate = correction(damping=float(groups.get("damping") or 0))
        init = INITS[groups.get("init") or "h0"]
        logits_BTV, _ = golden.solve(int(groups.get("n") or golden.num_layers), int(match["K"]), surrogate, init)
        return absolute_error(golden.at_pos(logits_BTV), golden.arrays[key])

    return error


def states_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    _, h_LBTD = golden.solve(int(match["n"]), int(match["K"]), Identity(float(match["damping"])), INITS[match["init"]])
    return absolute_error(golden.at_pos(h_LBTD), golden.arrays[key])


def idn_distance_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    """Of the distance, for each layer, of one Identity iteration from the sequential trace."""
    n = int(match["n"])
    expected_LBTD = golden.states[1][-n:]
    distance_LBT = np.asarray(safe_norm(golden.solve(n, 1, Identity())[1] - expected_LBTD))
    if match["kind"] == "rel":
        distance_LBT = distance_LBT / np.asarray(safe_norm(expected_LBTD))
    return absolute_error(distance_LBT.mean((1, 2)), golden.arrays[key])


def loss_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    return absolute_error(np.float32(golden.loss(match["case"])[0]), golden.arrays[key])


def grad_norm_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    """Of the 2-norm of each parameter's gradient, or of all together, each relative to itself."""
    _, gradients = golden.loss(match["case"])
    names = json.loads(str(golden.arrays[f"grad/{match['case']}/param_names"]))
    if set(names) != set(gradients):
        return np.inf
    norms = np.asarray([np.linalg.norm(gradients[name]) for name in names])
    got = np.linalg.norm(norms) if match["what"] == "global_norm" else norms
    return relative_error(got, golden.arrays[key], scale=golden.arrays[key])


def grad_entry_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    """Of stored entries of one parameter's gradient, relative to the largest of them.

    Stored are the first 4 rows of a matrix, of a table those of the 4 smallest tokens in the input, else everything.
    """
    name, expected = match["name"], golden.arrays[key]
    got = golden.loss(match["case"])[1].get(name)
    if got is None:
        return np.inf
    if got.ndim == 2:
        is_table = name == "transformer.wte.weight" or name.startswith("value_embeds.")
        got = got[np.unique(golden.arrays["idx"])[:4]] if is_table else got[:4]
    return relative_error(got, expected, scale=np.abs(expected).max())


def greedy_error(golden: Golden, key: str, match: re.Match[str]) -> float:
    """Number of wrong tokens up to the first that differs at a tie of the two best logits."""
    expected, margin = golden.arrays[key], golden.arrays["gen/margin"]
    differs = golden.greedy(golden.arrays["gen/prompt"], len(expected)) != expected
    if differs.any() and margin[differs.argmax()] <= TIE_MARGIN:
        return 0.0
    return float(differs.sum())


@dataclasses.dataclass(frozen=True)
class Family:
    """Arrays whose name matches ``pattern``, and how to compare them."""

    name: str
    pattern: str
    tolerance: float
    error: Callable[[Golden, str, re.Match[str]], float]


CASE = r"(?P<case>plain|plain_again|idn_s\d+_d[01](_warm[\d.]+)?)"
FAMILIES = (
    Family("sequential logits, x0", r"seq/(?P<what>logits|logits_sub|x0)", LOGITS_TOLERANCE, seq_error),
    Family("sequential states", r"seq/(?P<what>hidden)", LOGITS_TOLERANCE, seq_error),
    Family(
        "Identity (idn_batched)",
        r"(ref/)?idn_batched/n(?P<n>\d+)_K(?P<K>\d+)_(?P<init>h0|batch_fwd)_e(?P<damping>[\d.]+)",
        LOGITS_TOLERANCE,
        solver_error(Identity),
    ),
    Family("Identity (idn_loop)", r"idn_loop/n(?P<n>\d+)_K(?P<K>\d+)", LOGITS_TOLERANCE, solver_error(Identity)),
    Family(
        "Identity states",
        r"idn_states/n(?P<n>\d+)_K(?P<K>\d+)_(?P<init>h0|batch_fwd)_e(?P<damping>[\d.]+)",
        LOGITS_TOLERANCE,
        states_error,
    ),
    Family("Identity distance", r"idn_error/n(?P<n>\d+)_(?P<kind>rel|abs)", LOGITS_TOLERANCE, idn_distance_error),
    Family(
        "ScaledIdentity (resid_newton)",
        r"ref/resid_newton/n(?P<n>\d+)_K(?P<K>\d+)_(?P<init>h0|batch_fwd)",
        LOGITS_TOLERANCE,
        solver_error(ScaledIdentity),
    ),
    Family("Jacobi, all layers", r"jacobi/K(?P<K>\d+)", LOGITS_TOLERANCE, solver_error(Jacobi)),
    Family("Jacobi (hybrid_jacobi)", r"hybrid_jacobi/n(?P<n>\d+)_K(?P<K>\d+)", LOGITS_TOLERANCE, solver_error(Jacobi)),
    Family(
        "Exact (hybrid_newton)", r"ref/hybrid_newton/n(?P<n>\d+)_K(?P<K>\d+)", LOGITS_TOLERANCE, solver_error(Exact)
    ),
    Family("loss", rf"loss/{CASE}", LOSS_TOLERANCE, loss_error),
    Family("gradient norms", rf"grad/{CASE}/(?P<what>global_norm|param_norms)", GRAD_TOLERANCE, grad_norm_error),
    Family("gradient entries", rf"grad/{CASE}/(?P<name>.+)", GRAD_TOLERANCE, grad_entry_error),
    Family("greedy tokens", r"gen/greedy", 0.0, greedy_error),
)

INPUTS = re.compile(
    r"w/.+|w_mtp/.+|idx|targets|pos|hid_pos|config|meta|gen/prompt|gen/margin|grad/[^/]+/param_names"
    r"|preheat/calib_tokens|diagn/z|diag_reg/z"
)
"""Arrays that are not results."""


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Arrays that are not compared, and why; ``applies`` narrows the pattern by the file."""

    pattern: str
    reason: str
    applies: Callable[[Golden, str, re.Match[str]], bool] = lambda golden, key, match: True


BY_DESIGN = (
    Exclusion(
        r"(hybrid_)?newton/.+", "finite differences in float32 are off by up to 3e-2; ref/hybrid_newton is compared"
    ),
    Exclusion(
        r"(idn_loop|hybrid_jacobi)/n(?P<n>\d+)_.+",
        "without a prefix it feeds the last layer's state to the first layer",
        lambda golden, key, match: int(match["n"]) == golden.num_layers,
    ),
    Exclusion(
        r"(ref/)?idn_fused/n\d+_K([2-9]|\d\d).*", "beyond one iteration it feeds the chunk its own output: not Newton"
    ),
    Exclusion(
        r"(ref/)?idn_split/n\d+_K([2-9]|\d\d).*",
        "every iteration evaluates the layers at the region's input: not Newton",
    ),
    Exclusion(
        r"idn_(batched|batched_warm|states|error|chunkwise|fused|split)/.+",
        "the authors' parallel layers ignore the sliding windows; a ref/ array, where there is one, is compared",
        lambda golden, key, match: golden.windows_matter,
    ),
    Exclusion(
        r"idn_(chunkwise|fused|split)/.+",
        "the authors' fused layers drop the value embeddings; ref/ is the target",
        lambda golden, key, match: not golden.config["no_ve"],
    ),
    Exclusion(
        r"diag_scan/.+",
        "multiplies by residual scalars that the model lacks; ref/ is the target",
        lambda golden, key, match: f"ref/{key}" in golden.arrays,
    ),
)

NOT_YET = (
    Exclusion(r".+", "hyper-connections (mHC) are not covered yet", lambda golden, key, match: golden.has_mhc),
    Exclusion(r"(ref/)?idn_(chunkwise|fused|split)/.+", "fused layers"),
    Exclusion(r"(ref/)?diag(n_batched|_scan)/.+", "the Diagonal correction"),
    Exclusion(r"(loss|grad)/diag_.+", "the diagonal regularizer"),
    Exclusion(r"(loss|grad)/mtp.+", "multi-token-prediction heads"),
    Exclusion(r"idn_batched/.+_preheat_.+|preheat/.+", "the initial trace fitted on calibration tokens"),
    Exclusion(r"idn_batched_warm/.+", "the initial trace from an earlier token"),
    Exclusion(r"spec/.+", "self-speculative decoding"),
    Exclusion(r".+", "not known to this tool", lambda golden, key, match: _family(key) is None),
)


def _family(key: str) -> tuple[Family, re.Match[str]] | None:
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, key):
            return family, match
    return None


def _exclusion(golden: Golden, key: str, table: tuple[Exclusion, ...]) -> str | None:
    """Reason of the first row of ``table`` that excludes the array."""
    for row in table:
        match = re.fullmatch(row.pattern, key)
        if match and row.applies(golden, key, match):
            return row.reason
    return None


@dataclasses.dataclass
class Report:
    """What became of the arrays of one file."""

    errors: dict[Family, dict[str, float]] = dataclasses.field(default_factory=dict)
    not_yet: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Array names by reason, and likewise:"""
    by_design: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        return sum(not error <= family.tolerance for family, row in self.errors.items() for error in row.values())


def compare(golden: Golden) -> Report:
    """Compare every array of the file or say why not."""
    report = Report()
    for key in golden.arrays:
        if INPUTS.fullmatch(key):
            continue
        if not golden.has_mhc and (reason := _exclusion(golden, key, BY_DESIGN)):
            report.by_design.setdefault(reason, []).append(key)
        elif reason := _exclusion(golden, key, NOT_YET):
            report.not_yet.setdefault(reason, []).append(key)
        elif found := _family(key):
            family, match = found
            report.errors.setdefault(family, {})[key] = family.error(golden, key, match)
    return report


def show(console: Console, title: str, report: Report) -> None:
    """Print the block of one file."""
    console.rule(f"[bold]{escape(title)}")
    if report.errors:
        table = Table("family", "arrays", "max error", "worst array", "tolerance", "verdict")
        for family in sorted(report.errors, key=FAMILIES.index):
            row = report.errors[family]
            worst = max(row, key=lambda key: np.nan_to_num(row[key], nan=np.inf))
            verdict = "ok" if row[worst] <= family.tolerance else "[bold red]FAIL"
            table.add_row(
                family.name, str(len(row)), f"{row[worst]:.1e}", escape(worst), f"{family.tolerance:.0e}", verdict
            )
        console.print(table)
    for heading, reasons in (("not covered yet", report.not_yet), ("not reproduced by design", report.by_design)):
        if reasons:
            table = Table(heading, "arrays", "why")
            for reason, keys in reasons.items():
                families = dict.fromkeys(re.sub(r"(ref/[^/]+|(loss|grad)/[^/]+|[^/]+).*", r"\1", key) for key in keys)
                table.add_row(escape(", ".join(families)), str(len(keys)), escape(reason))
            console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this library with golden files of the authors' code.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    files = parser.parse_args().files
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    console = Console()
    num_failed = 0
    for path in files:
        try:
            report = compare(Golden(path))
        except InputError as error:
            console.print(f"parity: {error}", style="red", markup=False)
            return 2
        show(console, path.name, report)
        num_failed += report.num_failed
    console.print(f"[bold red]{num_failed} arrays FAILED" if num_failed else "everything compared is within tolerance")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
