"""The decoding engine: requests in, tokens out; sequential, layer-parallel or self-speculative, with one cache.

Exactness. ``seq`` reproduces the full forward pass token for token. A schedule with parallel regions decodes with the
solver's K iterations a token; what its cache holds is a rule of its own:

    last_eval       keys and values of the last evaluation, at inputs h^(K-1); free. Exact prefill. K = N is sequential.
    refreshed       of the corrected trace h^K, for one more read of W_k and W_v. Exact prefill. K = N is sequential.
    per_iteration   one cache an evaluation, prefill by the solver: equals the full-sequence solver at every K.

Speculation (Leviathan et al. 2023) drafts with any schedule and verifies with the sequential pass over the same cache.
In float32 greedy text is that of ``seq`` up to ties of logits, and sampled text has its distribution. In bfloat16 the
verification of several tokens rounds its sums in another order than a step of one token does: where two logits are
closer than that rounding, the text may take the other token. A model with heads that look further ahead drafts with
them instead, without any layer (Gloeckle et al. 2024): ``draft="mtp"``. Any model drafts with ``draft="ngram"`` what
followed the last tokens where they stood before (:mod:`snlp_jax.infer.ngram`); sampled text, too, is then that of plain
decoding with the same seeds.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from snlp_jax.cache import plan_rings
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError
from snlp_jax.infer.prefix import BLOCK, PrefixCache
from snlp_jax.infer.programs import Programs, State, warm_segments
from snlp_jax.infer.requests import Completion, Delivery, OnTokens, Request, Statistics, check_request
from snlp_jax.infer.rules import CacheRule, Drafting, Placement, check_settings
from snlp_jax.infer.sampling import Features, rows_of
from snlp_jax.infer.switch import DraftSwitch
from snlp_jax.layout import canonical, in_order, prepare, verifier
from snlp_jax.model import Model
from snlp_jax.notation import Drafter, parse_schedule
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, spec_of
from snlp_jax.parts import Part
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

CHUNK = 16
"""Steps between two looks of the host where somebody waits for the text, a stop string or what drafting costs."""
UNWATCHED = np.iinfo(np.int32).max // 2
"""Steps where nobody waits: the loop ends with its rows."""


COMPILERS = ThreadPoolExecutor(2, thread_name_prefix="compile")
"""A program's compilation uses about one core."""


class Engine:
    """Weights laid out for decoding, and the programs compiled so far.

    Programs are compiled once for every number of rows, prompt length and total length (rounded up, see
    :func:`bucket`), and kind of sampling; requests that differ in anything else share them.

    Args:
        schedule: how a token is decoded, as text ("idn:n=8,k=2") or parsed; the sequential pass by default.
        rule: what the cache keeps of a parallel region, see the module.
        draft: speculate with this schedule as the drafter, with the model's multi-token-prediction heads ("mtp"), or
            with the text so far ("ngram");
            ``schedule`` must then be sequential. With a :class:`Drafting` the number of drafts is chosen too.
        placement: devices and layout.
        fits: calibrations by the names that the schedule's regions give.
        tokenizer: for text, stop strings and nothing else.

    Raises:
        InputError: a combination without an invariant, or that the model or the mesh cannot run.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        schedule: Schedule | str = "seq",
        *,
        rule: CacheRule = "last_eval",
        draft: Drafting | Drafter | str | None = None,
        placement: Placement | None = None,
        fits: Mapping[str, Calibration] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        placement, config = placement or Placement(), model.config
        schedule = parse_schedule(schedule, config.num_layers) if isinstance(schedule, str) else schedule
        drafting = draft if isinstance(draft, Drafting) or draft is None else Drafting(draft)
        drafting = drafting and drafting.parsed(config.num_layers)
        check_settings(schedule, rule, drafting, config.num_mtp_heads)
        drafter = drafting.by if drafting else None
        self.model, self.schedule, self.rule, self.draft = model, schedule, rule, drafter
        self.mesh, self.tokenizer = placement.mesh, tokenizer
        self.draft_len, self.max_draft = drafting.lengths(config.num_mtp_heads) if drafting else (0, 0)
        # One token at a time a scan over a small stack is as fast as unrolled layers and compiles several times faster;
        # but it cannot go through layers whose rings differ, and copies kernels that a CPU reads from its memory.
        is_small = model.backend != "cpu" or config.embed_dim < model.transposed_from
        is_scanned = (
            placement.layout == "auto" and placement.mesh is None and is_small and len(set(config.windows)) == 1
        )
        layout, mesh, sequential = "stack" if is_scanned else placement.layout, placement.mesh, placement.sequential
        first = drafter if isinstance(drafter, Schedule) else schedule
        params = canonical(model, params) if mesh is None else params  # one copy for both
        self.weights = prepare(model, params, first, layout=layout, mesh=mesh, sequential=sequential, fits=fits)
        """Of plain steps, or of the layers that draft."""
        self.exact = self.weights
        """Of plain steps and verification where there is a drafter."""
        if isinstance(drafter, Schedule):
            self.exact = verifier(model, params, self.weights, layout=layout, mesh=mesh, sequential=sequential)
        self.statistics: Statistics | None = None
        self.may_switch = drafting is not None and drafting.length is None
        self._switches: dict[int, DraftSwitch] = {}
        self._programs: dict[Any, Any] = {}
        self._compiling: dict[Any, Future[Any]] = {}
        """Programs that other threads compile."""
        self._compile_seconds = 0.0

    def generate(
        self, requests: Sequence[Request], on_tokens: OnTokens | None = None, kept: PrefixCache | None = None
    ) -> list[Completion]:
        """Go on from every prompt.

        Args:
            on_tokens: is handed the text while it is made.
            kept: with one request, what the last one left and this one may go on from.

        Raises:
            InputError: no request, an empty prompt, a token outside the vocabulary, more tokens than the rotary
                embedding reaches, no tokens asked for, a stop string without a tokenizer. Nothing is compiled before.
        """
        self.check(requests)
        if kept is not None and len(requests) != 1:
            raise InputError(f"{len(requests)} requests cannot go on from one text; give one, or no kept cache.")
        self._compile_seconds = 0.0
        delivery = Delivery(requests, self.tokenizer, on_tokens)
        began = time.perf_counter()
        state, programs = self._prefill(requests, kept)
        jax.block_until_ready(state)
        prefill_seconds, prefill_compile = time.perf_counter() - began - self._compile_seconds, self._compile_seconds
        began = time.perf_counter()
        while True:
            is_active_B = np.asarray(state.is_active_B)
            if delivery.is_watched or not is_active_B.any():
                tokens_BS, length_B = jax.device_get((state.tokens_BS, state.length_B))
                goes_on_B = delivery.take(tokens_BS, length_B, is_active_B)
                if not goes_on_B.any():
                    break
                if (goes_on_B != is_active_B).any():
                    state = state._replace(is_active_B=jax.device_put(goes_on_B, state.is_active_B.sharding))
            state = self._advance(programs, state, delivery.is_watched)
        decode_seconds = time.perf_counter() - began - (self._compile_seconds - prefill_compile)
        completions = delivery.completions(np.asarray(state.log_probs_BS))
        if kept is not None:
            is_exact = self.schedule.is_sequential or self.rule == "per_iteration"
            kept.keep(state, programs, len(requests[0].tokens), is_exact=is_exact)
        counts = jax.tree.map(int, jax.device_get(state.counts))
        self.statistics = Statistics(
            prompt_tokens=sum(len(request.tokens) for request in requests),
            new_tokens=sum(len(completion.tokens) for completion in completions),
            compile_seconds=self._compile_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            steps=counts.steps,
            iterations=counts.iterations,
            tested=counts.tested,
            accepted=counts.accepted,
        )
        return completions

    def check(self, requests: Sequence[Request]) -> None:
        """Raise the InputError that :meth:`generate` would, without compiling anything."""
        if not requests:
            raise InputError("there are no requests; give at least one.")
        for number, request in enumerate(requests):
            try:
                check_request(request, self.model.config.max_context, has_tokenizer=self.tokenizer is not None)
            except InputError as error:
                raise error if len(requests) == 1 else InputError(f"request {number}: {error}") from error
            self.model.check_tokens(np.asarray(request.tokens))
        if self.mesh is not None and len(requests) % self.mesh.shape["data"]:
            raise InputError(
                f"{len(requests)} requests do not divide over the mesh's {self.mesh.shape['data']} parts of the batch; "
                "give a multiple."
            )

    # -- Programs ------------------------------------------------------------------------------------------------------

    def _prefill(self, requests: Sequence[Request], kept: PrefixCache | None = None) -> tuple[State, Programs]:
        lengths = np.asarray([len(request.tokens) for request in requests], np.int32)
        targets = lengths + np.asarray([request.max_new_tokens for request in requests], np.int32)
        longest = self.model.config.max_context
        capacity, width = (min(bucket(int(count.max())), longest) for count in (targets, lengths))
        before = None
        if kept is not None:
            windows = [self.model.config.windows[i] for i in self.model.config.attention_layers]
            before = kept.begin(requests[0].tokens, windows)
            capacity = max(capacity, kept.capacity)
        prompt_BP = np.zeros((len(requests), width if before is None else capacity), np.int32)
        num_stops = bucket(max(len(request.stop_tokens) for request in requests), 1)
        stop_BX = np.full((len(requests), num_stops), -1, np.int32)
        for row, request in enumerate(requests):
            prompt_BP[row, : len(request.tokens)] = request.tokens
            stop_BX[row, : len(request.stop_tokens)] = request.stop_tokens
        rows, features = rows_of([request.sampling for request in requests])
        programs = self._programs_for(capacity, features, 1 if kept is None else BLOCK)
        arguments = (*map(jnp.asarray, (prompt_BP, lengths, targets, stop_BX)), rows)
        if self.mesh is not None:
            arguments = jax.device_put(arguments, jax.tree.map(self._by_row, arguments))
        weights = self.exact if self.draft or self.rule == "per_iteration" else in_order(self.weights)
        name, arguments = ("prefill", arguments) if before is None else ("extend", (before, *arguments))
        arguments = (weights, *arguments)
        self._compile_ahead(programs, name, arguments, has_steps=bool((targets > lengths + 1).any()))
        return self._compiled(programs, name, arguments)(*arguments), programs

    def _advance(self, programs: Programs, state: State, is_watched: bool) -> State:
        """Some steps: as many as there are, or as the host waits for."""
        steps = jnp.int32(CHUNK if is_watched or self.may_switch else UNWATCHED)
        if not self.may_switch:
            return self._run_steps(programs, state, steps, is_drafting=self.draft is not None)[0]
        switch, before = self._switches.setdefault(len(state.length_B), DraftSwitch()), jax.device_get(state.counts)
        is_drafting = switch.next()
        state, seconds = self._run_steps(programs, state, steps, is_drafting=is_drafting)
        made = jax.tree.map(np.subtract, jax.device_get(state.counts), before)
        switch.report(is_drafting, float(seconds / made.steps * made.rows / made.tokens))
        return state

    def _run_steps(
        self, programs: Programs, state: State, steps: jax.Array, *, is_drafting: bool
    ) -> tuple[State, float]:
        """The state after some steps, and the seconds that took where a switch waits for it."""
        name, arguments = self._step(state, steps, is_drafting=is_drafting)
        run = self._compiled(programs, name, arguments)
        began = time.perf_counter()
        state = run(*arguments)
        if self.may_switch:
            jax.block_until_ready(state)
        return state, time.perf_counter() - began

    def _step(self, state: State, steps: jax.Array, *, is_drafting: bool) -> tuple[str, tuple[Any, ...]]:
        """The program that makes steps, and its arguments."""
        if is_drafting:
            return "speculate", (self.weights, self.exact, state, steps, jnp.int32(self.draft_len))
        return "decode", (self.exact, state, steps)

    def _programs_for(self, capacity: int, features: Features, block: int) -> Programs:
        """Programs for texts of up to ``capacity`` tokens, ``block`` of which or more are written at once."""
        block = max(block, self.max_draft + 1)
        plans = plan_rings(self.model, self.weights, capacity, block, self.mesh)
        if self.draft is not None:  # layers that the drafter leaves out are the verifier's alone
            others = plan_rings(self.model, self.exact, capacity, block, self.mesh)
            plans = tuple(plan or other for plan, other in zip(plans, others, strict=True))
        return Programs(
            self.model,
            features,
            plans,
            self.rule,
            mesh=self.mesh,
            num_slots=capacity + block,
            warm_segments=warm_segments(self.weights),
            max_draft=self.max_draft,
            drafter=self.draft if isinstance(self.draft, str) else "layers",
            block=block,
        )

    def _compiled(self, programs: Programs, name: str, arguments: tuple[Any, ...]) -> Any:
        """The executable of one of the programs for arguments of these shapes. Steps take the state over."""
        key = _key(programs, name, arguments)
        if key not in self._programs:
            began = time.perf_counter()
            self._compile(programs, name, arguments)
            self._programs[key] = self._compiling.pop(key).result()
            self._compile_seconds += time.perf_counter() - began
        return self._programs[key]

    def _compile(self, programs: Programs, name: str, arguments: tuple[Any, ...]) -> jax.stages.Lowered | None:
        """Begin to compile a program in another thread, so that the next one can be traced or another one run; None
        where that has been done. Of the arguments shapes alone are read."""
        key = _key(programs, name, arguments)
        if key in self._programs or key in self._compiling:
            return None
        run = getattr(programs, name)
        donated = tuple(index for index, argument in enumerate(arguments) if isinstance(argument, State))
        out = None if self.mesh is None else self._shardings(jax.eval_shape(run, *arguments))
        lowered = jax.jit(run, donate_argnums=donated, out_shardings=out).lower(*arguments)
        self._compiling[key] = COMPILERS.submit(lowered.compile)
        return lowered

    def _compile_ahead(self, programs: Programs, name: str, arguments: tuple[Any, ...], *, has_steps: bool) -> None:
        """Begin to compile the prefill, and meanwhile the first steps after it, whose state it says the shapes of."""
        began = time.perf_counter()
        lowered = self._compile(programs, name, arguments)
        if lowered is None:
            return
        if has_steps and self.mesh is None:
            self._compile(programs, *self._step(lowered.out_info, jnp.int32(0), is_drafting=self.draft is not None))
        self._compile_seconds += time.perf_counter() - began

    # -- Devices -------------------------------------------------------------------------------------------------------

    def _by_row(self, leaf: Any) -> NamedSharding:
        assert self.mesh is not None
        is_divisible = leaf.ndim > 0 and leaf.shape[0] % self.mesh.shape["data"] == 0
        return NamedSharding(self.mesh, PartitionSpec("data") if is_divisible else PartitionSpec())

    def _shardings(self, state: State) -> State:
        """Where a state lies: the cache with its layers, the rest by rows."""
        mesh, config = self.mesh, self.model.config
        assert mesh is not None

        def of_part(part: Part, rings: Any, warm: Any) -> tuple[Any, Any]:
            layout = BY_LAYER if part.is_spread else BY_FEATURE
            place = lambda leaf: NamedSharding(mesh, spec_of("cache", leaf.shape, config, mesh, layout))  # noqa: E731
            trace = NamedSharding(mesh, PartitionSpec("layer" if part.is_spread else None))
            return jax.tree.map(place, rings), None if warm is None else trace

        by_row = jax.tree.map(self._by_row, state._replace(rings=(), warm=()))
        # The exact weights have all parts; the drafter may leave layers out.
        rings, warm = zip(*map(of_part, self.exact.parts, state.rings, state.warm), strict=True)
        return by_row._replace(rings=rings, warm=warm)


def _key(programs: Programs, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))
    return name, programs, shapes


def bucket(count: int, smallest: int = 16) -> int:
    """The next size that programs are compiled for: powers of two times ``smallest``, and from 2,048 on multiples of
    512, so that no more than a fifth is filled up in vain."""
    if count > 2048:
        return -(-count // 512) * 512
    return max(smallest, 1 << max(count - 1, 0).bit_length())
