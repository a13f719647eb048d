"""Parameters before the first layer and behind the last: embedding tables and the head."""

import jax
import jax.numpy as jnp
from flax import nnx

from snlp_jax.config import ModelConfig
from snlp_jax.model.layers import GATE_INPUT, SMEAR_INPUT, norm_weight, uniform


class Embedding(nnx.Module):
    """Token table, smear, and the value-embedding tables of the layers that have one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V, kv_dim = config.padded_vocab_size, config.num_kv_heads * config.head_dim
        self.token = nnx.Param(0.8 * jax.random.normal(rngs.params(), (V, config.embed_dim)))
        if config.use_smear:
            self.smear_gate = nnx.Param(0.02 * jax.random.uniform(rngs.params(), (SMEAR_INPUT,)))
            self.smear_scale = nnx.Param(jnp.zeros(()))
        num_tables = len(config.value_embed_layers)
        if num_tables:
            self.value = nnx.Param(uniform(rngs.params(), (num_tables, V, kv_dim), config.embed_dim**-0.5))
            gate_shape = (num_tables, GATE_INPUT, config.num_kv_heads)
            self.value_gate = nnx.Param(0.02 * jax.random.uniform(rngs.params(), gate_shape))


class Head(nnx.Module):
    """Output projection, unless it is the token table, its norm's weight, the weight of the mid-layer state it
    subtracts, and the matrices [M, D, D] before it that make it look further ahead.

    These begin as the identity: each head then says what the next-token head says, in a space that the projection can
    read. From 0 the norm behind them would have a derivative of 1 / sqrt(eps), about 3000.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.padded_vocab_size)
        if not config.use_tied_head:
            self.kernel = nnx.Param(0.001 * jax.random.normal(rngs.params(), shape))
        if config.norm.weight != "none":
            self.norm = nnx.Param(norm_weight(config.norm, config.embed_dim))
        if config.use_mid_subtract:
            self.mid_scale = nnx.Param(jnp.asarray(0.2, jnp.float32))  # not weakly typed: a step would compile twice
        if config.num_mtp_heads:
            self.mtp = nnx.Param(jnp.tile(jnp.eye(config.embed_dim), (config.num_mtp_heads, 1, 1)))
