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
        self._solved: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self._losses: dict[tuple, tuple[float, Params]] = {}

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
