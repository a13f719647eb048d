"""One dial, the depth, for the size of a model, its batch, its steps and its rates: nanochat's rules."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

from snlp_jax.config.experiment import Config
from snlp_jax.config.loss import LossTerm
from snlp_jax.config.model import ModelConfig
from snlp_jax.errors import InputError

Term = TypeVar("Term", bound=LossTerm)

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
"""Tokens a step that were found best at the reference depth; the published rates hold there."""
BATCH_POWER = 0.383
"""The best batch grows with the tokens of a run to this power (Bergsma et al., arXiv 2505.13738)."""


@dataclass(frozen=True)
class Dial:
    """``at(depth)`` is ``base`` with everything that depends on the depth, by the rules of nanochat's base_train.py:

        width              depth * aspect, rounded up to whole heads of head_dim
        tokens             tokens_per_param * P with P the parameters in matrices and head
        tokens per step    2^19 (tokens / tokens at depth 12)^0.383, rounded to a power of two
        rates              times sqrt(tokens per step / 2^19)
        weight decay       times sqrt(tokens per step / 2^19) * tokens at depth 12 / tokens

    Besides, regions of the loss keep their share of the depth, and microbatches hold ``microbatch_tokens`` at most.
    """

    base: Config
    aspect: int = 64
    head_dim: int = 128
    tokens_per_param: float = 12.0
    """nanochat's; 20 is Chinchilla's, over all parameters."""
    microbatch_tokens: int = 65_536
    """Over all devices."""

    def at(self, depth: int) -> Config:
        """The config of a model of ``depth`` layers.

        Raises:
            InputError: the depth is below 1, or ``base`` does not go with what is derived.
        """
        if depth < 1:
            raise InputError(f"--depth is {depth}; it must be at least 1.")
        base, model = self.base, self._model(depth)
        batch_size, tokens = self._batch_size(depth), self._tokens(depth)
        rows = max(self.microbatch_tokens // model.seq_len, 1)
        num_microbatches = next(m for m in range(1, batch_size + 1) if batch_size % m == 0 and batch_size // m <= rows)
        tokens_per_step = batch_size * model.seq_len
        batch_factor = math.sqrt(tokens_per_step / REFERENCE_BATCH)
        decay = base.optim.matrix_weight_decay * batch_factor * self._tokens(REFERENCE_DEPTH) / tokens
        loss, factor = base.loss, depth / base.model.num_layers
        return dataclasses.replace(
            base,
            name=f"{base.name}_d{depth}",
            model=model,
            optim=dataclasses.replace(base.optim, batch_reference=REFERENCE_BATCH, matrix_weight_decay=decay),
            loss=dataclasses.replace(
                loss,
                hidden_norm=_scaled(loss.hidden_norm, factor),
                solver_ce=_scaled(loss.solver_ce, factor),
                layer_skip=_scaled(loss.layer_skip, factor),
            ),
            train=dataclasses.replace(
                base.train,
                num_steps=max(tokens // tokens_per_step, 1),
                batch_size=batch_size,
                num_microbatches=num_microbatches,
            ),
        )

    def describe(self, depth: int) -> str:
        """What ``at(depth)`` derived, one line each."""
        config = self.at(depth)
        model, train, loss = config.model, config.train, config.loss
        tokens_per_step = train.batch_size * model.seq_len
        rows = {
            "width": f"{model.embed_dim} = {model.num_heads} heads of {self.head_dim}, for {depth} x {self.aspect}",
            "tokens": f"{self._tokens(depth):,} = {self.tokens_per_param:g} x {scaling_params(model):,} parameters in "
            "matrices and head",
            "batch": f"{train.batch_size} x {model.seq_len} = {tokens_per_step:,} tokens a step, in "
            f"{train.num_microbatches} microbatches",
            "steps": f"{train.num_steps:,}",
            "rates": f"x {math.sqrt(tokens_per_step / REFERENCE_BATCH):.3g}",
            "weight decay": f"{config.optim.matrix_weight_decay:.3g}",
        } | {name: f"regions of {', '.join(map(str, term.region_sizes))} layers" for name, term in loss.terms.items()}
        return "\n".join(f"  {name:<14}{text}" for name, text in rows.items())

    def _model(self, depth: int) -> ModelConfig:
        heads = math.ceil(depth * self.aspect / self.head_dim)
        width = heads * self.head_dim
        return dataclasses.replace(
            self.base.model, num_layers=depth, embed_dim=width, num_heads=heads, num_kv_heads=heads
        )

    def _tokens(self, depth: int) -> int:
        return int(self.tokens_per_param * scaling_params(self._model(depth)))

    def _batch_size(self, depth: int) -> int:
        """Sequences a step."""
        best = REFERENCE_BATCH * (self._tokens(depth) / self._tokens(REFERENCE_DEPTH)) ** BATCH_POWER
        return max(2 ** round(math.log2(best)) // self.base.model.seq_len, 1)


def _scaled(term: Term, factor: float) -> Term:
    """The term on regions that are larger by a factor, of one layer at least."""
    sizes = {max(1, round(size * factor)) for size in term.region_sizes}
    return dataclasses.replace(term, region_sizes=tuple(sorted(sizes)))


def scaling_params(model: ModelConfig) -> int:
    """Parameters in the layers' matrices and in the head, which the rules count; embeddings are left out."""
    return model.block_weights + model.embed_dim * model.padded_vocab_size
