"""One jitted, donated training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from snlp_jax.config import Config
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.sharding import TRAINING, shardings_of, spread_matrices, with_shardings
from snlp_jax.train.loss import Plan, balanced, loss_fn, term_weight
from snlp_jax.train.optim import make_optimizer
from snlp_jax.types import Array, Batch

TrainState = dict[str, Any]
"""``{'params': ..., 'opt_state': ..., 'step': int32 scalar}``."""
StepFn = Callable[..., tuple[TrainState, dict[str, Array]]]


def init_state(model: LanguageModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh parameters, optimizer state and step 0. Jit it."""
    params = model.init(jax.random.key(seed))
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def optimizer_of(model: LanguageModel, config: Config, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """The optimizer of a training run, on the mesh that holds its parameters."""
    tokens_per_step = config.train.batch_size * config.model.seq_len
    settings: dict[str, Any] = {}
    if mesh is not None and mesh.size > 1:
        settings["spread"] = functools.partial(spread_matrices, config=model.config, mesh=mesh)
    return make_optimizer(config.optim, model.abstract_params(), config.train.num_steps, tokens_per_step, **settings)


def abstract_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """Shapes of :func:`init_state`'s result; with a mesh each has its sharding, which initialisation, the step and the
    restoring of a checkpoint all read."""
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    return state if mesh is None else with_shardings(state, shardings_of(state, model.config, mesh, TRAINING))


def make_init(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None = None
) -> Callable[[], TrainState]:
    """:func:`init_state`, jitted; on a mesh the state is born where it belongs, never whole on one device."""
    init = lambda: init_state(model, optimizer, seed)  # noqa: E731
    return jax.jit(init, out_shardings=_shardings(abstract_state(model, optimizer, mesh)))


def make_step(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh | None = None
) -> StepFn:
    """``step(state, batch, plan=Plan(...)) -> (state, metrics)``; donates ``state``, compiles once a plan.

    The batch is split into ``train.num_microbatches`` equal parts (the j-th has rows j, j + M, ..., so that a batch
    that is spread over devices stays where it is) whose gradients are averaged.
    """
    num_steps, num_microbatches = config.train.num_steps, config.train.num_microbatches
    shardings = _shardings(abstract_state(model, optimizer, mesh))
    settings: dict[str, Any] = {"mesh": mesh, "ring_microbatches": config.mesh.ring_microbatches}

    @functools.partial(
        jax.jit,
        static_argnames="plan",
        donate_argnames="state",
        out_shardings=None if mesh is None else (shardings, None),
    )
    def step(state: TrainState, batch: Batch, *, plan: Plan) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        weights = {name: term_weight(config.loss.terms[name], state["step"], num_steps) for name, _ in plan.sizes}

        batch = balanced(batch)

        def gradient(rows: Batch) -> tuple[Any, dict[str, Array]]:
            loss = lambda params: loss_fn(model, params, rows, config.loss, plan, weights, key, **settings)  # noqa: E731
            grads, metrics = jax.grad(loss, has_aux=True)(state["params"])
            if mesh is not None:
                grads = jax.lax.with_sharding_constraint(grads, shardings["params"])
            return grads, metrics

        if num_microbatches == 1:
            grads, metrics = gradient(batch)
        else:
            cut = lambda leaf: jnp.moveaxis(leaf.reshape(-1, num_microbatches, *leaf.shape[1:]), 1, 0)  # noqa: E731
            parts = jax.tree.map(cut, batch)
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, first))
            add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)  # noqa: E731
            total, _ = jax.lax.scan(add, zero, parts)
            grads, metrics = jax.tree.map(lambda leaf: leaf / num_microbatches, total)

        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return step


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
