"""Imported models go through everything that this library's own do: solvers, chunks, cached decoding, speculation,
meshes, other kernels' rules, fine-tuning."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import PROMPT_LEN, golden
from test_import import write_source

from benchmarks.plan_compile import Work
from benchmarks.plan_formula import expected, weight_bytes
from snlp_jax.cli.convert import export_run, import_run
from snlp_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MachineConfig,
    MeshConfig,
    ModelConfig,
    SolverCEConfig,
    TrainConfig,
)
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.forward import forward
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.layout import abstract_weights, prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.model.attention import choose_implementation
from snlp_jax.model.layers import rotary_table, rotate
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.run import read_config, read_params
from snlp_jax.train.loop import train

ROUNDING = 2e-5
"""Logits of up to 4 in float32: two programs that add up in another order, through layers that amplify a little."""


@functools.cache
def imported(name):
    with tempfile.TemporaryDirectory() as folder:
        config, params = golden(name).read(golden(name).write(Path(folder)))
    return LanguageModel(config), params


def logits_of(name, setting, tokens=None, mesh=None, layout="auto", config=None):
    model, params = imported(name)
    model = LanguageModel(config) if config else model
    tokens = golden(name).tokens if tokens is None else tokens
    schedule = parse_schedule(setting, model.config.num_layers)
    weights = prepare(model, params, schedule, num_tokens=tokens.size, layout=layout, mesh=mesh)
    return np.asarray(jax.jit(lambda w, t: forward(model, w, t, mesh=mesh).logits_BTV)(weights, tokens))


# ---------------------------------------------------------------- pieces


def test_rotation_of_a_part_leaves_the_rest():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 12)), jnp.float32)

    @jax.jit
    def run(x):
        table = rotary_table(jnp.arange(5), 8, 100.0)
        return rotate(x, *table), rotate(x[..., :8], *table)

    turned, part = run(x)
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(turned[..., :8], part)
    assert ModelConfig(rope=dataclasses.replace(ModelConfig().rope, fraction=0.25)).num_rotated == 8


def test_cudnn_does_not_cap_scores():
    where = {"backend": "gpu", "dtype": jnp.bfloat16, "seq_len": 256, "head_dim": 128}
    assert choose_implementation("auto", **where) == "cudnn"
    assert choose_implementation("auto", **where, softcap=50.0) == "xla"
    with pytest.raises(
        InputError, match="'cudnn' needs .* no model.attention_softcap, not .* a softcap of 50.0; use 'auto'"
    ):
        choose_implementation("cudnn", **where, softcap=50.0)
    with pytest.raises(InputError, match="'cudnn' has no model.attention_softcap"):
        Config(model=ModelConfig(attention_softcap=50.0), machine=MachineConfig(attention="cudnn"))


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "name, setting",
    (
        ("gemma3", "idn:n=3,k=3"),  # alternating windows and rotary tables of two kinds, evaluated at once
        pytest.param("llama_bias", "sid:n=4,k=4", marks=pytest.mark.slow),
        pytest.param("gemma3", "idn:n=4,k=4,stage=4xF1", marks=pytest.mark.slow),
    ),
)
def test_regions_are_exact_after_as_many_iterations_as_layers(name, setting):
    """Chunks of one layer are layers. With norms behind the branches, and with biases, a chunk adds up whole
    branches."""
    np.testing.assert_allclose(logits_of(name, setting, layout="stack"), golden(name).logits, atol=ROUNDING, rtol=0)


@pytest.mark.slow
def test_chunks_of_two_layers_are_their_formula(name="gemma3"):
    two = [logits_of(name, "idn:n=4,k=2,stage=2xF2", layout=layout) for layout in ("stack", "list")]
    np.testing.assert_allclose(two[0], two[1], atol=ROUNDING, rtol=0)
    assert np.abs(two[0] - golden(name).logits).max() > 1e-3


# ---------------------------------------------------------------- decoding


@pytest.mark.slow
def test_cached_decoding_is_greedy_decoding_there(name="gemma3", drafter="idn:n=3,k=1"):
    """With drafts by the model's own solver. Mistral's windows: see test_import.py."""
    model, params = imported(name)
    tokens = golden(name).tokens
    draft = parse_schedule(drafter, model.config.num_layers) if drafter else None
    engine = Engine(model, params, draft=draft)
    done = engine.generate([Request(row[:PROMPT_LEN].tolist(), 32) for row in tokens])
    assert [list(each.tokens) for each in done] == tokens[:, PROMPT_LEN:].tolist()


# ---------------------------------------------------------------- meshes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, setting, sizes",
    (
        ("gemma3", "idn:n=4,k=4", {"layer": 3}),
        ("llama_bias", "idn:n=4,k=4", {"layer": 2, "tensor": 2}),
    ),
)
def test_sharded_layers_are_layers(name, setting, sizes):
    """Three devices do not divide four layers: one of zero weights fills them up, and passes its input on."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    np.testing.assert_allclose(logits_of(name, setting, mesh=mesh), golden(name).logits, atol=ROUNDING, rtol=0)


# ---------------------------------------------------------------- precision


def test_norms_and_biases_stay_float32():
    model, params = imported("llama_bias")
    model = LanguageModel(model.config, MachineConfig(compute_dtype="bfloat16"))
    told = jax.tree_util.tree_flatten_with_path(jax.eval_shape(model.cast, params))[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype for path, leaf in told}
    vectors = {name for name in named if "norm" in name or name.endswith("_bias")}
    assert len(vectors) == 10 and {named[name] for name in vectors} == {jnp.dtype("float32")}
    assert {dtype for name, dtype in named.items() if name not in vectors} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_tuned(tmp_path, name="gemma3"):
    """On shorter windows than its context, with the solver's loss; the tuned run exports under its origin's names."""
    origin = tmp_path / "origin"
    import_run(str(write_source(tmp_path / "hf", name)), origin)
    text = tmp_path / "text.jsonl"
    rng = np.random.default_rng(0)
    documents = ["".join(chr(ord("0") + i) for i in rng.integers(1, 38, 60)) for _ in range(60)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    config = read_config(origin)
    data = dataclasses.replace(config.data, source=str(text), cache_dir=str(tmp_path / "cache"))
    evaluated = dataclasses.replace(config, data=data)
    few = dataclasses.replace(config.eval, solvers=("idn:n=2,k=2",), num_windows=2, batch_size=2, greedy_prompts=0)
    model = dataclasses.replace(config.model, seq_len=16)
    report = evaluate_run(origin, dataclasses.replace(evaluated, model=model, eval=few), "last")
    assert abs(report.results[1].ppl_change) < 1e-4  # as many iterations as layers
    tuned = Config(
        run_dir=str(tmp_path / "tuned"),
        model=model,
        data=DataConfig(source=str(text), cache_dir=str(tmp_path / "cache")),
        loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,))),
        optim=dataclasses.replace(config.optim, lr_scale=0.05),
        train=TrainConfig(
            num_steps=4, batch_size=4, init_from=str(origin), eval_every=4, checkpoint_every=4, eval_batches=1
        ),
    )
    train(tuned)
    _, before = read_params(origin, LanguageModel(config.model), "last")
    _, after = read_params(tmp_path / "tuned", LanguageModel(model), "last")
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before, after)
    assert all(jax.tree.leaves(moved)), moved
    export_run(tmp_path / "tuned", tmp_path / "out", "last", "float32", 1.0)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_export_is_read_by_transformers(tmp_path, name="gemma2"):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    import_run(str(write_source(tmp_path / "hf", name)), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", "last", "float32", 4000 / 2**30)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor(golden(name).tokens), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, golden(name).logits)


def test_a_tied_head_learns_as_head_and_as_table():
    model, params = imported("llama3")
    assert "kernel" not in params["head"]
    model = LanguageModel(dataclasses.replace(model.config, num_layers=1))  # one layer compiles faster
    params = params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    weights = split(model, params, parse_schedule("seq", 1))
    loss = lambda w: forward(model, w, golden("llama3").tokens[:, :4]).logits_BTV.sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(weights)
    assert np.all(np.any(np.asarray(grads.embed_head["embed"]["token"]) != 0, axis=1))  # each row is an output


def test_the_planner_counts_a_tied_head_once():
    """The table is read as the head; looked up as embeddings, it would not count."""
    model, params = imported("llama3")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    weights = abstract_weights(model, parse_schedule("seq", model.config.num_layers), mesh)
    assert weight_bytes(weights) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    ends = expected(model, weights, mesh, Work("decode", 1, 32)).ops[-1]
    assert (ends.kind, ends.bytes_read) == ("ends", params["embed"]["token"].nbytes)
