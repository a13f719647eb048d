"""Downstream tasks: files of questions, the prompts made of them, and when an answer is right.

    {"question": "...", "choices": ["...", "..."], "answer": 1}      multiple choice; the answer is an index from 0
    {"question": "...", "answer": "... #### 18"}                     generation; the final answer stands after ####

Files are .jsonl, or any other of records (``snlp_jax/data/formats.py``); a name that says nothing is read as .jsonl.
Other fields are passed over. One file holds one kind.
"""

import re
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from snlp_jax.config import TaskConfig
from snlp_jax.data.formats import format_of, parts_of, records_of
from snlp_jax.errors import InputError

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"
SLOT = "{question}"
MARK = "####"
SEPARATOR = "\n\n"
"""Between examples of a prompt; a generated answer ends at it."""

_NUMBER = r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"{MARK}\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


@dataclass(frozen=True)
class Example:
    """One question; a generated answer has no choices."""

    question: str
    answer: int | str
    choices: tuple[str, ...] = ()

    @property
    def right_text(self) -> str:
        """The answer in words."""
        return self.answer if isinstance(self.answer, str) else self.choices[self.answer]


@dataclass(frozen=True)
class Task:
    """The examples of a file that are asked, and how."""

    name: str
    examples: tuple[Example, ...]
    num_in_file: int
    shots: tuple[Example, ...] = ()
    """Solved examples that stand before every question, and are not asked themselves."""
    template: str = DEFAULT_TEMPLATE

    @property
    def is_choice(self) -> bool:
        return bool(self.examples[0].choices)

    @property
    def chance(self) -> float | None:
        """Share of right answers of a blind guess; None where it cannot be guessed."""
        return sum(1 / len(each.choices) for each in self.examples) / len(self.examples) if self.is_choice else None

    def about(self) -> dict[str, Any]:
        """For the record."""
        numbers = {"num_in_file": self.num_in_file, "num_examples": len(self.examples), "num_shots": len(self.shots)}
        return {**numbers, "template": self.template}

    def prompt(self, example: Example) -> str:
        """The text that the answer is to follow."""
        solved = (self._ask(shot) + self.delimiter + shot.right_text for shot in self.shots)
        return SEPARATOR.join((*solved, self._ask(example)))

    @property
    def delimiter(self) -> str:
        """Between a prompt and its answer: a space, unless the template ends with white space."""
        return "" if self.template[-1:].isspace() else " "

    def _ask(self, example: Example) -> str:
        return self.template.replace(SLOT, example.question)


def load_tasks(config: TaskConfig) -> list[Task]:
    """One task a file, named by its folder and itself; in templates ``\\n`` is a new line.

    Raises:
        InputError: names the file, and the line where it is one line's fault.
    """
    paths, num_shots = config.tasks, config.num_shots
    templates = [template.replace("\\n", "\n") for template in config.prompt_template] or [DEFAULT_TEMPLATE]
    if len(templates) not in (1, len(paths)):
        raise InputError(f"{len(templates)} prompt templates for {len(paths)} tasks; give one for all or one for each.")
    for template in templates:
        if SLOT not in template:
            raise InputError(f"prompt template {template!r} has no {SLOT}; put it where the question belongs.")
    names = [f"{Path(path).resolve().parent.name}/{Path(path).stem}" for path in paths]
    tasks = []
    for path, name, template in zip(paths, names, templates * (len(paths) // len(templates)), strict=True):
        examples = read_examples(Path(path).expanduser())
        shots, rest = examples[:num_shots], examples[num_shots:]
        if not rest:
            raise InputError(f"task {path!r} has {len(examples)} examples, and {num_shots} are shown; show fewer.")
        asked = min(config.num_examples or len(rest), len(rest))
        picked = tuple(rest[i * len(rest) // asked] for i in range(asked))
        tasks.append(Task(name if names.count(name) == 1 else path, picked, len(examples), tuple(shots), template))
    return tasks


def read_examples(path: Path) -> list[Example]:
    """All examples of a file.

    Raises:
        InputError: see :func:`load_tasks`.
    """
    form = format_of(path)
    form = form._replace(kind="jsonl", is_known=True) if form.kind == "text" else form
    parts = parts_of(path, form, sys.maxsize)
    examples = [_read_example(record, where) for part in parts for where, record in records_of(part)]
    if not examples:
        raise InputError(f"task {str(path)!r} holds no examples; give one JSON object a line.")
    if len({bool(example.choices) for example in examples}) > 1:
        raise InputError(
            f"{str(path)!r}: some lines have choices and some have none; put the two kinds into two files."
        )
    return examples


def _read_example(record: Any, where: str) -> Example:
    def require(is_right: bool, what: str) -> None:
        if not is_right:
            raise InputError(f"{where.rstrip(',')}: {what}.")

    require(isinstance(record, dict), f"{record!r:.40} is no JSON object; write one a line")
    for name in ("question", "answer"):
        require(name in record, f"there is no field {name!r}; it needs question, answer and, to choose from, choices")
    question, answer, choices = record["question"], record["answer"], record.get("choices")
    require(isinstance(question, str), f"question is {question!r:.40}; it must be a text")
    if choices is None:
        require(isinstance(answer, str) and bool(answer.strip()), f"answer is {answer!r:.40}; it must be a text")
        return Example(question, answer)
    are_texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    require(are_texts and len(choices) > 1, f"choices are {choices!r:.40}; they must be two texts or more")
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    require(is_index, f"answer is {answer!r:.40}; it must be an index from 0 to {len(choices) - 1}")
    return Example(question, answer, tuple(choices))


def final_answer(text: str) -> str:
    """The number after the last ``####``, else the last number of the text, without commas, dollars and trailing zeros;
    "" where there is none."""
    found = _MARKED.findall(text) or _ANY.findall(text)
    return _as_number(found[-1]) if found else ""


def answer_of(generated: str, answer: str) -> str:
    """The final answer of a text, as the file's ``answer`` has one: a number, or else a text without regard to case.
    It is right where it equals ``answer_of(answer, answer)``."""
    return final_answer(generated) if _ANY.fullmatch(_after_mark(answer)) else _after_mark(generated).casefold()


def _after_mark(text: str) -> str:
    return " ".join(text.rpartition(MARK)[2].split())


def _as_number(text: str) -> str:
    number = Decimal(text.replace(",", "").replace("$", ""))
    return "0" if number == 0 else format(number, "f").rstrip("0").rstrip(".") if "." in text else str(number)
