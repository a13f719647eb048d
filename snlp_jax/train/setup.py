"""The first two chapters of a run: check everything that can be wrong, and make its programs."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import Config, SolverTerm, to_json
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import TokenData, held_out_batches, train_iterator
from snlp_jax.data.tokenizer import Tokenizer, check_vocab
from snlp_jax.errors import InputError
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.io.moved import SOURCE_NAME, kept_files
from snlp_jax.io.run_dir import check_run_dir
from snlp_jax.io.written import write_run_files
from snlp_jax.layout import training_weights
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.parallel.mesh import data_shard, make_mesh, put_batch
from snlp_jax.parallel.processes import all_or_none, check_same, is_first
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.run import TOKENIZER_NAME
from snlp_jax.train.loss import Plan, balanced, loss_fn, make_correction, start_step
from snlp_jax.train.memory import check_state, check_step
from snlp_jax.train.observe import make_observe
from snlp_jax.train.passes import Passes
from snlp_jax.train.start import data_config
from snlp_jax.train.step import TrainState, abstract_saved, abstract_state, make_reader, make_step, optimizer_of
from snlp_jax.types import Array, Batch, Params

SAMPLE_PROMPT_LEN = 32
"""Tokens of held-out text that a sample continues."""

EvalFn = Callable[[Params, list[Batch], int], dict[str, float]]


class Setup:
    """What a run needs, all of it checked. The programs are compiled where they are first called."""

    def __init__(self, config: Config, resume: bool) -> None:
        """Look at everything that can be wrong, on all processes, and claim the run directory.

        Raises:
            InputError: on every process, if one of them finds a mistake.
        """
        self.config, train_config, seq_len = config, config.train, config.model.seq_len
        with all_or_none():
            for term in config.loss.terms.values():
                if isinstance(term, SolverTerm):
                    make_correction(term)
            self.mesh = mesh = make_mesh(config.mesh)
            part, num_parts = data_shard(mesh)
            self.model = model = LanguageModel(config.model, config.machine)
            data = prepare_data(data_config(config, resume))
            check_vocab(data.tokenizer, config.model.vocab_size)
            self.batches = train_iterator(
                data,
                seq_len=seq_len,
                batch_size=train_config.batch_size,
                seed=config.data.seed,
                process_index=part,
                process_count=num_parts,
            )
            """This process's rows of the training batches, from the first step on."""
            rows = train_config.batch_size // train_config.num_microbatches
            windows = held_out_batches(data, seq_len=seq_len, batch_size=rows, num_batches=train_config.eval_batches)
            self.held_out = [Batch(**window) for window in windows]
            _check_division(self.held_out, config, mesh)
            self.optimizer = optimizer_of(model, config, mesh)
            state = abstract_state(model, self.optimizer, config, mesh)
            check_state(state, mesh)
            check_step(model, config, mesh, state, windows[0])
            self.observe = make_observe(model, config, mesh) if train_config.frontier_every else None
        check_same("config", to_json(config))
        check_same("corpus", data.content_hash)
        with all_or_none():
            if is_first():
                check_run_dir(config.run_path, config, resume, data.content_hash)
                write_run_files(config.run_path, {TOKENIZER_NAME: data.tokenizer.to_json()})
                keep_files(config)
        self.description = _describe(config, model, data, mesh, state)
        self.saved = abstract_saved(state, model, mesh)
        """Shapes and shardings of what a checkpoint holds."""
        self.read = make_reader(model, config, mesh)
        self.step = make_step(model, self.optimizer, config, mesh)
        self.evaluate = _make_eval(model, config, mesh)
        self.sample = _make_sample(model, config, self.held_out, data.tokenizer, mesh)


def keep_files(config: Config) -> None:
    """Copy what the run's origin keeps of an import, before it may go elsewhere."""
    if not config.train.init_from or (config.run_path / SOURCE_NAME).exists():
        return
    if Path(config.train.init_from).is_dir():
        write_run_files(config.run_path, kept_files(Path(config.train.init_from)))


def _check_division(held_out: list[Batch], config: Config, mesh: Mesh) -> None:
    """Training batches are checked with the config; a short held-out split may give smaller ones."""
    rows, parts = held_out[0].tokens.shape[0], mesh.shape["data"] * config.mesh.ring_microbatches
    train_rows = config.train.batch_size // config.train.num_microbatches
    if train_rows % parts or rows % parts:
        raise InputError(
            f"batches of {train_rows} windows to train and {rows} to evaluate do not divide into {parts} parts (data x "
            "ring_microbatches); change the mesh or train.batch_size, or give a larger corpus."
        )


def _describe(config: Config, model: LanguageModel, data: TokenData, mesh: Mesh, state: TrainState) -> str:
    devices = kind = jax.devices()[0].device_kind
    if mesh.size > 1:
        shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        mib = bytes_per_device(state) / 2**20
        devices = f"{mesh.size} x {kind}{processes} ({shape}), {mib:.1f} MiB of state on each"
    if mesh.shape["layer"] > 1:
        devices += (
            f"\nlayers over {mesh.shape['layer']} devices: the sequential pass is a ring with "
            f"{config.mesh.ring_microbatches} microbatches"
        )
    return (
        f"{config.name}: {num_params(model.abstract_params()) / 1e6:.2f} M parameters, {len(data.train) / 1e6:.1f} M "
        f"training tokens, {config.train.num_steps} steps of {config.train.batch_size * config.model.seq_len} tokens "
        f"on {devices}"
    )


# -- Programs ----------------------------------------------------------------------------------------------------------


def _make_eval(model: LanguageModel, config: Config, mesh: Mesh) -> EvalFn:
    """Held-out means of every part of the loss that has begun, all region sizes included.

    ``val_loss``, by which the best checkpoint is chosen, is the whole loss at full weights and appears only once every
    term has begun, so that no checkpoint from before counts as the best.
    """
    terms = config.loss.terms
    weights: dict[str, Array | float] = {name: term.weight for name, term in terms.items()}

    @functools.partial(jax.jit, static_argnames="plan")
    def evaluate(params: Params, batch: Batch, *, plan: Plan) -> dict[str, Array]:
        ring_microbatches = config.mesh.ring_microbatches
        passes = Passes(model, params, balanced(batch), mesh=mesh, ring_microbatches=ring_microbatches)
        return loss_fn(passes, config.loss, plan, weights)[1]

    def run(params: Params, batches: list[Batch], step: int) -> dict[str, float]:
        begun = [name for name, term in terms.items() if step >= start_step(term, config.train.num_steps)]
        plan = Plan(tuple((name, terms[name].region_sizes) for name in begun))
        parts = [evaluate(params, put_batch(mesh, rows, is_whole=True), plan=plan) for rows in batches]
        # Each is a mean over the batch's targets, of which batches of conversations have different numbers.
        counts = [1.0 if rows.weight is None else float(rows.weight.sum()) for rows in batches]
        means = {f"val_{name}": float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}
        if len(begun) < len(terms):
            del means["val_loss"]
        return means

    return run


def _make_sample(
    model: LanguageModel, config: Config, held_out: list[Batch], tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[Params], str]:
    """Greedy continuation of a piece of held-out text by the sequential pass."""
    prompt, num_tokens = held_out[0].tokens[:1, :SAMPLE_PROMPT_LEN], config.train.sample_tokens
    greedy = make_greedy_fn(model, prompt_len=prompt.shape[1], num_tokens=num_tokens, mesh=mesh)
    # The same text for every part of the batch that the mesh has.
    start = np.pad(np.repeat(prompt, mesh.shape["data"], axis=0), ((0, 0), (0, num_tokens)))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def decode(params: Params) -> Array:
        return greedy(training_weights(model, params, mesh), start)

    def sample(params: Params) -> str:
        return f"{tokenizer.decode(prompt[0])} >>> {tokenizer.decode(np.asarray(decode(params))[0])}"

    return sample
