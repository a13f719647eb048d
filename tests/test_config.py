"""A config survives JSON, and every mistake in one is a sentence that names the field."""

import dataclasses
import math
import re
import typing

import pytest

from snlp_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    HiddenNormConfig,
    InitName,
    LayerSkipConfig,
    LoraConfig,
    LossConfig,
    MachineConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    SolverCEConfig,
    TrainConfig,
    from_json,
    load_config,
    to_json,
)
from snlp_jax.errors import InputError
from snlp_jax.notation import INITS

CHANGED = Config(
    name="other",
    run_dir="somewhere/else",
    model=ModelConfig(num_layers=9, window_pattern="SSL", short_window=7, logit_softcap=0.0),
    data=DataConfig(source="texts/*.jsonl", val_fraction=0.125, tokenizer="bpe"),
    optim=OptimConfig(matrix_lr=1e-3, max_grad_norm=1.0),
    loss=LossConfig(
        hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(8, 4), detach_target=True, correction="sid"),
        solver_ce=SolverCEConfig(weight=1.0, region_sizes=(9,), start_fraction=0.6, init="batch_forward"),
        layer_skip=LayerSkipConfig(weight=0.1, region_sizes=(2,), sample_region=True),
    ),
    train=TrainConfig(batch_size=12, num_microbatches=3, tensorboard=True, init_from="runs/base", ema_decay=0.5),
    lora=LoraConfig(rank=4, targets=("query", "down")),
    mesh=MeshConfig(data=2, layer=3, ring_microbatches=2),
    machine=MachineConfig(attention="xla"),
    eval=EvalConfig(solvers=("idn:n=8,k=2", "seq")),
)


def refused(make, sentence: str) -> None:
    """``make`` is refused in one sentence that begins so."""
    with pytest.raises(InputError, match="^" + re.escape(sentence)) as error:
        make()
    assert "\n" not in str(error.value)


def test_json_round_trip():
    for config in (Config(), CHANGED):
        text = to_json(config)
        assert from_json(text) == config and to_json(from_json(text)) == text
    for field in dataclasses.fields(Config):  # otherwise the round trip could drop a part unseen
        assert getattr(CHANGED, field.name) != getattr(Config(), field.name), field.name


def test_a_part_or_nothing_can_be_read():
    assert from_json("{}") == Config()
    assert from_json('{"model": {"num_layers": 3}}') == Config(model=ModelConfig(num_layers=3))
    assert from_json('{"seq_len": 64}', ModelConfig) == ModelConfig(seq_len=64)
    whole = from_json('{"optim": {"lr_scale": 2}}').optim.lr_scale  # a whole number is a number
    assert whole == 2.0 and isinstance(whole, float)


def test_from_json_refuses():
    for text, sentence in (
        ("{", "the saved config is not valid JSON ("),
        ("[]", "config must be an object"),
        ('{"modle": {}}', "config has no field 'modle'"),
        ('{"model": 3}', "config.model must be an object"),
        ('{"model": {"layers": 3}}', "config.model has no field 'layers'"),
        ('{"model": {"num_layers": 3.0}}', "model.num_layers is 3.0; it must be of type int"),
        ('{"model": {"num_layers": true}}', "model.num_layers is True; it must be of type int"),
        ('{"model": {"num_layers": null}}', "model.num_layers is None; it must be of type int"),
        ('{"model": {"use_smear": 1}}', "model.use_smear is 1; it must be of type bool"),
        ('{"model": {"rope_base": true}}', "model.rope_base is True; it must be of type float"),
        ('{"model": {"mlp": "gelu"}}', "model.mlp is 'gelu'; choose one of 'relu2'"),
        ('{"eval": {"solvers": "seq"}}', "eval.solvers is 'seq'; it must be a tuple"),
        ('{"loss": {"solver_ce": {"region_sizes": [4, 2.5]}}}', "loss.solver_ce.region_sizes[1] is 2.5"),
        ('{"model": {"num_layers": 0}}', "model.num_layers is 0; it must be at least 1"),
    ):
        refused(lambda text=text: from_json(text), sentence)


AT_LEAST_ONE = {
    ModelConfig: ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_ratio", "seq_len", "rotary_multiple")
    + ("vocab_multiple",),
    TrainConfig: ("num_steps", "batch_size", "num_microbatches", "log_every", "keep_last", "eval_batches"),
    EvalConfig: ("num_windows", "batch_size", "num_bootstrap", "timing_batch"),
    MeshConfig: ("layer", "tensor", "ring_microbatches"),
    HiddenNormConfig: ("stride",),
    SolverCEConfig: ("num_iters",),
}
AT_LEAST_ZERO = {
    ModelConfig: ("short_window", "logit_softcap"),
    OptimConfig: ("warmup_steps", "max_grad_norm"),
    TrainConfig: ("eval_every", "checkpoint_every", "sample_every", "sample_tokens"),
    EvalConfig: ("greedy_prompts", "greedy_prompt_len", "greedy_tokens", "timing_len", "timing_repeats"),
    LayerSkipConfig: ("weight",),
}
UNIT_INTERVAL = {OptimConfig: ("warmdown_fraction",), SolverCEConfig: ("start_fraction", "ramp_fraction")}


def test_numbers_have_bounds():
    """Every field on the wrong side of its bound is named; on the bound it passes."""
    for table, wrong, right, rule in (
        (AT_LEAST_ONE, (0,), (), "it must be at least 1"),
        (AT_LEAST_ZERO, (-1,), (0,), "it must be 0 or more"),
        (UNIT_INTERVAL, (-0.1, 1.1, math.nan), (0.0, 1.0), "give 0 to 1"),
    ):
        for cls, name in ((cls, name) for cls, names in table.items() for name in names):
            for value in wrong:
                with pytest.raises(InputError, match=f"{name} is {value}; {rule}"):
                    cls(**{name: value})
            for value in right:
                cls(**{name: value})


def test_values_fit_their_annotations():
    """From Python too, where no JSON is checked."""
    for make, sentence in (
        (lambda: ModelConfig(mlp="gelu"), "model.mlp is 'gelu'; choose one of 'relu2', 'swiglu', 'geglu'"),
        (lambda: ModelConfig(hyper_maps="dyn"), "model.hyper_maps is 'dyn'; choose one of"),
        (lambda: MachineConfig(attention="flash"), "machine.attention is 'flash'; choose one of"),
        (lambda: MachineConfig(compute_dtype="bf16"), "machine.compute_dtype is 'bf16'; choose one of"),
        (lambda: RopeConfig(direction="fwd"), "model.rope.direction is 'fwd'; choose one of"),
        (lambda: LoraConfig(targets=("query", "q")), "lora.targets[1] is 'q'; choose one of"),
        (lambda: EvalConfig(solvers=["seq"]), "eval.solvers is ['seq']; it must be a tuple"),
        (lambda: ModelConfig(num_layers="3"), "model.num_layers is '3'; it must be of type int"),
        (lambda: TrainConfig(ema_decay=None), "train.ema_decay is None; it must be of type float"),
        (lambda: ModelConfig(norm=None), "model.norm is None; it must be of type NormConfig"),
    ):
        refused(make, sentence)


def test_refusals():
    for make, sentence in (
        (lambda: ModelConfig(vocab_size=1), "model.vocab_size is 1"),
        (lambda: ModelConfig(embed_dim=130, num_heads=4), "model.embed_dim 130 is not a multiple of model.num_heads 4"),
        (lambda: ModelConfig(embed_dim=36, num_heads=4), "the head size 9 is odd"),
        (lambda: ModelConfig(num_heads=4, num_kv_heads=3), "model.num_heads 4 is not a multiple of model.num_kv_head"),
        (lambda: ModelConfig(window_pattern=""), "model.window_pattern ''"),
        (lambda: ModelConfig(window_pattern="SM"), "model.window_pattern 'SM'"),
        (lambda: ModelConfig(logit_softcap=math.nan), "model.logit_softcap is nan"),
        (lambda: ModelConfig(embed_dim=16, use_value_embeds=False), "model.embed_dim 16 is below 24"),
        (lambda: DataConfig(source=""), "data.source is empty"),
        (lambda: DataConfig(tokenizer=""), "data.tokenizer is empty"),
        (lambda: DataConfig(val_fraction=0.0), "data.val_fraction is 0.0; it must lie between 0 and 1"),
        (lambda: DataConfig(bpe_vocab_size=259), "data.bpe_vocab_size is 259"),
        (lambda: OptimConfig(lr_scale=0.0), "optim.lr_scale is 0.0"),
        (lambda: SolverCEConfig(weight=0.5), "loss.solver_ce.region_sizes is empty"),
        (lambda: HiddenNormConfig(region_sizes=(4, 0)), "loss.hidden_norm.region_sizes[1] is 0; it must be at least 1"),
        (lambda: TrainConfig(batch_size=16, num_microbatches=3), "train.batch_size 16 is not a multiple"),
        (
            lambda: Config(loss=LossConfig(hidden_norm=HiddenNormConfig(weight=1.0, region_sizes=(4, 13)))),
            "loss.hidden_norm.region_sizes holds 13, but the model has 12 layers",
        ),
        (
            lambda: Config(loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4,), correction="hcn"))),
            "loss.solver_ce.correction 'hcn' does not fit model.num_streams 0",
        ),
    ):
        refused(make, sentence)
    assert ModelConfig(embed_dim=16, use_value_embeds=False, use_smear=False).head_dim == 4


def test_terms_are_those_with_a_weight():
    assert LossConfig().terms == {}
    assert list(CHANGED.loss.terms) == ["hidden_norm", "solver_ce", "layer_skip"]
    off = SolverCEConfig(weight=0.0, region_sizes=(99,))  # switched off, so its sizes do not matter
    assert Config(loss=LossConfig(solver_ce=off)).loss.terms == {}


def test_names_are_those_of_the_notation():
    """A loss term may use all that need neither a calibration of the finished model nor an oracle."""
    assert set(typing.get_args(InitName)) == set(INITS) - {"cal", "preheat", "warm"}


def test_derived_sizes():
    for num_layers, middle in ((1, 0), (2, 1), (5, 2), (32, 16)):
        config = ModelConfig(num_layers=num_layers, vocab_size=257, embed_dim=128, num_heads=4, seq_len=50)
        sizes = (config.mid_layer, config.head_dim, config.padded_vocab_size, config.max_context)
        assert sizes == (middle, 32, 320, 500)
    assert ModelConfig(vocab_size=256).padded_vocab_size == 256


def test_load_config(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("from snlp_jax.config import Config\nconfig = Config(name='mine')\n")
    assert load_config(path) == load_config(str(path)) == Config(name="mine")
    assert str(load_config(path).run_path) == "runs/mine" and str(CHANGED.run_path) == "somewhere/else"
    for missing in (tmp_path / "none.py", tmp_path):
        refused(lambda missing=missing: load_config(missing), f"config file '{missing}' does not exist")
    for body in ("", "config = {'name': 'mine'}\n", "from snlp_jax.config import Config\nc = Config()\n"):
        path.write_text(body)
        refused(lambda: load_config(path), f"config file '{path}' does not bind `config = Config(...)`")
    path.write_text("from snlp_jax.config import *\nconfig = Config(model=ModelConfig(num_layers=0))\n")
    refused(lambda: load_config(path), "model.num_layers is 0")
