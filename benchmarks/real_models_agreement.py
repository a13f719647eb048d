"""A run's logits and greedy text beside those of transformers from the same GGUF file."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.forward import forward
from snlp_jax.infer import Engine, Request
from snlp_jax.layout import prepare
from snlp_jax.run import Run, load_run
from snlp_jax.solver import Schedule

PROMPTS = (
    "The capital of France is",
    "In 1969, the first people on the Moon",
    "def fibonacci(n):\n",
    "A short recipe for bread:\n1.",
    "The three laws of motion, which Isaac Newton",
)
TEXT = (
    "The Pacific Ocean is the largest and deepest of Earth's five oceanic divisions. It extends from the Arctic Ocean "
    "in the north to the Southern Ocean in the south, and is bounded by the continents of Asia and Australia in the "
    "west and the Americas in the east. "
) * 12
NUM_TOKENS = 600
"""Of the text whose logits are compared."""
NUM_NEW = 64


def agreement(run_dir: Path, file: Path, num_prompts: int) -> dict[str, Any]:
    """Largest differences of logits over a text, and how many greedy texts are the same: ours with the cache beside
    ours without, and beside transformers' with its cache; the latter also in the model's own chat template.

    Differences of logits are absolute. Without transformers there is ``transformers: None`` and ours alone.
    """
    run, theirs = load_run(run_dir), _transformers(file)
    found: dict[str, Any] = {"transformers": None, "prompts": num_prompts, "new_tokens": NUM_NEW}
    ids_T = np.asarray([*run.tokenizer.special.prefix_ids, *run.tokenizer.encode(TEXT)], np.int32)[:NUM_TOKENS]
    prompts = [[*run.tokenizer.special.prefix_ids, *map(int, run.tokenizer.encode(text))] for text in PROMPTS]
    logits_fn = _logits_fn(run)
    engine = Engine(run.model, run.params, tokenizer=run.tokenizer)
    texts = [_with_cache(engine, prompt) for prompt in prompts[:num_prompts]]
    found["same_without_cache"] = sum(
        text == _without_cache(logits_fn, prompt) for prompt, text in zip(prompts, texts, strict=False)
    )
    if theirs is None:
        return found
    import transformers

    found["transformers"] = transformers.__version__
    ours_TV, theirs_TV = logits_fn(ids_T), theirs.logits(ids_T)
    found["logits_largest"] = float(np.abs(theirs_TV).max())
    found["logits_difference"] = float(np.abs(ours_TV - theirs_TV).max())
    found["same_likeliest"] = float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).mean())
    found["same_prompt_tokens"] = sum(
        theirs.encode(text) == prompt for text, prompt in zip(PROMPTS, prompts, strict=True)
    )
    found["same_as_theirs"] = sum(text == theirs.greedy(prompt) for prompt, text in zip(prompts, texts, strict=False))
    if run.tokenizer.special.chat_template:
        chats = [theirs.chat(text) for text in PROMPTS[:num_prompts]]
        found["same_in_chat"] = sum(_with_cache(engine, chat) == theirs.greedy(chat) for chat in chats)
    return found


class _Theirs:
    """transformers' model of a GGUF file, in float32."""

    def __init__(self, file: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(**place)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def chat(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        with self._torch.no_grad():
            return self._model(self._torch.tensor(ids_T[None], dtype=self._torch.long)).logits[0].numpy()

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        ids = self._torch.tensor([list(prompt)])
        settings = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": -1}  # through every end token
        every = self._torch.ones_like(ids)  # left to itself it masks what pads, which is in a conversation
        with self._torch.no_grad():
            return self._model.generate(ids, attention_mask=every, **settings)[0, len(prompt) :].tolist()


def _transformers(file: Path) -> _Theirs | None:
    """None where a package that it needs for GGUF files is missing."""
    is_there = all(find_spec(name) for name in ("torch", "transformers", "accelerate", "gguf"))
    return _Theirs(file) if is_there else None


def _logits_fn(run: Run) -> Any:
    """Ids [T] -> logits [T, V] by one forward pass without a cache, float32."""
    weights = prepare(run.model, run.params, Schedule.of(run.config.model.num_layers), layout="stack")
    whole = jax.jit(lambda weights, tokens_BT: forward(run.model, weights, tokens_BT).logits_BTV[0])
    return lambda ids_T: np.asarray(whole(weights, jnp.asarray(ids_T)[None]))


def _with_cache(engine: Engine, prompt: Sequence[int]) -> list[int]:
    """Greedy, through every end token."""
    return engine.generate([Request(prompt, NUM_NEW)])[0].tokens


def _without_cache(logits_fn: Any, prompt: Sequence[int]) -> list[int]:
    """Greedy, by a whole pass for every token: tokens to the right of a position do not reach it."""
    length = len(prompt)
    ids_T = np.zeros(2 * NUM_NEW, np.int32)  # one program for all prompts
    ids_T[:length] = prompt
    for stop in range(length, length + NUM_NEW):
        ids_T[stop] = int(logits_fn(ids_T)[stop - 1].argmax())
    return ids_T[length : length + NUM_NEW].tolist()
