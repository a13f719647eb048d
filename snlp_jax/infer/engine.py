"""The decoding engine: requests in, tokens out; sequential, layer-parallel or self-speculative, with one cache.

Exactness. ``seq`` reproduces the full forward pass token for token. A schedule with parallel regions decodes with the
solver's K iterations a token; what its cache holds is a rule of its own:

    last_eval       keys and values of the last evaluation, at inputs h^(K-1); free. Exact prefill. K = N is sequential.
    refreshed       of the corrected trace h^K, for one more read of W_k and W_v. Exact prefill. K = N is sequential.
    per_iteration   one cache an evaluation, prefill by the solver: equals the full-sequence solver at every K.

Speculation (Leviathan et al. 2023) drafts with any schedule and verifies with the sequential pass over the same cache:
greedy text is that of ``seq`` up to ties of logits, sampled text has its distribution. A model with heads that look
further ahead drafts with them instead, without any layer (Gloeckle et al. 2024): ``draft="mtp"``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.cache import plan_rings
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError
from snlp_jax.infer.pace import Pace
from snlp_jax.infer.programs import Counts, Programs, State, warm_segments
from snlp_jax.infer.rules import KEPT, CacheRule, check_settings
from snlp_jax.infer.sampling import Features, Sampling, rows_of
from snlp_jax.infer.text import TextStream
from snlp_jax.layout import Layout, Spread, in_order, prepare, verifier
from snlp_jax.model import LanguageModel
from snlp_jax.notation import Drafter
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, spec_of
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

MAX_DRAFT = 8
"""Most drafts a round where their number adapts and nothing else is asked for."""
CHUNK = 16
"""Steps between two looks of the host where somebody waits for the text, a stop string or the draft length."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on."""

    tokens: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    """Any of these ends the text and is not part of it."""
    stop_strings: tuple[str, ...] = ()
    """The same for text; needs the engine's tokenizer."""


@dataclass(frozen=True)
class Completion:
    """What came of a request."""

    tokens: list[int]
    log_probs: list[float]
    """Of each token under the model itself, before temperature, filters and penalties."""
    finish: Literal["length", "stop"]
    text: str | None
    """None without a tokenizer."""


@dataclass(frozen=True)
class Statistics:
    """Of the last :meth:`Engine.generate`."""

    prompt_tokens: int
    new_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    """Without the first token of every row, which comes out of the prefill."""
    steps: int
    """Plain steps and speculative rounds, over all rows at once."""
    iterations: int
    """Solver iterations, summed over rows, of regions that stop by a tolerance."""
    tested: int
    """Drafts that were compared with what the exact pass says."""
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def acceptance(self) -> float | None:
        """Share of the tested drafts that were accepted; None where nothing was drafted."""
        return self.accepted / self.tested if self.tested else None


OnTokens = Callable[[int, list[int], str], None]
"""Called with a row, its new tokens and their text ("" without a tokenizer), some tokens at a time."""


class Engine:
    """Weights laid out for decoding, and the programs compiled so far.

    Programs are compiled once for every number of rows, power of two of prompt length and of total length, and kind of
    sampling; requests that differ in anything else share them.

    Args:
        schedule: how a token is decoded; the sequential pass by default.
        rule: what the cache keeps of a parallel region, see the module.
        draft: speculate with this schedule as the drafter, or with the model's multi-token-prediction heads ("mtp");
            ``schedule`` must then be sequential.
        draft_len: drafts a round; None adapts the number to what acceptance and costs are measured, down to plain
            decoding.
        max_draft: most drafts a round, compiled in: the verification evaluates one token more. By default the draft
            length, or 8 where that adapts; with heads at most as many as there are.
        layout: "stack" scans over layers in order, "list" unrolls them; "auto" scans where all windows are alike.
        mesh, sequential, fits: see :func:`snlp_jax.layout.prepare`.
        tokenizer: for text, stop strings and nothing else.

    Raises:
        InputError: a combination without an invariant, or that the model or the mesh cannot run.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        schedule: Schedule | None = None,
        *,
        rule: CacheRule = "last_eval",
        draft: Drafter | None = None,
        draft_len: int | None = None,
        max_draft: int | None = None,
        layout: Layout = "auto",
        mesh: Mesh | None = None,
        sequential: Spread = "tensor",
        fits: Mapping[str, Calibration] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        schedule = schedule or Schedule.of(model.config.num_layers)
        num_heads = model.config.num_mtp_heads
        check_settings(schedule, rule, draft, draft_len, max_draft, num_heads)
        most = draft_len or (min(MAX_DRAFT, num_heads) if draft == "mtp" else MAX_DRAFT)
        drafting = draft if isinstance(draft, Schedule) else None
        self.model, self.schedule, self.draft, self.rule, self.mesh = model, schedule, draft, rule, mesh
        self.draft_len, self.max_draft, self.tokenizer = draft_len, (max_draft or most) if draft else 0, tokenizer
        # One token at a time a scan over a stack is as fast as unrolled layers and compiles several times faster; but
        # it cannot go through layers whose rings differ.
        if layout == "auto" and len(set(model.config.windows)) == 1:
            layout = "stack"
        settings: dict[str, Any] = {"num_tokens": 1, "layout": layout, "mesh": mesh, "sequential": sequential}
        self.weights = prepare(model, params, drafting or schedule, fits=fits, **settings)
        """Of plain steps, or of the layers that draft."""
        self.exact = (
            self.weights
            if drafting is None
            else verifier(model, params, self.weights, layout=layout, mesh=mesh, sequential=sequential)
        )
        """Of plain steps and verification where there is a drafter."""
        self.pace = Pace(self.max_draft, draft_len) if draft else None
        self.statistics: Statistics | None = None
        self._programs: dict[Any, Any] = {}
        self._compile_seconds = 0.0

    @property
    def num_weight_bytes(self) -> int:
        """Of all arrays that are held, those of two layouts included."""
        leaves = jax.tree.leaves((self.weights, self.exact))
        return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in leaves}.values())

    def generate(self, requests: Sequence[Request], on_tokens: OnTokens | None = None) -> list[Completion]:
        """Go on from every prompt.

        Raises:
            InputError: no request, an empty prompt, a token outside the vocabulary, more tokens than the rotary
                embedding reaches, no tokens asked for, a stop string without a tokenizer. Nothing is compiled before.
        """
        self.check(requests)
        self._compile_seconds = 0.0
        streams = [TextStream(self.tokenizer, request.stop_strings) for request in requests] if self.tokenizer else None
        began = time.perf_counter()
        state, programs = self._prefill(requests)
        jax.block_until_ready(state)
        prefill_seconds, prefill_compile = time.perf_counter() - began - self._compile_seconds, self._compile_seconds
        given = [0] * len(requests)
        is_watched = on_tokens is not None or any(request.stop_strings for request in requests)
        began = time.perf_counter()
        while True:
            active_B, length_B = jax.device_get((state.is_active_B, state.length_B))
            if is_watched:
                state = self._show(requests, state, active_B, length_B, streams, given, on_tokens)
                active_B = jax.device_get(state.is_active_B)
            if not active_B.any():
                break
            state = self._advance(programs, state, is_watched)
        decode_seconds = time.perf_counter() - began - (self._compile_seconds - prefill_compile)
        completions = self._finish(requests, state)
        counts = _read(state.counts)
        self.statistics = Statistics(
            prompt_tokens=sum(len(request.tokens) for request in requests),
            new_tokens=counts.pop("tokens"),
            compile_seconds=self._compile_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            **counts,
        )
        return completions

    # -- Programs ------------------------------------------------------------------------------------------------------

    def _prefill(self, requests: Sequence[Request]) -> tuple[State, Programs]:
        lengths = np.asarray([len(request.tokens) for request in requests], np.int32)
        targets = lengths + np.asarray([request.max_new_tokens for request in requests], np.int32)
        longest = self.model.config.max_context
        capacity = min(_bucket(int(targets.max())), longest)
        prompt_BP = np.zeros((len(requests), min(_bucket(int(lengths.max())), longest)), np.int32)
        num_stops = _bucket(max(len(request.stop_tokens) for request in requests), 1)
        stop_BX = np.full((len(requests), num_stops), -1, np.int32)
        for row, request in enumerate(requests):
            prompt_BP[row, : len(request.tokens)] = request.tokens
            stop_BX[row, : len(request.stop_tokens)] = request.stop_tokens
        rows, features = rows_of([request.sampling for request in requests])
        programs = self._programs_for(capacity, features)
        arguments = self._put((jnp.asarray(prompt_BP), *map(jnp.asarray, (lengths, targets, stop_BX)), rows))
        by_solver = self.rule == "per_iteration"
        weights = self.exact if self.draft else self.weights if by_solver else in_order(self.weights)
        warm = warm_segments(self.weights)
        settings = {"num_slots": capacity + self.max_draft + 1, "warm_segments": warm}
        run = self._compiled(programs, "prefill", (weights, *arguments), settings)
        return run(weights, *arguments), programs

    def _advance(self, programs: Programs, state: State, is_watched: bool) -> State:
        """Some steps: as many as there are, or as the host waits for."""
        if self.pace is None:
            steps = jnp.int32(CHUNK if is_watched else np.iinfo(np.int32).max // 2)
            plain = (self.weights, state, steps)
            return self._compiled(programs, "decode", plain, donate=1)(*plain)
        draft_len = self.pace.next()
        is_adaptive = self.draft_len is None
        steps = jnp.int32(CHUNK if is_watched or is_adaptive else np.iinfo(np.int32).max // 2)
        if draft_len == 0:
            arguments: tuple = (self.exact, state, steps)
            run = self._compiled(programs, "decode", arguments, donate=1)
        else:
            width = min(_bucket(draft_len + 1, 2), self.max_draft + 1) - 1
            arguments = (self.weights, self.exact, state, steps, jnp.int32(draft_len))
            run = self._compiled(programs, "speculate", arguments, {"max_draft": width}, donate=2)
        if not is_adaptive:
            return run(*arguments)
        before = _read(state.counts)
        began = time.perf_counter()
        state = jax.block_until_ready(run(*arguments))
        seconds = time.perf_counter() - began
        made = {name: count - before[name] for name, count in _read(state.counts).items()}
        rounds = made["steps"]
        self.pace.report(draft_len, seconds, rounds, made["tested"], made["accepted"], made["tokens"])
        return state

    def _programs_for(self, capacity: int, features: Features) -> Programs:
        block = self.max_draft + 1
        plans = plan_rings(self.model, self.weights, capacity, block)
        if self.draft is not None:  # layers that the drafter leaves out are the verifier's alone
            others = plan_rings(self.model, self.exact, capacity, block)
            plans = tuple(mine or other for mine, other in zip(plans, others, strict=True))
        return Programs(self.model, features, plans, KEPT[self.rule], self.mesh, by_heads=self.draft == "mtp")

    def _compiled(
        self, programs: Programs, name: str, arguments: tuple, settings: Any = None, donate: int | None = None
    ) -> Any:
        """The executable of one of the programs for arguments of these shapes."""
        settings = settings or {}
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))
        key = (name, programs, tuple(settings.items()), shapes)
        if key not in self._programs:
            began = time.perf_counter()
            run: Any = lambda *arguments: getattr(programs, name)(*arguments, **settings)  # noqa: E731
            donated = () if donate is None else (donate,)
            out: Any = None
            if self.mesh is not None:
                out = self._shardings(jax.eval_shape(run, *arguments))
            self._programs[key] = jax.jit(run, donate_argnums=donated, out_shardings=out).lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - began
        return self._programs[key]

    # -- Devices -------------------------------------------------------------------------------------------------------

    def _put(self, tree: Any) -> Any:
        if self.mesh is None:
            return tree
        return jax.device_put(tree, jax.tree.map(self._by_row, tree))

    def _by_row(self, leaf: Any) -> NamedSharding:
        assert self.mesh is not None
        is_divisible = leaf.ndim > 0 and leaf.shape[0] % self.mesh.shape["data"] == 0
        return NamedSharding(self.mesh, PartitionSpec("data") if is_divisible else PartitionSpec())

    def _shardings(self, state: State) -> State:
        """Where a state lies: the cache with its layers, the rest by rows."""
        mesh, config = self.mesh, self.model.config
        assert mesh is not None

        def of_segment(tree: Any, is_spread: bool) -> Any:
            layout = BY_LAYER if is_spread else BY_FEATURE
            place = lambda leaf: NamedSharding(mesh, spec_of("cache", leaf.shape, config, mesh, layout))  # noqa: E731
            return jax.tree.map(place, tree)

        def of_trace(tree: Any, is_spread: bool) -> Any:
            spec = PartitionSpec("layer" if is_spread else None)
            return jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)

        spread = self.exact.is_spread  # the drafter may leave layers out
        by_row = jax.tree.map(self._by_row, state._replace(rings=(), warm=()))
        rings = tuple(map(of_segment, state.rings, spread))
        return by_row._replace(rings=rings, warm=tuple(map(of_trace, state.warm, spread)))

    # -- Requests ------------------------------------------------------------------------------------------------------

    def check(self, requests: Sequence[Request]) -> None:
        """Raise the InputError that :meth:`generate` would, without compiling anything."""
        if not requests:
            raise InputError("there are no requests; give at least one.")
        for number, request in enumerate(requests):
            which = f"request {number}: " if len(requests) > 1 else ""
            tokens = np.asarray(request.tokens)
            if tokens.size == 0:
                raise InputError(f"{which}the prompt is empty; give at least one token.")
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                raise InputError(f"{which}the prompt must be a flat sequence of token ids.")
            self.model.check_tokens(tokens)
            if request.max_new_tokens < 1:
                raise InputError(f"{which}max_new_tokens is {request.max_new_tokens}; it must be at least 1.")
            total, longest = tokens.size + request.max_new_tokens, self.model.config.max_context
            if total > longest:
                raise InputError(
                    f"{which}a prompt of {tokens.size} and {request.max_new_tokens} new tokens are {total}, more than "
                    f"the rotary embedding's {longest}; ask for fewer or shorten the prompt."
                )
            if request.stop_strings and self.tokenizer is None:
                raise InputError(f"{which}stop strings need a tokenizer; give the engine one.")
        if self.mesh is not None and len(requests) % self.mesh.shape["data"]:
            raise InputError(
                f"{len(requests)} requests do not divide over the mesh's {self.mesh.shape['data']} parts of the batch; "
                "give a multiple."
            )

    def _show(
        self,
        requests: Sequence[Request],
        state: State,
        active_B: np.ndarray,
        length_B: np.ndarray,
        streams: list[TextStream] | None,
        given: list[int],
        on_tokens: OnTokens | None,
    ) -> State:
        """Hand out what is new of every row, and end rows whose text holds a stop string."""
        tokens_BS, still_B = np.asarray(state.tokens_BS), active_B.copy()
        for row, request in enumerate(requests):
            before, start = given[row], len(request.tokens)
            new = [int(token) for token in tokens_BS[row, start + before : int(length_B[row]) + 1]]
            if not new or (streams is not None and streams[row].is_stopped):
                continue
            given[row] += len(new)
            if new[-1] in request.stop_tokens:
                new.pop()
            text = ""
            if streams is not None:
                stream = streams[row]
                text = stream.push(new)
                if stream.is_stopped:
                    still_B[row] = False
                    new = new[: stream.num_tokens - before]
                elif not active_B[row]:
                    text += stream.finish()
            if on_tokens is not None and (new or text):
                on_tokens(row, new, text)
        if (still_B == active_B).all():
            return state
        return state._replace(is_active_B=jax.device_put(jnp.asarray(still_B), state.is_active_B.sharding))

    def _finish(self, requests: Sequence[Request], state: State) -> list[Completion]:
        tokens_BS, log_probs_BS, length_B = jax.device_get((state.tokens_BS, state.log_probs_BS, state.length_B))
        completions = []
        for row, request in enumerate(requests):
            start = len(request.tokens)
            tokens = [int(token) for token in tokens_BS[row, start : int(length_B[row]) + 1]]
            finish: Literal["length", "stop"] = "length"
            if tokens and tokens[-1] in request.stop_tokens:
                tokens, finish = tokens[:-1], "stop"
            text = None
            if self.tokenizer is not None:
                stream = TextStream(self.tokenizer, request.stop_strings)
                text = stream.push(tokens)
                if stream.is_stopped:
                    tokens, finish = tokens[: stream.num_tokens], "stop"
                else:
                    text += stream.finish()
            log_probs = [float(value) for value in log_probs_BS[row, start : start + len(tokens)]]
            completions.append(Completion(tokens, log_probs, finish, text))
        return completions


def _read(counts: Counts) -> dict[str, int]:
    return {name: int(count) for name, count in jax.device_get(counts)._asdict().items()}


def _bucket(count: int, smallest: int = 16) -> int:
    """The power of two, times ``smallest``, that holds ``count``."""
    size = smallest
    while size < count:
        size *= 2
    return size
