"""Low-rank adapters: ``W_l + (alpha / rank) A_l B_l`` with W frozen (Hu et al., arXiv 2106.09685).

Adapters are stacked as the matrices are, ``{'a': [L, in, rank], 'b': [L, rank, out]}`` in the tree of the parameters. A
is random and B zero, so that training starts from the base exactly. The loss reads merged matrices, and so do all who
read a checkpoint: there is no second forward pass. What is saved is the optimizer's memory; the gradient of an adapted
matrix is whole for a moment, as it is when all parameters are trained.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from snlp_jax.config import LoraConfig, OptimConfig
from snlp_jax.train.optim import clipped, learning_rate_schedule
from snlp_jax.types import Array, Params

Adapters = dict[str, Any]
"""``{'blocks': {'attn': {'query': {'a': ..., 'b': ...}, ...}, 'mlp': ...}}``."""

PLACES = {
    **{name: ("attn", name) for name in ("query", "key", "value", "out")},
    **{name: ("mlp", name) for name in ("up", "gate", "down")},
    **{name: (name, "kernel") for name in ("linear_attn", "linear_mlp")},
}
"""Target -> where its stack of matrices lies among the blocks."""


def init_adapters(key: Array, params: Params, config: LoraConfig) -> Adapters:
    """A normal with variance 1 / in, B zero, for every target."""
    blocks: dict[str, Any] = {}
    for name, target_key in zip(config.targets, jax.random.split(key, len(config.targets)), strict=True):
        place, matrix = PLACES[name]
        L, fan_in, fan_out = params["blocks"][place][matrix].shape
        adapter = {
            "a": fan_in**-0.5 * jax.random.normal(target_key, (L, fan_in, config.rank)),
            "b": jnp.zeros((L, config.rank, fan_out)),
        }
        blocks.setdefault(place, {})[matrix] = adapter
    return {"blocks": blocks}


def merge(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """The parameters that base and adapters together stand for; leaves without an adapter are the base's own."""
    blocks = dict(base["blocks"])
    for place, adapted in adapters["blocks"].items():
        blocks[place] = dict(blocks[place])
        for name, adapter in adapted.items():
            # In full precision: A B is small beside W, and costs little.
            product = jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST)
            blocks[place][name] = blocks[place][name] + config.alpha / config.rank * product
    return {**base, "blocks": blocks}


def make_lora_optimizer(lora: LoraConfig, optim: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW without decay at the adapters' rate, with the schedule and the clipping of a whole training."""
    schedule = learning_rate_schedule(optim, num_steps)
    adam = optax.adamw(lambda count: lora.lr * optim.lr_scale * schedule(count), b1=0.9, b2=0.999, weight_decay=0.0)
    return clipped(adam, optim.max_grad_norm)
