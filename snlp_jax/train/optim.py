"""Muon on the stacked matrices, AdamW on everything else, each group at its published rate (docs/math.md, section 6).

Which leaf belongs to which group stands on one shelf, ``LABELS``; what a group does, on another, ``ADAM_GROUPS``. A
leaf that no row of the shelf names is an error: without dimension numbers optax would silently give stacked matrices
to Adam and two-dimensional embeddings to Muon.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snlp_jax.config import OptimConfig
from snlp_jax.types import Params, map_named

LABELS: tuple[tuple[str, str], ...] = (
    (r"blocks/attn/(query|key|value|out)", "matrix"),
    (r"blocks/mlp/(up|gate|down)", "matrix"),
    (r"blocks/(attn/(query|key)_norm|norms/\w+)|head/norm", "vector"),
    (r"blocks/(attn|mlp)/\w+_bias", "vector"),
    (r"blocks/linear_(attn|mlp)/(kernel|down|up)", "matrix"),
    (r"blocks/linear_(attn|mlp)/bias", "vector"),
    (r"embed/value_gate", "matrix"),
    (r"embed/token", "embed"),
    (r"embed/value", "value_embed"),
    (r"head/kernel", "head"),
    (r"head/mtp", "matrix"),
    (r"blocks/hyper/(attn|mlp)/((res|pre|post)_logits|phi|alpha)", "hyper"),
    (r"blocks/resid_scale", "resid_scale"),
    (r"blocks/x0_scale", "x0_scale"),
    (r"embed/smear_(gate|scale)", "scalar"),
    (r"head/mid_scale", "scalar"),
)
"""Pattern of a leaf's whole path, and its group; the first match wins."""

REFERENCE_DIM = 768
"""Width at which the published rates of embeddings and head hold; others scale with (D / 768)^-0.5."""

ADAM_EPS = 1e-10
MUON_BETA = 0.95
MUON_DIMENSIONS = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
"""Of a stack ``[L, fan_in, fan_out]``: each layer is orthogonalised by itself."""

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five odd quintic polynomials whose composition sends [1e-3, 1] into [0.85, 1.15] (Amsel et al., arXiv 2505.16932;
the values nanochat uses, whose further division by 1.02 guards against bfloat16 and is left out in float32)."""


class AdamGroup(NamedTuple):
    """How AdamW treats one group, besides its rate, which is ``<name>_lr`` of the config."""

    betas: tuple[float, float]
    weight_decay: float
    """Multiplied by the learning rate."""
    scales_with_width: bool
    """Whether the rate takes the factor (D / 768)^-0.5."""
    scales_with_batch: bool
    """Whether the rate takes the factor sqrt(tokens per step / reference)."""


ADAM_GROUPS: dict[str, AdamGroup] = {
    "embed": AdamGroup((0.8, 0.995), 0.001, scales_with_width=True, scales_with_batch=True),
    "value_embed": AdamGroup((0.8, 0.995), 0.01, scales_with_width=True, scales_with_batch=True),
    "head": AdamGroup((0.8, 0.96), 0.01, scales_with_width=True, scales_with_batch=True),
    "resid_scale": AdamGroup((0.8, 0.95), 0.05, scales_with_width=False, scales_with_batch=True),
    "x0_scale": AdamGroup((0.96, 0.95), 0.0, scales_with_width=False, scales_with_batch=True),
    "scalar": AdamGroup((0.8, 0.95), 0.0, scales_with_width=False, scales_with_batch=False),
    "hyper": AdamGroup((0.9, 0.999), 0.0, scales_with_width=False, scales_with_batch=False),
    "vector": AdamGroup((0.9, 0.999), 0.0, scales_with_width=False, scales_with_batch=False),
}

LATER_GROUPS = ("vector",)
"""Groups that only models with such leaves have a state for: the checkpoints of others began without one."""


def param_labels(params: Params) -> Any:
    """The group of every leaf: a tree like ``params`` of "matrix" or a key of ``ADAM_GROUPS``.

    Raises ValueError naming the path of a leaf that no row of ``LABELS`` matches.
    """
    return map_named(lambda name, _: _label(name), params)


def _label(name: str) -> str:
    for pattern, label in LABELS:
        if re.fullmatch(pattern, name):
            return label
    raise ValueError(f"parameter {name!r} matches no row of snlp_jax.train.optim.LABELS; add one that names its group.")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Multiplier of every rate, a function of the number of updates already made; works under jit.

    Rises linearly over ``warmup_steps`` (the first update gets ``1 / warmup_steps``), stays at 1, and falls linearly
    over the last ``warmdown_fraction`` of ``num_steps`` to ``final_lr_fraction``, reached at ``num_steps``. Where the
    two ramps overlap, in short runs, the lower one holds.
    """
    warmup_steps = max(config.warmup_steps, 1)
    warmdown_steps = max(round(config.warmdown_fraction * num_steps), 1)

    def multiplier(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warmup = jnp.minimum((count + 1) / warmup_steps, 1)
        left = jnp.clip((num_steps - count) / warmdown_steps, 0, 1)
        warmdown = config.final_lr_fraction + (1 - config.final_lr_fraction) * left
        # With a warm-down share of 0 there is no last part to fall in.
        return jnp.minimum(warmup, warmdown) if config.warmdown_fraction > 0 else warmup

    return multiplier


def make_optimizer(
    config: OptimConfig,
    params: Params,
    num_steps: int,
    tokens_per_step: int,
    spread: Callable[[Params], Params] = lambda matrices: matrices,
) -> optax.GradientTransformation:
    """The optimizer of a whole parameter tree (arrays or their shapes), by groups, with the schedule built in.

    Weight decay is decoupled and, as everywhere in optax and PyTorch, multiplied by the learning rate: a step takes
    ``lr * weight_decay * w`` off the weights. Its state mirrors ``params``: a stack ``[L, ...]`` has ``[L, ...]``
    moments. A gradient of zeros gives a finite update.

    Muon is ``optax.contrib.scale_by_muon`` set up as nanochat's: Nesterov momentum 0.95, five Polar Express steps, the
    update of a ``[fan_in, fan_out]`` matrix scaled by ``sqrt(max(1, fan_out / fan_in))``. It departs from the published
    runs in having no variance normalisation (NorMuon), plain instead of cautious weight decay without a cosine,
    a momentum that stays at 0.95, bias-corrected averages, and float32 throughout the iteration.

    ``spread`` is applied to what Muon reads and gives: on a mesh it lays whole matrices on different devices.

    Raises ValueError for a leaf without a group.
    """
    schedule = learning_rate_schedule(config, num_steps)
    width_factor = (params["embed"]["token"].shape[-1] / REFERENCE_DIM) ** -0.5
    batch_factor = (tokens_per_step / config.batch_reference) ** 0.5 if config.batch_reference > 0 else 1.0

    def scaled(rate: float) -> optax.Schedule:
        return lambda count: rate * config.lr_scale * schedule(count)

    transforms = {"matrix": _muon(scaled(config.matrix_lr * batch_factor), config.matrix_weight_decay, spread)}
    labels = param_labels(params)
    used = set(jax.tree.leaves(labels))
    for label, group in ADAM_GROUPS.items():
        if label in LATER_GROUPS and label not in used:
            continue
        rate = getattr(config, f"{label}_lr")
        rate *= width_factor if group.scales_with_width else 1.0
        rate *= batch_factor if group.scales_with_batch else 1.0
        b1, b2 = group.betas
        transforms[label] = optax.adamw(scaled(rate), b1=b1, b2=b2, eps=ADAM_EPS, weight_decay=group.weight_decay)
    return clipped(optax.multi_transform(transforms, labels), config.max_grad_norm)


def clipped(optimizer: optax.GradientTransformation, max_grad_norm: float) -> optax.GradientTransformation:
    """The optimizer of gradients whose global norm is at most ``max_grad_norm``; 0 clips nothing."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer) if max_grad_norm > 0 else optimizer


def _muon(
    learning_rate: optax.Schedule, weight_decay: float, spread: Callable[[Params], Params]
) -> optax.GradientTransformation:
    """Muon for a tree whose leaves are all stacks ``[L, fan_in, fan_out]``, the rest masked out."""

    dimensions = lambda updates: jax.tree.map(lambda _: MUON_DIMENSIONS, updates)  # noqa: E731
    by_shape = lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5  # noqa: E731
    muon = optax.contrib.scale_by_muon(
        ns_coeffs=POLAR_EXPRESS, beta=MUON_BETA, nesterov=True, weight_dimension_numbers=dimensions
    )

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = muon.update(spread(updates), state._replace(mu=spread(state.mu)), params)
        return spread(updates), state

    return optax.chain(
        optax.GradientTransformation(muon.init, update),
        optax.stateless(lambda updates, _: jax.tree.map(by_shape, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
