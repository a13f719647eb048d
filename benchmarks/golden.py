"""A golden file of the authors' models, and what this library computes of it: see benchmarks/parity.py."""

import contextlib
import dataclasses
import json
import re
import unittest.mock as mock
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.chains import chains_of
from snlp_jax.config import HiddenNormConfig, LayerSkipConfig, LossConfig, MachineConfig, MTPConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.infer import Drafting, Engine, Request
from snlp_jax.layout import prepare, split, with_schedule
from snlp_jax.linearize import fit_init
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import from_nanochat, nanochat_config, to_nanochat
from snlp_jax.notation import DIAGONAL_MODES
from snlp_jax.parts import Part, Weights
from snlp_jax.solver import (
    Calibration,
    Chain,
    Diagonal,
    LayerFns,
    MethodData,
    ParallelSegment,
    Preheat,
    Schedule,
    SequentialSegment,
    sequential,
)
from snlp_jax.train.loss import Plan, loss_fn
from snlp_jax.train.passes import Passes
from snlp_jax.types import Array, Batch, Params

REG_WEIGHT = 0.5
"""Weight of the auxiliary losses in every golden file."""
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}
"""Of the large programs: each runs a few times only, so compiling takes the time."""
REG_VECTORS = "diag_reg/z"
"""Random vectors of the diagonal regularizer, one for each region size."""


class Golden:
    """One golden file and the model in it. Programs are compiled once for all arrays that need them."""

    def __init__(self, path: Path):
        """Raises InputError: the file is not a golden file; one sentence says why."""
        if not path.is_file():
            raise InputError("there is no such file.")
        try:
            with np.load(path) as file:
                self.arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError("not a readable .npz file.") from error
        for name in ("config", "meta", "idx", "targets", "pos", "hid_pos"):
            if name not in self.arrays:
                raise InputError(f"not a golden file: it lacks the array {name!r}.")
        try:
            self.config: dict[str, Any] = json.loads(str(self.arrays["config"]))
            self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        except json.JSONDecodeError as error:
            raise InputError(f"not a golden file: its config or meta is not JSON ({error}).") from error
        try:
            self.num_layers: int = self.config["n_layer"]
            self.has_mhc: bool = self.config["use_mhc"]
            self.has_value_embeds: bool = not self.config["no_ve"]
            self.windows_matter: bool = self.meta["windows_matter"]
            self.reg_sizes: tuple[int, ...] = tuple(self.meta["reg_npars"])
            self.reg_stride: int = self.meta["stride"]
        except KeyError as error:
            raise InputError(f"not a golden file: its config or meta lacks the field {error}.") from error
        model_config, machine = nanochat_config(self.config), MachineConfig(compute_dtype="float32")
        weights = {name.removeprefix("w/"): array for name, array in self.arrays.items() if name.startswith("w/")}
        self.model = LanguageModel(model_config, machine)
        self.params: Params = from_nanochat(weights, model_config)
        # The losses of a model with a head that looks further ahead: its matrix beside the same weights.
        heads = {name.removeprefix("w_mtp/"): array for name, array in self.arrays.items() if name.startswith("w_mtp/")}
        self.model_ahead = LanguageModel(dataclasses.replace(model_config, num_mtp_heads=len(heads)), machine)
        self.params_ahead: Params = from_nanochat(weights | heads, self.model_ahead.config)
        self.mtp_weight: float = self.config.get("mtp_loss_weight", 0.0)
        self.tokens_BT = jnp.asarray(self.arrays["idx"])
        self.fits: dict[str, Calibration] = {}
        if "preheat/U" in self.arrays:
            names = {"preheat_u": "U", "preheat_v": "V", "preheat_intercept": "bias"}
            fitted = {field: jnp.asarray(self.arrays[f"preheat/{name}"]) for field, name in names.items()}
            for n in range(1, self.num_layers + 1):
                self.fits[str(n)] = Calibration({name: leaf[-n:] for name, leaf in fitted.items()}, {})
        self.solutions: dict[ParallelSegment, tuple[np.ndarray, np.ndarray]] = {}
        self._loss_fns: dict[tuple, Callable[..., tuple[Array, Params]]] = {}

    def at_pos(self, array: np.ndarray) -> np.ndarray:
        """The stored positions of logits or states [..., T, D]."""
        return np.take(array, self.arrays["pos"], axis=-2)

    @cached_property
    def logits_BTV(self) -> np.ndarray:
        """Of the sequential pass."""
        weights = split(self.model, self.params, Schedule.of(self.num_layers))
        return np.asarray(jax.jit(lambda weights: forward(self.model, weights, self.tokens_BT).logits_BTV)(weights))

    @cached_property
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """x0 [B, T, D] and the outputs of all layers [L, B, T, D] in the sequential pass."""

        compute = jax.jit(lambda params: self._in_order(params, self.tokens_BT))
        return jax.tree.map(np.asarray, compute(self.params))

    def _in_order(self, params: Params, tokens_BT: Array) -> tuple[Array, Array]:
        """x0 and the outputs of all layers in the sequential pass, for use under jit."""
        x0_BTD, whole = self.model.embed(params, tokens_BT), (0, self.num_layers)
        part = Part(params["blocks"], None, None, SequentialSegment(*whole), whole)
        shared, h_in = self.model.shared(x0_BTD), self.model.expand(x0_BTD)
        (chain,) = chains_of(self.model, params, part, tokens_BT, shared, h_in)
        return x0_BTD, sequential(chain, with_trace=True).trace

    @cached_property
    def preheat(self) -> dict[str, np.ndarray]:
        """U, V [L, D, r] and bias [L, D] of the map from the embedding to every layer's output."""
        tokens_BT, every = jnp.asarray(self.arrays["preheat/calib_tokens"]), 4

        @jax.jit
        def compute(params: Params) -> tuple[Array, Array]:
            x0_BTD, h_LBTD = self._in_order(params, tokens_BT)
            return x0_BTD[:, ::every], h_LBTD[:, :, ::every]

        x0_BTD, h_LBTD = compute(self.params)
        # Layers that have these outputs whatever they read: the chain that the fit sees as text.
        chain = Chain.of(LayerFns(lambda h_BTD, x, ctx, shared: (h_BTD, ())), h_LBTD, x0_BTD)
        text = [(chain, MethodData(anchor=x0_BTD))]
        layers = fit_init(text, Preheat(), rank=self.arrays["preheat/U"].shape[-1], ridge=0.0)
        return {name: layers[f"preheat_{field}"] for name, field in (("U", "u"), ("V", "v"), ("bias", "intercept"))}

    def solve(self, regions: Iterable[ParallelSegment]) -> None:
        """Fill ``solutions``: logits [B, T, V] and states [n, B, T, D] of every region; each ends the model.

        Compiling takes the time here, so one program does all regions of a size: the layers before them and their
        common iterations are one computation to the compiler.
        """
        by_start: dict[int, list[Schedule]] = {}
        for region in dict.fromkeys(regions):
            by_start.setdefault(region.start, []).append(Schedule.of(self.num_layers, region))
        for schedules in by_start.values():
            # The layers before the region unrolled, those of the region stacked: the layout for a single token.
            weights = prepare(self.model, self.params, schedules[0], num_tokens=1, fits=self.fits)

            def compute(weights: Weights, fits: dict, schedules: list = schedules) -> list[tuple[Array, Array]]:
                replaced = (with_schedule(self.model, weights, schedule, fits) for schedule in schedules)
                outputs = [forward(self.model, one, self.tokens_BT) for one in replaced]
                return [(output.logits_BTV, output.solutions[0].trace) for output in outputs]

            results = jax.tree.map(np.asarray, jax.jit(compute, compiler_options=COMPILER_OPTIONS)(weights, self.fits))
            self.solutions.update(zip([schedule.segments[-1] for schedule in schedules], results, strict=True))

    def loss(self, case: str) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradients, by the authors' names, of a case.

        ``plain``; ``idn_s3_d0_warm0.25`` (``s`` is the stride, ``d1`` detaches the target, ``warm`` is the share of the
        weight that its warm-up has reached; ``idn_s0`` is the layer-skip control, ``mhc_s0`` compares the last layer);
        ``diag_fd_ds2`` (the last layer after one Diagonal correction with the file's vectors, estimated every second
        layer; entries from finite differences are clipped there, those from a VJP are not); ``mtp1``, ``mtp1_idn``:
        with one head that looks further ahead, and the solver's loss besides. Cases that differ in traced weights
        only share a program.
        """
        match = re.fullmatch(
            r"(?P<kind>idn|mhc|diag)(_s(?P<stride>\d+))?(_d(?P<detach>[01]))?(_warm(?P<warm>[\d.]+))?"
            r"(_(?P<mode>fd|vjp)_ds(?P<every>\d+))?",
            case.removeprefix("mtp1_"),
        )
        has_heads = case.startswith("mtp1")
        model, params = (self.model_ahead, self.params_ahead) if has_heads else (self.model, self.params)
        sizes, weights = self.reg_sizes, {"hidden_norm": 0.0, "layer_skip": 0.0}
        detach, stride = False, self.reg_stride
        given: GivenProbes | None = None
        if match:
            is_skip = match["kind"] == "idn" and match["stride"] == "0"
            weights["layer_skip" if is_skip else "hidden_norm"] = REG_WEIGHT * float(match["warm"] or 1)
            detach = match["kind"] == "diag" or match["detach"] == "1"
            if match["stride"] not in (None, "0", str(self.reg_stride)):
                raise InputError(f"the loss {case!r} has a stride other than 0 and {self.reg_stride}.")
            if match["kind"] == "diag" or (match["kind"] == "mhc" and match["stride"] == "0"):
                stride = self.num_layers  # the last layer alone
            if match["kind"] == "diag":
                limit = 2.0 if match["mode"] == "fd" else np.inf
                options: dict[str, Any] = {"mode": DIAGONAL_MODES[match["mode"]], "limit": limit, "detach": True}
                options["stride"] = int(match["every"])
                given = GivenProbes(**options, vectors=REG_VECTORS, golden=self)
        program = detach, stride, given, has_heads
        if program not in self._loss_fns:
            tokens_BT1 = jnp.concatenate([self.tokens_BT, self.arrays["targets"][:, -1:]], axis=1)
            correction = "hcn" if self.has_mhc else "idn"
            config = LossConfig(
                hidden_norm=HiddenNormConfig(
                    REG_WEIGHT, sizes, correction=correction, stride=stride, detach_target=detach
                ),
                layer_skip=LayerSkipConfig(REG_WEIGHT, sizes, detach_target=detach),
                mtp=MTPConfig(self.mtp_weight if has_heads else 0.0),
            )
            plan = Plan((("hidden_norm", sizes), ("layer_skip", sizes)))

            def compute(params: Params, weights: dict[str, float]) -> Array:
                return loss_fn(Passes(model, params, Batch(tokens_BT1)), config, plan, weights)[0]

            self._loss_fns[program] = jax.jit(jax.value_and_grad(compute), compiler_options=COMPILER_OPTIONS)
        use_given = mock.patch("snlp_jax.train.loss.make_correction", lambda _: given)
        with use_given if given else contextlib.nullcontext():
            loss, gradients = self._loss_fns[program](params, weights)
        return float(loss), to_nanochat(gradients, model.config)

    def continuation(self, draft: Schedule | None = None, draft_len: int = 1) -> np.ndarray:
        """The greedy text after the file's prompt, by the cached engine."""
        drafting = Drafting(draft, draft_len) if draft else None
        request = Request(self.arrays["gen/prompt"].tolist(), len(self.arrays["gen/greedy"]))
        return np.asarray(Engine(self.model, self.params, draft=drafting).generate([request])[0].tokens)

    def accept_counts(self, draft: Schedule, draft_len: int) -> list[int]:
        """Accepted drafts of every round where the drafter, without a cache, runs the solver on the whole text."""
        prompt, exact = self.arrays["gen/prompt"], Schedule.of(self.num_layers)
        size = len(prompt) + len(self.arrays["gen/greedy"])
        tokens_1T = np.zeros((1, size + draft_len), np.int32)  # causality makes what stands behind the text invisible
        tokens_1T[0, : len(prompt)] = prompt

        def likeliest(schedule: Schedule) -> Callable[[], np.ndarray]:
            weights = split(self.model, self.params, schedule)
            run = jax.jit(lambda weights, tokens_1T: forward(self.model, weights, tokens_1T).logits_BTV[0].argmax(-1))
            return lambda: np.asarray(run(weights, tokens_1T))

        by_draft, by_all = likeliest(draft), likeliest(exact)
        length, counts = len(prompt), []
        while length < size:
            for place in range(length, length + draft_len):
                tokens_1T[0, place] = by_draft()[place - 1]
            right = by_all()[length - 1 : length + draft_len]
            is_right = right[:draft_len] == tokens_1T[0, length : length + draft_len]
            count = int(np.cumprod(is_right).sum())
            counts.append(min(count, size - length))
            tokens_1T[0, length : length + count + 1] = right[: count + 1]
            length += count + 1
        return counts


@dataclasses.dataclass(frozen=True)
class GivenProbes(Diagonal):
    """The Diagonal correction with the random vectors of a golden file."""

    vectors: str = ""
    """Array that holds them: [iteration, layer, ...], or [region size, ...] where all layers share one."""
    golden: Golden | None = None

    def probe(self, chain: Chain, key: Array, index: Array | int, number: int, like_L: Array) -> Array:
        assert self.golden is not None
        z = jnp.asarray(self.golden.arrays[self.vectors], like_L.dtype)
        if self.vectors == REG_VECTORS:
            return jnp.broadcast_to(z[self.golden.reg_sizes.index(chain.num_nodes)][None], like_L.shape)
        if like_L.ndim > 4:  # the authors' streams ride in the batch axis, the stream the faster
            z = jnp.moveaxis(z.reshape(*z.shape[:2], -1, like_L.shape[3], *z.shape[-2:]), 3, 4)
        return z[index]
