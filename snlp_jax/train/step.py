"""One jitted, donated training step, and what it carries along."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from snlp_jax.config import Config
from snlp_jax.errors import InputError
from snlp_jax.model import Model
from snlp_jax.parallel.sharding import TRAINING, shardings_of, spread_matrices, with_shardings
from snlp_jax.seeds import folded
from snlp_jax.train.lora import init_adapters, make_lora_optimizer, merge
from snlp_jax.train.loss import Plan, balanced, loss_fn, term_weight
from snlp_jax.train.optim import make_optimizer
from snlp_jax.train.passes import Passes
from snlp_jax.types import Array, Batch, Params, map_named

TrainState = dict[str, Any]
"""``{'params': what the optimizer moves, 'opt_state': ..., 'step': int32 scalar}``. With adapters 'params' holds them
and 'base' what they adapt; with an average over the steps 'ema' is that of 'params'."""
StepFn = Callable[..., tuple[TrainState, dict[str, Array]]]


def init_state(
    model: Model, optimizer: optax.GradientTransformation, config: Config, params: Params | None = None
) -> TrainState:
    """The state of step 0, from fresh parameters or ``params``, with what ``config`` wants carried along. Jit it."""
    key = jax.random.key(folded(config.train.seed))
    params = model.init(key) if params is None else params
    extras: dict[str, Any] = {}
    if config.lora.rank > 0:
        extras["base"] = params
        params = init_adapters(jax.random.fold_in(key, 1), params, config.lora)
    if config.train.ema_decay > 0:
        extras["ema"] = jax.tree.map(jnp.copy, params)  # a step donates both
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32), **extras}


def optimizer_of(model: Model, config: Config, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """The optimizer of a training run, on the mesh that holds its parameters.

    Raises:
        InputError: ``train.trainable`` matches nothing.
    """
    if config.lora.rank > 0:
        return make_lora_optimizer(config.lora, config.optim, config.train.num_steps)
    tokens_per_step = config.train.batch_size * config.model.seq_len
    params, spread = model.abstract_params(), functools.partial(spread_matrices, config=model.config, mesh=mesh)
    optimizer = make_optimizer(config.optim, params, config.train.num_steps, tokens_per_step, spread)
    if not config.train.trainable:
        return optimizer
    if not any(jax.tree.leaves(_matches(params, config.train.trainable))):
        raise InputError(f"train.trainable {config.train.trainable!r} matches the path of no parameter.")
    rest = lambda tree: jax.tree.map(lambda matches: not matches, _matches(tree, config.train.trainable))  # noqa: E731
    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), rest))  # weight decay moves what has no gradient


def frozen(params: Params, trainable: str) -> Params:
    """The parameters, of which those whose path does not match are constants to the gradient."""
    if not trainable:
        return params
    stop = lambda leaf, matches: leaf if matches else jax.lax.stop_gradient(leaf)  # noqa: E731
    return jax.tree.map(stop, params, _matches(params, trainable))


def _matches(params: Params, pattern: str) -> Any:
    """Of every leaf whether its whole path matches."""
    return map_named(lambda name, _: re.fullmatch(pattern, name) is not None, params)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh | None = None
) -> TrainState:
    """Shapes of :func:`init_state`'s result; with a mesh each has its sharding, which initialisation, the step and the
    restoring of a checkpoint all read."""
    return _placed(jax.eval_shape(lambda: init_state(model, optimizer, config)), model, mesh)


def make_init(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh | None = None
) -> Callable[..., TrainState]:
    """``init(params=None)``: :func:`init_state`, jitted; on a mesh the state is born where it belongs, never whole on
    one device."""
    init = lambda params=None: init_state(model, optimizer, config, params)  # noqa: E731
    return jax.jit(init, out_shardings=_shardings(abstract_state(model, optimizer, config, mesh)))


# -- What is read of a state -------------------------------------------------------------------------------------------


def make_reader(model: Model, config: Config, mesh: Mesh | None = None) -> Callable[[TrainState], Params]:
    """``state -> the parameters that evaluations read``: the average over the steps where there is one, with adapters
    merged into what they adapt."""
    trained = lambda state: state["ema" if config.train.ema_decay > 0 else "params"]  # noqa: E731
    if config.lora.rank == 0:
        return trained
    out_shardings = _shardings(_placed(model.abstract_params(), model, mesh))
    merged = jax.jit(lambda base, adapters: merge(base, adapters, config.lora), out_shardings=out_shardings)
    return lambda state: merged(state["base"], trained(state))


def to_saved(state: TrainState, params: Params) -> TrainState:
    """What a checkpoint holds: under 'params' those of :func:`make_reader`, so that its readers need not know how they
    came about, and under 'trained' what the optimizer moves."""
    if "base" not in state and "ema" not in state:
        return state
    rest: TrainState = {name: tree for name, tree in state.items() if name != "params"}
    if "base" not in state:
        del rest["ema"]  # which is what is read
    return {"params": params, "trained": state["params"], **rest}


def from_saved(saved: TrainState) -> TrainState:
    """Inverse of :func:`to_saved`."""
    if "trained" not in saved:
        return saved
    state = {name: tree for name, tree in saved.items() if name != "trained"} | {"params": saved["trained"]}
    return state if "base" in saved else state | {"ema": saved["params"]}


def abstract_saved(state: TrainState, model: Model, mesh: Mesh | None = None) -> TrainState:
    """:func:`to_saved` of the shapes that :func:`abstract_state` gives."""
    return to_saved(state, _placed(model.abstract_params(), model, mesh))


# -- The step ----------------------------------------------------------------------------------------------------------


def ema_decay(decay: float, step: Array) -> Array:
    """What an average keeps of itself at update ``step``, from 0: ``min(decay, (1 + step) / (10 + step))``, so that a
    short run is not dominated by where it began."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_step(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh | None = None
) -> StepFn:
    """``step(state, batch, plan=Plan(...)) -> (state, metrics)``; donates ``state``, compiles once a plan.

    The batch is split into ``train.num_microbatches`` equal parts (the j-th has rows j, j + M, ..., so that a batch
    that is spread over devices stays where it is) whose gradients are averaged.
    """
    shardings = _shardings(abstract_state(model, optimizer, config, mesh))
    terms, num_steps, ring_microbatches = config.loss.terms, config.train.num_steps, config.mesh.ring_microbatches

    def gradient(state: TrainState, rows: Batch, plan: Plan) -> tuple[Any, dict[str, Array]]:
        """Of the loss by ``state["params"]``, and the metrics."""
        key = jax.random.fold_in(jax.random.key(folded(config.train.seed)), state["step"])
        weights = {name: term_weight(terms[name], state["step"], num_steps) for name, _ in plan.sizes}

        def loss(trained: Any) -> tuple[Array, dict[str, Array]]:
            if config.lora.rank > 0:
                params = merge(state["base"], trained, config.lora)
            else:
                params = frozen(trained, config.train.trainable)
            passes = Passes(model, params, rows, key, mesh=mesh, ring_microbatches=ring_microbatches)
            return loss_fn(passes, config.loss, plan, weights)

        grads, metrics = jax.grad(loss, has_aux=True)(state["params"])
        return grads if mesh is None else jax.lax.with_sharding_constraint(grads, shardings["params"]), metrics

    @functools.partial(jax.jit, static_argnames="plan", donate_argnames="state", out_shardings=(shardings, None))
    def step(state: TrainState, batch: Batch, *, plan: Plan) -> tuple[TrainState, dict[str, Array]]:
        of_rows = lambda rows: gradient(state, rows, plan)  # noqa: E731
        grads, metrics = _mean_over_parts(of_rows, balanced(batch), config.train.num_microbatches)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        if "ema" in state:
            kept = ema_decay(config.train.ema_decay, state["step"])
            new["ema"] = jax.tree.map(lambda old, now: kept * old + (1 - kept) * now, state["ema"], params)
        return new, metrics

    return step


def _mean_over_parts(gradient: Callable[[Batch], Any], batch: Batch, num_parts: int) -> Any:
    """Mean of ``gradient`` over equal parts of the batch, one after another."""
    if num_parts == 1:
        return gradient(batch)
    cut = lambda leaf: jnp.moveaxis(leaf.reshape(-1, num_parts, *leaf.shape[1:]), 1, 0)  # noqa: E731
    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda leaf: leaf[0], parts))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)  # noqa: E731
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda leaf: leaf / num_parts, total)


def _placed(tree: Any, model: Model, mesh: Mesh | None) -> Any:
    """Shapes of parameters or of a state, on a mesh with their shardings."""
    return tree if mesh is None else with_shardings(tree, shardings_of(tree, model.config, mesh, TRAINING))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
