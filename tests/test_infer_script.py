"""python -m snlp_jax.infer: prompts in, text out, and one sentence for every mistake."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tokenizers
from decoding import SIMPLE
from problems import random_params
from tiny_run import random_run, tiny

from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.infer import Args, generate, main
from snlp_jax.data.tokenizer import FileTokenizer, SpecialTokens, train_bpe
from snlp_jax.infer import Engine
from snlp_jax.infer.bench import step_cost
from snlp_jax.model import LanguageModel
from snlp_jax.train.loop import train

ROOT = Path(__file__).parent.parent
CLOSING = r"\[\d+ tokens, \d+ tokens/s[^\n]*\]\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("infer") / "run")


@pytest.fixture
def infer(run_dir, monkeypatch, capfd):
    """``(flags, stdin) -> (exit code, stdout, stderr)`` of the script in this process."""
    monkeypatch.setattr("snlp_jax.cli.entry.enable_compilation_cache", lambda: None)

    def call(*flags, stdin="", run=run_dir):
        monkeypatch.setattr(sys, "argv", ["infer", str(run), *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        try:
            run_entry(main)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        out, err = capfd.readouterr()
        return code, out, err

    return call


def text_after(prompt, out):
    """The continuation of the only prompt."""
    assert out.startswith(prompt) and out.endswith("\n")
    return out[len(prompt) : -1]


def test_a_prompt_is_continued(infer):
    code, out, err = infer("--prompt", "layer ", "--max-new-tokens", 12)
    assert code == 0
    assert text_after("layer ", out)
    assert re.fullmatch(CLOSING, err), err
    assert err.startswith("[12 tokens")


def test_text_that_drafts_itself_is_the_plain_text(infer):
    """Also where it is sampled, which no other drafter promises."""
    flags = ("--prompt", "ab ab ab ", "--max-new-tokens", 20, "--temperature", 0.8, "--seed", 5)
    plain, drafted = infer(*flags), infer(*flags, "--speculate", "ngram", "--draft-len", 4)
    assert plain[0] == drafted[0] == 0 and plain[1] == drafted[1]
    assert re.search("acceptance|none drafted", drafted[2])


def test_a_bench_ends_with_a_line_of_json(infer):
    """In order, by the solver and by drafts, with the keys of nanochat's benchmark; costs by hand."""
    flags = ("--bench", "--max-new-tokens", 6, "--bench-rows", 1, 2, "--bench-prompt", 20, "--bench-repeats", 1)
    code, out, err = infer(*flags)
    assert code == 0 and "2 rows, drafts of ngram" in err and "first token ms" in out
    found = json.loads(out.splitlines()[-1])
    assert [(each["batch"], each["setting"]) for each in found["bench"]] == [
        (rows, name) for rows in (1, 2) for name in ("seq", "idn:n=2,k=1", "drafts of ngram")
    ]
    for each in found["bench"]:
        assert each["ttft_sec"] > 0 and each["tok_per_sec"] == pytest.approx(each["batch"] / each["tpot_sec"])
        assert (each["gb_per_sec"] is None) == (each["acceptance"] is not None or "ngram" in each["setting"])
        assert each["decode_steps"] == 5 or "ngram" in each["setting"]
    assert found["bench"][0]["ratio"] == 1.0
    summary = found["summary"]
    assert summary["prompt_tokens"] == 20 and summary["decode_tokens"] == 6 and summary["context"] == 23
    assert summary["ceiling_bs1_tok_per_sec"] > 0 and summary["copy_bytes_per_s"] > 0


def test_the_cost_of_a_step_counts_what_is_read():
    """Two evaluations of two of four layers read half of the kernels twice; the head once; each row its own cache."""
    config = dataclasses.replace(SIMPLE, num_layers=4)
    model = LanguageModel(config)
    params = random_params(model)
    plain, solver = (Engine(model, params, setting) for setting in ("seq", "idn:n=2,k=2"))
    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]))
    head = params["head"]["kernel"].nbytes
    cache = 2 * 4 * 7 * config.num_kv_heads * config.head_dim * config.num_layers
    assert step_cost(plain, 1, 7)[0] == blocks + head + cache
    assert step_cost(plain, 3, 7)[0] == blocks + head + 3 * cache
    assert step_cost(solver, 1, 7)[0] == pytest.approx(1.5 * (blocks + cache) + head)
    assert step_cost(plain, 2, 7)[1] == pytest.approx(2 * step_cost(plain, 1, 7)[1])


def test_requests_are_as_the_tokenizer_says(monkeypatch, capsys):
    """What stands before a prompt, special tokens in it, and what ends the text."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(["a layer"], 270).to_json())
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    names = backend.get_vocab(with_added_tokens=True)
    begin, end, turn_end = names["<s>"], names["</s>"], names["<|im_end|>"]
    seen = []
    for prefix, special, expected in (((), True, [turn_end]), ((begin,), False, [begin]), ((), False, [])):
        tokenizer = FileTokenizer(backend, SpecialTokens(end, prefix, (end,)))
        engine = SimpleNamespace(tokenizer=tokenizer, check=seen.extend, generate=lambda requests, **_: [])
        monkeypatch.setattr("snlp_jax.cli.infer.closing_line", lambda engine: "")
        args = Args(Path(), special=special, stop=("\n", "<|im_end|>"))
        generate(engine, args, ("<|im_end|>a",))
        request = seen.pop()
        assert request.tokens[: len(expected)] == expected
        assert tokenizer.decode(request.tokens) == ("a" if special else "<|im_end|>a")
        assert request.stop_tokens == (end, turn_end) and request.stop_strings == ("\n",)


MISTAKES = (
    (("--solver", "newton:n=2"), "newton:n=2"),
    (("--solver", "hcn:n=2"), "residual streams"),
    (("--speculate", "idn:n=9,k=1"), "idn:n=9,k=1"),
    (("--speculate", "mtp"), "no multi-token-prediction heads"),
    (("--solver", "idn:n=2", "--speculate", "exit:2"), "not both"),
    (("--solver", "idn:n=4,k=1,stage=2xF2"), "last_eval"),
    (("--speculate", "exit:2", "--draft-len", "9", "--max-draft", "8"), "9 exceeds max_draft 8"),
    (("--temperature", "-1"), "temperature is -1.0"),
    (("--max-new-tokens", "154"), "161, more than the rotary embedding's 160"),
    (("--stop", ""), "stop strings"),
    (("--mesh.layer", "16"), "mesh"),
    (("--solver", "cal:n=2,k=1,fit=mine"), "'mine'"),
    (("--system", "Be short."), "--system is for conversations; give --chat too"),
    (("--chat-template", "x"), "--chat-template is for conversations"),
    (("--chat", "--special"), "leave --special out"),
    (("--bench", "--chat"), "leave --chat out"),
    (("--bench", "--max-new-tokens", "1"), "at least 2 tokens"),
    (("--bench-rows", "0"), "--bench-rows has 0"),
    (("--chat", "--chat-template", "rag"), "'rag' is no file and not the model's own (it has none)"),
)


def test_mistakes_are_one_sentence(infer, tmp_path):
    for flags, named in MISTAKES:
        code, out, err = infer("--prompt", "layer ", *flags)
        assert code == 2 and named in err and err.startswith("error: ") and err.count("\n") == 1, flags
    code, _, err = infer("--prompt", "layer ", run=tmp_path / "nowhere")
    assert code == 2 and err.startswith("error: ") and "nowhere" in err and err.count("\n") == 1
    code, _, err = infer("--prompt", "layer ", run=tmp_path)
    assert code == 2 and "holds no config.json" in err


# ---------------------------------------------------------------- what takes more programs


@pytest.mark.slow
def test_settings_that_are_exact_give_the_same_text(infer):
    flags = ("--prompt", "layer ", "--max-new-tokens", 30)
    _, out, _ = infer(*flags)
    for more in (
        ("--solver", "idn:n=2,k=2", "--rule", "refreshed"),
        ("--solver", "idn:n=2,tol=1e-9"),
        ("--speculate", "exit:2", "--max-draft", 2),
        ("--mesh.layer", 2, "--sequential", "ring", "--checkpoint", "last"),
    ):
        code, same, err = infer(*flags, *more)
        assert (code, same) == (0, out), more
        closing = err.splitlines()[-1] + "\n"
        assert re.fullmatch(CLOSING, closing)
        assert ("passes of all layers" in closing) == ("--speculate" in more)
        assert ("iterations a token" in closing) == ("tol" in str(more))


@pytest.mark.slow
def test_several_prompts_are_a_batch(infer):
    prompts, flags = ("layer ", "x", "newton and more "), ("--max-new-tokens", 9)
    code, out, err = infer("--prompt", *prompts, *flags)
    assert code == 0 and err.startswith("[27 tokens")
    *parts, rest = out.split("\n" + "-" * 40 + "\n")
    assert rest == "" and len(parts) == 3
    whole = infer("--prompt", prompts[0], *flags)[1]
    assert whole == parts[0] + "\n"
    whole = text_after(prompts[0], whole)
    stopped = infer("--prompt", prompts[0], *flags, "--stop", "never", whole[4:6])[1]
    assert text_after(prompts[0], stopped) == whole[: whole.index(whole[4:6])]


@pytest.mark.slow
def test_lines_of_a_pipe_are_prompts(infer):
    """Empty ones are passed over; one that is too long is a sentence and not the end."""
    flags = ("--max-new-tokens", 9)
    code, out, err = infer(*flags, stdin=f"layer \n\n{'x' * 160}\ntrace")
    assert code == 0
    assert out == infer("--prompt", "layer ", *flags)[1] + infer("--prompt", "trace", *flags)[1]
    closings = [line for line in err.splitlines() if line.startswith("[")]
    assert len(closings) == 2 and sum(line.startswith("error: a prompt of 161") for line in err.splitlines()) == 1
    assert infer(*flags, stdin="") == (0, "", "")


def test_a_template_that_refuses_is_a_sentence_before_weights_are_read(infer, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ ().__class__ }}")
    code, out, err = infer("--chat", "--chat-template", tmp_path / "mine.jinja", "--checkpoint", "last")
    assert (code, out) == (2, "") and err.startswith("error: the chat template reaches for what it may not")


@pytest.mark.slow
def test_lines_are_turns_of_a_conversation(infer, tmp_path):
    """In the template of a file, behind what the system says; the second turn reads its new tokens alone."""
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>")
    flags = ("--chat", "--chat-template", tmp_path / "mine.jinja", "--system", "Be short.", "--max-new-tokens", 5)
    code, out, err = infer(*flags, stdin="one\n\ntwo\n")
    assert code == 0 and out.startswith("one\n") and "\ntwo\n" in out
    first, second = (line for line in err.splitlines() if line.startswith("["))
    assert ", 0 of 34 tokens before it kept]" in first
    assert re.search(r", 2\d of \d+ tokens before it kept]", second)
    alone = infer(*flags, "--prompt", "one")[1]
    assert out.startswith(alone)


@pytest.mark.slow
def test_sampling_follows_its_seed(infer):
    sampling = ("--max-new-tokens", 20, "--temperature", 0.9, "--top-k", 50, "--repetition-penalty", 1.1)
    run = lambda *flags: infer(*flags, *sampling)[1]  # noqa: E731
    one = run("--prompt", "layer ", "--seed", 7)
    assert one == run("--prompt", "layer ", "--seed", 7)
    assert one != run("--prompt", "layer ", "--seed", 8)
    # The second prompt of a batch has the next seed.
    assert run("--prompt", "layer ", "layer ", "--seed", 6).split("\n" + "-" * 40 + "\n")[1] == one[:-1]


@pytest.mark.slow
def test_a_trained_run_speaks_from_the_command_line(tmp_path):
    config = tiny(tmp_path / "run", num_steps=6)
    train(config)
    command = [sys.executable, "-m", "snlp_jax.infer", config.run_dir]

    def call(*flags, **settings):
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, **settings)

    done = call("--prompt", "layer ", "--max-new-tokens", "8", "--solver", "idn:n=2,k=1")
    assert done.returncode == 0 and done.stdout.startswith("layer ") and re.fullmatch(CLOSING, done.stderr)
    piped = call("--max-new-tokens", "8", "--solver", "idn:n=2,k=1", input="layer \n")
    assert piped.stdout == done.stdout
    bad = call("--prompt", "layer ", "--solver", "nothing")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
