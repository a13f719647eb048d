"""The model "snlp_jax" of EleutherAI's lm_eval: a trained run under one solver setting.

    python -m snlp_jax.eval.lm_eval_adapter --model snlp_jax --model_args "run_dir=runs/demo,setting=idn:n=8;k=2" \\
        --tasks arc_easy --batch_size 8

is lm_eval's own command line with this model in it; every other flag is lm_eval's. From Python, import this module and
give ``lm_eval.simple_evaluate`` the model's name, or a :class:`SolverLM`. Because commas separate lm_eval's arguments,
those of a setting are written as semicolons. Needs ``pip install "snlp-jax[lm_eval]"``.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit('error: lm_eval is not installed; `pip install "snlp-jax[lm_eval]"` brings it.')

from snlp_jax.checks import check_schedule
from snlp_jax.config.check import check_value
from snlp_jax.data.template import choose_template
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.eval.chat_text import chat_text
from snlp_jax.eval.solver_file import setting_of
from snlp_jax.eval.text_model import Prompt, TextModel
from snlp_jax.infer.rules import CacheRule
from snlp_jax.infer.sampling import Sampling
from snlp_jax.notation import parse_schedule
from snlp_jax.run import Which, load_run, read_config

NAME = "snlp_jax"
DEFAULT_NEW_TOKENS = 256
"""lm_eval's own."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Settings of other decoders with the values that say what this one does anyway."""

_logger = logging.getLogger(__name__)


@register_model(NAME)
class SolverLM(LM):  # type: ignore[misc]  # Any, where lm_eval is not installed
    """A run's model under one setting.

    Log-likelihoods are those of :class:`snlp_jax.eval.text_model.TextModel`, which ``eval.py --tasks`` prints too.
    As with lm_eval's own models, names of special tokens in a text are read as these tokens.

    Args:
        run_dir: what training wrote.
        setting: as in eval.py, with semicolons for commas.
        checkpoint: "best" or "last".
        rule: of generation, see :mod:`snlp_jax.infer.engine`.
        batch_size: by default that of the run's evaluation.
        max_batch_size, device: of other models; not used.

    Raises:
        InputError: an argument that is unknown, or that the run cannot serve.
    """

    def __init__(
        self,
        run_dir: str = "",
        setting: str = "seq",
        checkpoint: Which = "best",
        rule: CacheRule = "last_eval",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            names = ", ".join(unknown)
            raise InputError(
                f"model_args {names} mean nothing to {NAME}; it knows run_dir, setting, checkpoint and rule, and in a "
                "setting semicolons stand for commas, as in setting=idn:n=8;k=2."
            )
        if not run_dir:
            raise InputError(f"{NAME} needs model_args run_dir=RUN_DIR, a directory that training has written.")
        check_value(Which, checkpoint, "checkpoint")
        self._template: str | None = None
        path = Path(str(run_dir))
        config = read_config(path)
        num_layers = config.model.num_layers
        schedule = parse_schedule(setting_of(str(setting).replace(";", ","), num_layers, path), num_layers)
        check_schedule(config.model, schedule)
        if not str(batch_size or 0).isdigit():  # "auto", "auto:4"
            batch_size = None
        model, params, tokenizer, _ = load_run(path, checkpoint)
        self.text_model = TextModel(
            model,
            params,
            tokenizer,
            schedule,
            rule=rule,
            batch_size=int(batch_size or config.eval.batch_size),
            fits=load_fits(path, params, [schedule]),
            with_special=True,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether greedy decoding would have said it."""
        with self._told_of_cuts(len(requests)):
            scores = self.text_model.log_likelihoods([request.args for request in requests])
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of each whole text after what stands before it."""
        return self.text_model.rolling([text for (text,) in (request.args for request in requests)])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continuations by the cached decoder."""
        with self._told_of_cuts(len(requests)):
            return self.text_model.complete([prompt_of(*request.args) for request in requests])

    @contextlib.contextmanager
    def _told_of_cuts(self, num_requests: int) -> Iterator[None]:
        before = self.text_model.num_cut
        yield
        if num_cut := self.text_model.num_cut - before:
            _logger.warning(
                "%d of %d contexts are longer than the %d tokens that the model reads and lost their beginning; give "
                "fewer examples (--num_fewshot).",
                *(num_cut, num_requests, self.text_model.max_context),
            )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that :meth:`apply_chat_template` takes from now on: the model's default one, or that of a name
        or file. None where none is asked for, "" for the plain-text one."""
        if chat_template is False:
            return None
        choice = "" if isinstance(chat_template, bool) else chat_template
        self._template = choose_template(self.text_model.tokenizer.special.chat_template, choice)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's template; without what the system says where the template refuses that."""
        if self._template is None:
            self.chat_template(True)
        write = functools.partial(
            chat_text, self.text_model.tokenizer, self._template or "", opens_answer=add_generation_prompt
        )
        try:
            return write(chat_history)
        except InputError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = write(others)
            _logger.warning("The chat template refuses what the system says, which is left out.")
            return text

    @property
    def tokenizer_name(self) -> str:
        return self.text_model.tokenizer.name


def prompt_of(context: str, settings: dict[str, Any]) -> Prompt:
    """lm_eval's ``generation_kwargs`` in our words.

    Raises:
        InputError: a setting that the decoder does not have.
    """
    given = {name: value for name, value in settings.items() if value is not None and value != NEUTRAL.get(name)}
    until = given.pop("until", [])
    lengths = [given.pop(name) for name in LENGTHS if name in given]
    sampled = {name: given.pop(name) for name in SAMPLED if name in given}
    do_sample = given.pop("do_sample", sampled.get("temperature", 0) != 0)
    if given:
        text = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(f"generation_kwargs {text} mean nothing to {NAME}; leave them out.")
    if do_sample:
        sampled = {"temperature": 1.0} | sampled
        sampled |= {"top_k": 0} if sampled.get("top_k") == -1 else {}  # as others write that all are kept
    else:
        sampled = {name: sampled[name] for name in ("repetition_penalty",) if name in sampled}
    stops = (until,) if isinstance(until, str) else tuple(until)
    check_value(tuple[str, ...], stops, "generation_kwargs until")
    length = lengths[0] if lengths else DEFAULT_NEW_TOKENS
    check_value(int, length, "generation_kwargs max_gen_toks")
    return Prompt(context, length, tuple(filter(None, stops)), Sampling(**sampled))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from snlp_jax.cli.entry import run_entry

    run_entry(cli_evaluate)
