"""Parity with the authors' PyTorch code: recompute what golden files hold and print the distances.

    python benchmarks/parity.py golden/*.npz

A golden file holds a small nanochat model (weights under ``w/``), inputs, and what the authors' code made of them;
``ref/KEY`` is an independent float64 reference for the array KEY where the authors' code is wrong or noisy, and is
compared in its place. Every array of a file ends in one of three lists: compared, not covered yet, or not reproduced
by design, the last two with a reason. Runs on the CPU in float32 at the highest matmul precision.

Exit code: 0 all within tolerance, 1 an array is not, 2 a file could not be read.
"""

import argparse
import dataclasses
import json
import operator
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.golden import GivenProbes, Golden
from snlp_jax.chains import chains_of
from snlp_jax.errors import InputError
from snlp_jax.notation import DIAGONAL_MODES
from snlp_jax.parts import Part
from snlp_jax.solver import (
    BatchForward,
    Chunkwise,
    Correction,
    Exact,
    FusedSplit,
    HyperConnection,
    Identity,
    Init,
    Jacobi,
    MethodData,
    ParallelSegment,
    PerLayer,
    PrefixState,
    Preheat,
    ScaledIdentity,
    Schedule,
    Stage,
    Wanted,
    Warm,
    safe_norm,
    solve,
)
from snlp_jax.types import Array, Params

LOGITS_TOLERANCE = 3e-5
"""Of logits (up to 15) and states (up to 16), absolute: the authors' float32 is up to 1.5e-5 from float64, so two
float32 programs may be twice that apart."""
LOSS_TOLERANCE = 5e-6
"""Of losses (up to 9), absolute: twice the 2.4e-6 between the authors' float32 and float64."""
GRAD_TOLERANCE = 5e-3
"""Of gradients, relative: twice the 2.4e-3 between the authors' float32 and float64 over all their losses. For the
losses compared here that distance is 6e-6."""
FD_TOLERANCE = 5e-2
"""Of logits made by finite differences of large steps in float32: the authors' are up to 2.5e-2 from float64."""
PREHEAT_TOLERANCE = 1e-3
"""Of the fitted map and bias, relative to the largest entry: float32 least squares on 128 tokens."""
TIE_MARGIN = 2 * LOGITS_TOLERANCE
"""Greedy tokens may differ from where the two best logits are closer than this."""

INITS: dict[str, Init] = {"h0": PrefixState(), "batch_fwd": BatchForward(), "preheat": Preheat()}


# ---- families of arrays: what to compute, and its distance from the array -------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """One array to compare, and the region it needs, if any."""

    key: str
    groups: Mapping[str, str | None]
    """Named groups of the family's pattern."""
    region: ParallelSegment | None


@dataclasses.dataclass(frozen=True)
class Family:
    """Arrays whose name matches ``pattern``, and how to compare them.

    Named groups set the region (``n`` layers or all, ``K`` iterations or one, ``init``, ``damping``, ``C`` chunks) of
    a family with a correction.
    """

    name: str
    pattern: str
    tolerance: float
    error: Callable[[Golden, Task], float]
    correction: type[Correction] | None = None
    step: float = 1e-2
    """Of finite differences."""

    def task(self, golden: Golden, key: str) -> Task | None:
        """None where the array is not of this family."""
        match = re.fullmatch(self.pattern, key)
        if match is None:
            return None
        groups = match.groupdict()
        if self.correction is None:
            return Task(key, groups, None)
        options: dict[str, Any] = {"damping": float(groups.get("damping") or 0)}
        if self.correction is GivenProbes:
            mode = DIAGONAL_MODES[groups["mode"]]
            options |= {"mode": mode, "limit": np.inf, "step": self.step, "vectors": "diagn/z", "golden": golden}
        n = int(groups.get("n") or golden.num_layers)
        stage: Stage = PerLayer()
        if groups.get("stage") == "split":
            stage = FusedSplit()
        elif groups.get("stage"):
            num_chunks = 1 if groups["stage"] == "fused" else int(groups["C"])
            mid = "input" if groups["stage"] == "fused" and not groups.get("backout") else "output"
            stage = Chunkwise(num_chunks, branches="mean" if groups.get("avg") else "sum", mid=mid)
        init = groups.get("init") or "h0"
        region = ParallelSegment(
            golden.num_layers - n,
            golden.num_layers,
            int(groups.get("K") or 1),
            self.correction(**options),
            INITS[init],
            stage,
            fit=str(n) if init == "preheat" else "",
        )
        return Task(key, groups, region)


def absolute_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    return float(np.abs(got - expected).max()) if got.shape == expected.shape else np.inf


def sequential_error(golden: Golden, task: Task) -> float:
    expected = golden.arrays[task.key]
    x0_BTD, h_LBTD = golden.states
    if task.groups["what"] == "hidden":
        return absolute_error(np.take(in_their_order(h_LBTD), golden.arrays["hid_pos"], axis=-2), expected)
    got = x0_BTD if task.groups["what"] == "x0" else golden.logits_BTV
    return absolute_error(got if expected.shape == got.shape else golden.at_pos(got), expected)


def logits_error(golden: Golden, task: Task) -> float:
    return absolute_error(golden.at_pos(golden.solutions[task.region][0]), golden.arrays[task.key])


def states_error(golden: Golden, task: Task) -> float:
    return absolute_error(golden.at_pos(in_their_order(golden.solutions[task.region][1])), golden.arrays[task.key])


def in_their_order(h_L: np.ndarray) -> np.ndarray:
    """States [L, B, T, D] as they are; streams [L, B, T, R, D] with the stream before the token."""
    return h_L if h_L.ndim == 4 else np.moveaxis(h_L, 3, 2)


def distance_error(golden: Golden, task: Task) -> float:
    """Of the mean distance, for each layer, between the solver's states and the sequential ones."""
    solved_LBTD = golden.solutions[task.region][1]
    exact_LBTD = golden.states[1][task.region.start :]
    distance_LBT = np.asarray(safe_norm(solved_LBTD - exact_LBTD))
    if task.groups["kind"] == "rel":
        distance_LBT = distance_LBT / np.asarray(safe_norm(exact_LBTD))
    return absolute_error(distance_LBT.mean((1, 2)), golden.arrays[task.key])


def loss_error(golden: Golden, task: Task) -> float:
    loss, _ = golden.loss(task.groups["case"])
    return absolute_error(np.asarray(loss), golden.arrays[task.key])


def grad_norm_error(golden: Golden, task: Task) -> float:
    """Of the 2-norm of each parameter's gradient, or of all together, each relative to itself."""
    _, gradients = golden.loss(task.groups["case"])
    names = json.loads(str(golden.arrays[f"grad/{task.groups['case']}/param_names"]))
    if set(names) != set(gradients):
        return np.inf
    norms = np.asarray([np.linalg.norm(gradients[name]) for name in names])
    got = np.linalg.norm(norms) if task.groups["what"] == "global_norm" else norms
    expected = golden.arrays[task.key]
    # Where the exact gradient is 0 (streams that are all equal, say), the authors' is rounding.
    scale = np.maximum(expected, 1e-6 * np.linalg.norm(golden.arrays[f"grad/{task.groups['case']}/param_norms"]))
    return absolute_error(got / scale, expected / scale)


def grad_entry_error(golden: Golden, task: Task) -> float:
    """Of stored entries of one parameter's gradient, relative to the largest of them.

    Stored are the first 4 rows of a matrix, those of the 4 smallest tokens of the input for a table, else everything.
    """
    name, expected = task.groups["name"], golden.arrays[task.key]
    _, gradients = golden.loss(task.groups["case"])
    if name not in gradients:
        return np.inf
    got = gradients[name]
    if got.ndim == 2:
        is_table = name == "transformer.wte.weight" or name.startswith("value_embeds.")
        got = got[np.unique(golden.arrays["idx"])[:4]] if is_table else got[:4]
    return absolute_error(got, expected) / float(np.abs(expected).max())


def warm_error(golden: Golden, task: Task) -> float:
    """Of one solve from the sequential states of the first token, spread over all tokens."""
    model, params, tokens_BT = golden.model, golden.params, golden.tokens_BT
    start = golden.num_layers - int(task.groups["n"] or 0)
    x0_BTD, h_LBTD = golden.states

    @jax.jit
    def compute(params: Params, h_L: Array, h_in: Array) -> Array:
        span, num_iters = (start, golden.num_layers), int(task.groups["K"] or 1)
        blocks = jax.tree.map(lambda leaf: leaf[start:], params["blocks"])
        part = Part(blocks, None, None, ParallelSegment(*span, num_iters, Identity(), Warm()), span)
        (chain,) = chains_of(model, params, part, tokens_BT, model.shared(jnp.asarray(x0_BTD)), h_in)
        data = MethodData(warm_L=jnp.broadcast_to(h_L[:, :, :1], h_L.shape))
        want = Wanted((model.config.mid_layer - start,))
        solution = solve(chain, Identity(), Warm(), data, num_iters=num_iters, want=want)
        return model.logits(params, solution.value, solution.tapped[0])

    logits_BTV = np.asarray(compute(params, jnp.asarray(h_LBTD[start:]), jnp.asarray(h_LBTD[start - 1])))
    return absolute_error(golden.at_pos(logits_BTV), golden.arrays[task.key])


def preheat_error(golden: Golden, task: Task) -> float:
    """Of V U^T (the factors alone are not unique) or of the bias, for all layers, relative to the largest entry.

    Fitted to the file's calibration tokens; the authors use every fourth position.
    """
    got, expected = golden.preheat, {name: golden.arrays[f"preheat/{name}"] for name in ("U", "V", "bias")}
    if task.groups["what"] == "bias":
        return absolute_error(got["bias"], expected["bias"]) / float(np.abs(expected["bias"]).max())
    maps = [np.einsum("LDX,LEX->LDE", factors["V"], factors["U"]) for factors in (got, expected)]
    return absolute_error(*maps) / float(np.abs(maps[1]).max())


def text_error(golden: Golden, task: Task) -> float:
    """Number of wrong tokens; none where the first that differs is a tie of the two best logits."""
    expected = golden.arrays[task.key]
    differs = golden.continuation(*_drafter(golden, task)) != expected
    is_tie = differs.any() and golden.arrays["gen/margin"][differs.argmax()] <= TIE_MARGIN
    return 0.0 if is_tie else float(differs.sum())


def counts_error(golden: Golden, task: Task) -> float:
    """Number of rounds with another count."""
    expected, got = golden.arrays[task.key].tolist(), golden.accept_counts(*_drafter(golden, task))
    return float(sum(map(operator.ne, expected, got)) + abs(len(expected) - len(got)))


def _drafter(golden: Golden, task: Task) -> tuple[Schedule, int] | tuple[()]:
    """The drafter that the array's name tells of, if it does, and its drafts a round."""
    if "n" not in task.groups:
        return ()
    n, K, B = (int(task.groups[name] or 0) for name in "nKB")
    correction = HyperConnection() if golden.has_mhc else Identity()
    num_layers = golden.num_layers
    return Schedule.of(num_layers, ParallelSegment(num_layers - n, num_layers, K, correction)), B


N_K = r"n(?P<n>\d+)_K(?P<K>\d+)"
INIT = r"(?P<init>h0|batch_fwd|preheat)"
DAMPING = r"e(?P<damping>[\d.]+)"
AVG = r"(?P<avg>_avg)?"
CHUNKS = rf"n(?P<n>\d+)_C(?P<C>\d+)_K(?P<K>\d+)_{INIT}{AVG}"
CASE = r"(?P<case>plain|plain_again|(idn|mhc)_s\d+_d[01](_warm[\d.]+)?|diag_(fd|vjp)_ds\d+|mtp1(_idn|_mhc)?)"
LOGITS, FD = LOGITS_TOLERANCE, FD_TOLERANCE

FAMILIES = (
    Family("sequential: logits, x0", r"seq/(?P<what>logits|logits_sub|x0)", LOGITS, sequential_error),
    Family("sequential: states of all layers", r"seq/(?P<what>hidden)", LOGITS, sequential_error),
    Family("Jacobi, all layers", r"jacobi/K(?P<K>\d+)", LOGITS, logits_error, Jacobi),
    Family("Jacobi", rf"hybrid_jacobi/{N_K}", LOGITS, logits_error, Jacobi),
    Family("Identity", rf"(ref/)?idn_batched/{N_K}_{INIT}_{DAMPING}", LOGITS, logits_error, Identity),
    Family("Identity, layer by layer", rf"idn_loop/{N_K}", LOGITS, logits_error, Identity),
    Family("Identity: states", rf"idn_states/{N_K}_{INIT}_{DAMPING}", LOGITS, states_error, Identity),
    Family("Identity: distance", r"idn_error/n(?P<n>\d+)_(?P<kind>rel|abs)", LOGITS, distance_error, Identity),
    Family("ScaledIdentity", rf"ref/resid_newton/{N_K}_{INIT}", LOGITS, logits_error, ScaledIdentity),
    Family("Exact", rf"ref/hybrid_newton/{N_K}", LOGITS, logits_error, Exact),
    Family("Exact against differences", rf"hybrid_newton/{N_K}", FD, logits_error, Exact),
    Family("Exact against differences, all layers", r"newton/K(?P<K>\d+)", FD, logits_error, Exact),
    Family("HyperConnection", rf"hcn_batched/{N_K}_{INIT}", LOGITS, logits_error, HyperConnection),
    Family("HyperConnection: states", rf"hcn_states/{N_K}_{INIT}", LOGITS, states_error, HyperConnection),
    Family("Identity on streams", rf"ref/idn_on_mhc/{N_K}_{INIT}", LOGITS, logits_error, Identity),
    Family("Diagonal", rf"diagn_batched/{N_K}_(?P<mode>vjp)", LOGITS, logits_error, GivenProbes),
    Family("Diagonal by differences", rf"diagn_batched/{N_K}_(?P<mode>fd)", FD, logits_error, GivenProbes),
    Family(
        "Diagonal, damped", rf"(ref/)?diag_scan/{N_K}_(?P<mode>jvp|vjp)_{DAMPING}", LOGITS, logits_error, GivenProbes
    ),
    Family(
        "Diagonal by differences, damped",
        rf"(ref/)?diag_scan/{N_K}_(?P<mode>fd)_{DAMPING}",
        FD,
        logits_error,
        GivenProbes,
        step=1e-3,
    ),
    Family("chunks", rf"(ref/)?idn_(?P<stage>chunkwise)/{CHUNKS}", LOGITS, logits_error, Identity),
    Family("chunks of streams", rf"(ref/)?hcn_(?P<stage>chunkwise)/{CHUNKS}", LOGITS, logits_error, HyperConnection),
    Family(
        "one fused chunk",
        rf"(ref/)?idn_(?P<stage>fused)/{N_K}(?P<backout>_backoutchunk)?{AVG}",
        LOGITS,
        logits_error,
        Identity,
    ),
    Family("split", rf"(ref/)?idn_(?P<stage>split)/{N_K}_{INIT}_{DAMPING}", LOGITS, logits_error, Identity),
    Family("Identity from a warm trace", rf"idn_batched_warm/{N_K}", LOGITS, warm_error),
    Family("preheat: fitted map", r"preheat/(?P<what>[UV]|bias)", PREHEAT_TOLERANCE, preheat_error),
    Family("loss", rf"loss/{CASE}", LOSS_TOLERANCE, loss_error),
    Family("gradient norms", rf"grad/{CASE}/(?P<what>global_norm|param_norms)", GRAD_TOLERANCE, grad_norm_error),
    Family("gradient entries", rf"grad/{CASE}/(?P<name>.+)", GRAD_TOLERANCE, grad_entry_error),
    Family("greedy text", r"gen/greedy", 0.0, text_error),
    Family("speculative text", rf"spec/{N_K}_B(?P<B>\d+)_tokens", 0.0, text_error),
    Family("accepted drafts", rf"spec/{N_K}_B(?P<B>\d+)_accept_counts", 0.0, counts_error),
)
"""The first family that matches an array compares it."""


# ---- arrays that are not compared -----------------------------------------------------------------------------------

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
    applies: Callable[[Golden, str], bool] = lambda golden, key: True


BY_DESIGN = (
    Exclusion(r"spec/.+_stats", "sums of the counts that miss the last round"),
    Exclusion(
        r"(idn_loop|hybrid_jacobi)/.+",
        "without layers before the region its first layer reads the last layer's state",
        lambda golden, key: f"/n{golden.num_layers}_" in key,
    ),
    Exclusion(
        r"(ref/)?idn_fused/n\d+_K([2-9]|\d\d).*", "beyond one iteration the chunk reads its own output: not Newton"
    ),
    Exclusion(
        r"(ref/)?idn_split/n\d+_K([2-9]|\d\d).*|(ref/)?idn_split/.+_(batch_fwd|preheat)_.+",
        "every iteration evaluates the layers at the region's input, whatever the trace: not Newton",
    ),
    Exclusion(
        r"idn_(batched|batched_warm|states|error)/.+|spec/.+_accept_counts",
        "the authors' parallel layers ignore the sliding windows; ref/, where there is one, is compared",
        lambda golden, key: golden.windows_matter,
    ),
    Exclusion(
        r"(idn|hcn)_(chunkwise|fused|split)/.+",
        "the authors' fused layers drop the value embeddings; ref/ is the target",
        lambda golden, key: golden.has_value_embeds,
    ),
    Exclusion(
        r"diag_scan/.+",
        "multiplies by residual scalars that the model lacks; ref/ is the target",
        lambda golden, key: f"ref/{key}" in golden.arrays,
    ),
)


def exclusion(golden: Golden, key: str) -> str | None:
    """Reason of the first row of ``BY_DESIGN`` that excludes the array."""
    rows = (row for row in BY_DESIGN if re.fullmatch(row.pattern, key) and row.applies(golden, key))
    return next((row.reason for row in rows), None)


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What became of the arrays of one file: errors by family, names by reason."""

    errors: dict[Family, dict[str, float]] = dataclasses.field(default_factory=dict)
    not_yet: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    by_design: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        return sum(not error <= family.tolerance for family, row in self.errors.items() for error in row.values())


def compare(golden: Golden) -> Report:
    """Compare every array of the file, or say why not."""
    report, todo = Report(), []
    for key in golden.arrays:
        if INPUTS.fullmatch(key):
            continue
        if reason := exclusion(golden, key):
            report.by_design.setdefault(reason, []).append(key)
        elif found := next(((family, task) for family in FAMILIES if (task := family.task(golden, key))), None):
            todo.append(found)
        else:
            report.not_yet.setdefault("not known to this tool", []).append(key)
    if todo:
        golden.solve(task.region for _, task in todo if task.region is not None)
    for family, task in todo:
        report.errors.setdefault(family, {})[task.key] = family.error(golden, task)
    return report


def show(console: Console, title: str, report: Report) -> None:
    """Print the block of one file."""
    console.rule(escape(title))
    if report.errors:
        table = Table("family", "arrays", "max error", "worst array", "tolerance", "verdict")
        for family in sorted(report.errors, key=FAMILIES.index):
            row = report.errors[family]
            worst = max(row, key=lambda key: np.nan_to_num(row[key], nan=np.inf))
            verdict = "ok" if row[worst] <= family.tolerance else "[bold red]FAIL"
            numbers = f"{row[worst]:.1e}", escape(worst), f"{family.tolerance:.0e}"
            table.add_row(family.name, str(len(row)), *numbers, verdict)
        console.print(table)
    for heading, reasons in (("not covered yet", report.not_yet), ("not reproduced by design", report.by_design)):
        if reasons:
            table = Table(heading, "arrays", "why")
            for reason, keys in reasons.items():
                families = dict.fromkeys(re.sub(r"((ref|loss|grad)/)?([^/]+)/?.*", r"\1\3", key) for key in keys)
                table.add_row(escape(", ".join(families)), str(len(keys)), escape(reason))
            console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this library with golden files of the authors' code.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    files = parser.parse_args().files
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    console = Console()
    num_compared = num_failed = 0
    for path in files:
        try:
            report = compare(Golden(path))
        except InputError as error:
            console.print(f"{path}: {error}", style="red", markup=False)
            return 2
        show(console, path.name, report)
        num_compared += sum(map(len, report.errors.values()))
        num_failed += report.num_failed
    console.print(f"{num_compared} arrays compared, {num_failed} outside their tolerance.")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
