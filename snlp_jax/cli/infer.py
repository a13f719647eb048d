"""Continue text with a trained model.

    python -m snlp_jax.infer runs/demo --prompt "def main("
    python -m snlp_jax.infer runs/demo --prompt "import " "class A:" --solver idn:n=8,k=2 --temperature 0.8
    python -m snlp_jax.infer runs/demo --speculate idn:n=8,k=1
    python -m snlp_jax.infer runs/demo --speculate mtp
    python -m snlp_jax.infer runs/demo --speculate ngram
    python -m snlp_jax.infer runs/demo --solver auto
    python -m snlp_jax.infer runs/demo --bench
    python -m snlp_jax.infer runs/sft_dialogue --chat --prompt "What is a fable?"

Text appears as it is made; a line with speed, acceptance of drafts and solver iterations goes to stderr. Without a
prompt each line that is typed (or piped in) is one. Several prompts are one batch. Settings are written as in
snlp_jax/notation.py.
"""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from snlp_jax.checks import check_schedule
from snlp_jax.cli.bench import BenchArgs, print_bench, print_tuning
from snlp_jax.cli.chat import talk
from snlp_jax.cli.flags import parse
from snlp_jax.cli.tuning import tuned
from snlp_jax.config import MachineConfig, MeshConfig, ModelConfig, WeightPrecision, check_weights
from snlp_jax.config.check import require
from snlp_jax.data.prompts import prompt_ids, split_stops
from snlp_jax.data.turns import ChatFormat, chat_format
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.eval.solver_file import SolverFile, is_solver_file, read_solver_file
from snlp_jax.infer.conversation import Conversation
from snlp_jax.infer.engine import Engine
from snlp_jax.infer.requests import Request
from snlp_jax.infer.rules import CacheRule, Drafting, Placement, check_settings
from snlp_jax.infer.sampling import Sampling
from snlp_jax.layout import Spread, canonical
from snlp_jax.linearize import fingerprint
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_drafter, parse_schedule
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.run import quantized_params, read_config, read_data, read_params, read_tokenizer
from snlp_jax.solver import Schedule


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    """What training wrote."""
    prompt: tuple[str, ...] = ()
    special: bool = False
    """Read names of special tokens in a prompt, such as <|im_start|>, as these tokens; else they are text."""
    chat: bool = False
    """Each prompt is what a user says, and the text is the answer, in the model's own chat template or else in that of
    data.format chat. Lines are turns of one conversation, whose cache is kept. Ctrl-C ends an answer, Ctrl-D all."""
    system: str = ""
    """With --chat: what the system says first."""
    chat_template: str = ""
    """With --chat: the name of another of the model's own templates, or a jinja file."""
    checkpoint: Literal["best", "last"] = "best"
    """The one of the lowest validation loss, or the newest."""
    solver: str = "seq"
    """How a token is decoded, for example idn:n=8,k=2; the sequential pass by default. Or a file that eval.py --search
    has written, whose drafter and rule are taken too; auto for the run's own."""
    rule: CacheRule | None = None
    """What the cache keeps of a parallel region: of the last evaluation (the default, unless a solver file says
    otherwise), of the corrected trace, or of every evaluation: the solver on the whole text, however few its
    iterations."""
    speculate: str = ""
    """Draft with this setting, with mtp (the model's multi-token-prediction heads) or with ngram (what followed the
    last tokens earlier in the text, for any model), and verify with the sequential pass: the same text, faster where
    drafts are good."""
    draft_len: int = 0
    """Drafts a round. 0 takes that of the solver file, or else 3 (with mtp the number of heads, with ngram 7), and
    drafts none while that is measured slower than plain decoding."""
    max_draft: int | None = None
    """Most drafts a round; by default the draft length."""
    max_new_tokens: int = 128
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """Of the first prompt; the seeds of the others count on."""
    stop: tuple[str, ...] = ()
    """Texts that end the text, and are not part of it. The name of a special token stops at that token."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices over which layers and prompts are spread."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Precision and kernels."""
    sequential: Spread = "tensor"
    """How layers in order lie on the devices of the layer axis, as in eval.py."""
    weights: WeightPrecision = "compute"
    """Kernels in the compute dtype or of eight bits, as in eval.py. Drafts are verified by the same weights, so that
    --speculate gives the text of these."""
    weight_calibration: int = 0
    """Tokens of the run's training text on which kernels of eight bits are clipped; 0 clips none."""
    tune: bool = False
    """First measure which form of kernels products of few rows like on this CPU, and keep that for all models."""
    bench: Annotated[BenchArgs, tyro.conf.arg(name="")] = field(default_factory=BenchArgs)


def main() -> None:
    args = parse(Args, prog="python -m snlp_jax.infer", description=__doc__)
    if args.tune:
        print_tuning()
    if args.bench.bench:
        run_bench(args)
        return
    form = open_form(args)
    engine = open_engine(args)
    if args.prompt:
        generate(engine, args, args.prompt, form)
        return
    if form is not None:
        like = Request((), args.max_new_tokens, args.sampling, *split_stops(form.tokenizer, args.stop))
        conversation = Conversation(engine, form, args.system, like)
        talk(conversation, _lines(), lambda: closing_line(engine))
        return
    for line in _lines():
        try:
            generate(engine, args, (line,))
        except InputError as error:  # a prompt that is too long should not end the session
            print(f"error: {error}", file=sys.stderr)


def open_form(args: Args) -> ChatFormat | None:
    """How conversations are written; None without ``--chat``.

    Raises:
        InputError: flags that belong to conversations or to texts alone, no such template, or one that refuses even
            a question.
    """
    if not args.chat:
        given = [name for name in ("system", "chat_template") if getattr(args, name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for conversations; give --chat too, or leave it out.")
        return None
    if args.special:
        raise InputError(
            "what is said in a chat is text, and its template writes the special tokens; leave --special out."
        )
    form = chat_format(read_tokenizer(args.run_dir), args.chat_template)
    form.prompt(asked(args, "?"))
    return form


def asked(args: Args, question: str) -> list[tuple[str, str]]:
    """A conversation of one question."""
    return [("system", args.system), ("user", question)][not args.system :]


def open_engine(args: Args) -> Engine:
    """The run's model behind the engine that the flags ask for.

    Raises:
        InputError: see :func:`open_engines`.
    """
    return open_engines(args, [args])[0]


def open_engines(args: Args, variants: Sequence[Args]) -> list[Engine]:
    """The run's model behind one engine for each of the variants of ``args``, which may differ in solver, rule and
    drafts. They hold every weight once.

    Raises:
        InputError: see :class:`snlp_jax.infer.engine.Engine` and :func:`snlp_jax.eval.run.open_run`.
    """
    config = read_config(args.run_dir)
    # Mistakes are told before anything is read.
    check_weights(args.weights, args.weight_calibration)
    settings = [settings_of(each, config.model) for each in variants]
    if args.mesh.ring_microbatches != 1:
        raise InputError("mesh.ring_microbatches is for training, which alone cuts its batches; leave it out.")
    mesh = make_mesh(args.mesh) if args.mesh != MeshConfig() else None
    model = LanguageModel(config.model, tuned(args.machine.for_run(config.machine)))
    tokenizer = read_tokenizer(args.run_dir)
    _, params = read_params(args.run_dir, model, args.checkpoint)
    if any(each.file is not None and each.file.fingerprint != fingerprint(params) for each in settings):
        text = "note: this solver file was made for another checkpoint; what it says of quality may not hold."
        print(text, file=sys.stderr)
    fits = load_fits(args.run_dir, params, [schedule for each in settings for schedule in each.schedules])
    data = read_data(args.run_dir, config) if args.weight_calibration else None
    params = quantized_params(model, params, args.weights, args.weight_calibration, data)
    params = params if mesh is not None else canonical(model, params)
    placement = Placement(mesh, args.sequential)
    return [
        Engine(
            model,
            params,
            each.schedule,
            rule=each.rule,
            draft=each.draft,
            placement=placement,
            fits=fits,
            tokenizer=tokenizer,
        )
        for each in settings
    ]


class Settings(NamedTuple):
    """What an engine is asked for."""

    schedule: Schedule
    rule: CacheRule
    draft: Drafting | None
    file: SolverFile | None
    """The solver file that says so, if one does."""

    @property
    def schedules(self) -> list[Schedule]:
        """Those of plain steps and of drafts."""
        return [each for each in (self.schedule, self.draft and self.draft.by) if isinstance(each, Schedule)]


def settings_of(args: Args, model: ModelConfig) -> Settings:
    """What the flags ask of an engine, checked against the model.

    Raises:
        InputError: see :func:`snlp_jax.infer.rules.check_settings` and :func:`snlp_jax.checks.check_schedule`.
    """
    args, found = with_solver_file(args, model.num_layers)
    draft = None
    if args.speculate:
        draft = Drafting(parse_drafter(args.speculate, model.num_layers), args.draft_len or None, args.max_draft)
    settings = Settings(parse_schedule(args.solver, model.num_layers), args.rule or "last_eval", draft, found)
    check_settings(settings.schedule, settings.rule, draft, model.num_mtp_heads)
    for each in settings.schedules:
        check_schedule(model, each)
    return settings


def with_solver_file(args: Args, num_layers: int) -> tuple[Args, SolverFile | None]:
    """Flags with what the solver file says, where one is named; what is given besides goes first."""
    if not is_solver_file(args.solver):
        return args, None
    found = read_solver_file(args.solver, num_layers, args.run_dir)
    takes_drafter = bool(found.speculate and not args.speculate)
    is_drafting = bool(args.speculate or found.speculate)  # a drafter reads the exact cache
    args = dataclasses.replace(
        args,
        solver=found.setting,
        speculate=found.speculate if takes_drafter else args.speculate,
        draft_len=args.draft_len or (found.draft_len if takes_drafter else 0),
        rule=args.rule or (None if is_drafting else found.rule),
    )
    return args, found


def generate(engine: Engine, args: Args, prompts: tuple[str, ...], form: ChatFormat | None = None) -> None:
    """Print the continuations; one prompt's as it comes, several one after another when all are done."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    stop_tokens, stop_strings = split_stops(tokenizer, args.stop)
    if form is None:
        texts = [prompt_ids(tokenizer, prompt, with_special=args.special) for prompt in prompts]
    else:
        texts = [form.prompt(asked(args, prompt)).tolist() for prompt in prompts]
        stop_tokens = tuple(dict.fromkeys([*form.end_ids, *stop_tokens]))
    samplings = (dataclasses.replace(args.sampling, seed=args.sampling.seed + row) for row in range(len(prompts)))
    requests = [
        Request(tokens, args.max_new_tokens, sampling, stop_tokens, stop_strings)
        for tokens, sampling in zip(texts, samplings, strict=False)
    ]
    engine.check(requests)  # before anything is printed
    if len(prompts) == 1:
        print(prompts[0], end="\n" * args.chat, flush=True)
        engine.generate(requests, on_tokens=lambda _, __, text: print(text, end="", flush=True))
        print()
    else:
        for prompt, done in zip(prompts, engine.generate(requests), strict=True):
            print(prompt + "\n" * args.chat + f"{done.text}\n{'-' * 40}")
    print(closing_line(engine), file=sys.stderr)


def run_bench(args: Args) -> None:
    """Time the run's engines: a table, and a last line of JSON.

    Raises:
        InputError: flags that mean nothing here; see :func:`open_engines`.
    """
    if args.chat:
        raise InputError("--bench times plain texts; leave --chat out.")
    require(args.max_new_tokens >= 2, "--bench decodes at least 2 tokens, as the prefill makes one; raise them.")
    num_layers = read_config(args.run_dir).model.num_layers
    plain = dataclasses.replace(args, solver="seq", rule=None, speculate="", draft_len=0, max_draft=None)
    variants = {"seq": plain}
    if args.solver != "seq" or args.speculate:
        drafts = args.speculate and f"drafts of {args.speculate}"
        variants[" + ".join(filter(None, [args.solver, drafts]))] = args
    else:
        half = f"idn:n={max(num_layers // 2, 1)},k=1"
        variants[half] = dataclasses.replace(plain, solver=half)
        variants["drafts of ngram"] = dataclasses.replace(plain, speculate="ngram")
    engines = dict(zip(variants, open_engines(args, list(variants.values())), strict=True))
    tokenizer = engines["seq"].tokenizer
    assert tokenizer is not None
    text = "".join(args.prompt) or inspect.getsource(dataclasses)
    tokens = prompt_ids(tokenizer, text, with_special=args.special)
    prompt = np.resize(np.asarray(tokens, np.int32), args.bench.bench_prompt).tolist()
    print_bench(engines, prompt, args.max_new_tokens, args.bench)


def closing_line(engine: Engine) -> str:
    found = engine.statistics
    assert found is not None
    parts = [f"{found.new_tokens} tokens", f"{found.tokens_per_second:.0f} tokens/s"]
    if engine.draft is not None:
        share = "none drafted" if found.acceptance is None else f"acceptance {found.acceptance:.0%}"
        parts.append(f"{share}, {found.steps} passes of all layers")
    if any(region.tolerance > 0 for region in engine.schedule.regions):
        parts.append(f"{found.iterations / max(found.new_tokens - 1, 1):.2f} iterations a token")
    if found.compile_seconds > 0.05:
        parts.append(f"besides {found.compile_seconds:.1f} s of compilation")
    return "[" + ", ".join(parts) + "]"


def _lines() -> Iterator[str]:
    """Prompts from the terminal until Ctrl-D, or from a pipe; empty lines are passed over."""
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> " if sys.stdin.isatty() else ""):
                yield line
