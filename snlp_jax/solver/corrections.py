"""Corrections: cheap models of the layer Jacobians that carry an update down the depth.

One iteration evaluates ``y_l = f_l(h_{l-1})`` for all nodes and then solves ``d_l = A_l d_{l-1} + (y_l - h_l)``,
``h'_l = y_l + A_l d_{l-1}`` with a surrogate A_l for df_l/dh_{l-1} (SNLP, arXiv 2605.17842, section 3). Whatever A
is, after k iterations the first k nodes are exact.

A new correction is one frozen dataclass and one row in ``tests/problems.py``; ``snlp_jax.notation.register_correction``
gives it a name. ``Calibrated`` stands in ``calibrated.py``, ``TrustRegion`` in ``trust.py``.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.collectives import all_gather_packed, pipeline
from snlp_jax.solver.init import NO_DATA
from snlp_jax.solver.linear import Corrected, add, correct, corrected_alone, layer, stack, subtract
from snlp_jax.solver.maps import DiagonalMap, IdentityMap, LinearMap, MatrixMap, ScalarMap, ZeroMap

PyTree = Any


class Iteration(NamedTuple):
    """One evaluation of all (local) nodes, which a correction turns into the next trace."""

    index: jax.Array | int  # type: ignore[assignment]  # not tuple.index
    """Counted from 0."""
    x_L: PyTree
    """Inputs of the nodes."""
    y_L: PyTree
    """Outputs of the nodes."""
    aux_L: PyTree
    """What the nodes left behind."""
    h_L: PyTree
    """The trace before the correction."""
    entering: PyTree
    """State that entered the first node."""


@dataclass(frozen=True)
class Correction:
    """Base of all corrections. ``damping`` k in [0, 1] replaces A by (1 - k) A.

    A correction of your own overrides :meth:`surrogate`, which returns one of the maps of ``maps.py``, say
    ``ScalarMap(a_L)`` with a_L [N]; the rest works for any of them, over devices too.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"damping {self.damping} lies outside 0 to 1.")

    def __call__(
        self, chain: Chain, it: Iteration, state: PyTree = (), *, taps: tuple[int, ...] = (), packed: PyTree = ()
    ) -> Corrected:
        """The next trace. ``taps`` and ``packed``: see :func:`snlp_jax.solver.linear.correct`."""
        maps, y_L = self.maps(chain, it, state), self.predict(chain, it, state)
        return correct(maps, y_L, it.h_L, it.entering, chain.place.axis, taps=taps, packed=packed)

    def start(self, chain: Chain, x_L: PyTree, data: MethodData = NO_DATA) -> PyTree:
        """State that all iterations share, made once at the inputs of the first; () where there is none."""
        return ()

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        """A_l for every node of the chain, before damping."""
        raise NotImplementedError

    def predict(self, chain: Chain, it: Iteration, state: PyTree) -> PyTree:
        """The new outputs for an update of 0: the evaluations themselves."""
        return it.y_L

    def maps(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        """A_l as the correction uses it: damped, and the identity for rows that do not count."""
        maps = self.surrogate(chain, it, state).damp(self.damping, chain.num_nodes)
        is_padding_L = chain.place.is_padding()
        return maps if is_padding_L is None else maps.identity_where(is_padding_L)

    def apply(self, chain: Chain, it: Iteration, state: PyTree, v_L: PyTree, jv_L: PyTree) -> PyTree:
        """``A_l v_l`` of every node, for diagnostics; ``jv_L`` is ``J_l v_l``."""
        return self.maps(chain, it, state).apply(v_L)

    def serial_evals(self, num_nodes: int, num_iters: int) -> int:
        """Block evaluations that the corrections themselves put on the critical path."""
        return 0

    def extra_evals(self, num_nodes: int, num_iters: int) -> int:
        """Block evaluations that the corrections cost, on the critical path or beside it (a JVP counted as one)."""
        return 0

    @property
    def needs_forward_mode(self) -> bool:
        """Whether the chain's block is differentiated in forward mode."""
        return False

    @property
    def innermost(self) -> "Correction":
        """The correction itself, or of one that wraps another that other one."""
        return self


@dataclass(frozen=True)
class Jacobi(Correction):
    """``A_l = 0``. Cost: none. Exact in one step on nodes that ignore their input; the floor to beat."""

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        return ZeroMap()


@dataclass(frozen=True)
class Identity(Correction):
    """IDN, ``A_l = I``. Cost: a prefix sum. Exact in one step on translations ``h -> h + c_l``."""

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        return IdentityMap()


@dataclass(frozen=True)
class ScaledIdentity(Correction):
    """``A_l = s_l I`` with s_l the derivative of the skip path (``LayerFns.skip``).

    Cost: a scan of scalars and states. Exact in one step on ``h -> s_l h + c_l``. The published code uses A = I even
    where the skip path is scaled.
    """

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        skip_L = chain.skips(it.aux_L)
        if skip_L.ndim > 1:
            raise ValueError("ScaledIdentity needs a scalar skip path; for one that mixes streams use HyperConnection.")
        return ScalarMap(skip_L)


@dataclass(frozen=True)
class HyperConnection(Correction):
    """HCN, ``A_l = H_l``: the R x R matrices with which a layer's skip path mixes its residual streams.

    They come from ``LayerFns.skip``: one matrix a layer (static maps), or one a token (dynamic maps, whose own
    derivative is neglected). Cost: a scan of R x R matrices and states. Exact in one step on ``h -> H_l h + c_l``,
    where H_l acts on the last axis but one of the state.
    """

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        skip_L = chain.skips(it.aux_L)
        if skip_L.ndim < 3:
            raise ValueError("HyperConnection needs a skip path that mixes streams; for a scalar use ScaledIdentity.")
        ndim = jax.tree.leaves(it.h_L)[0].ndim
        return MatrixMap(skip_L.reshape(skip_L.shape[0], *(1,) * (ndim - skip_L.ndim), *skip_L.shape[1:]))


@dataclass(frozen=True)
class Diagonal(Correction):
    """``A_l = diag(df_l/dh_{l-1})``, estimated by Hutchinson's ``mean over probes of z * (J z)``, z = +-1.

    Exact in one step on ``h -> a_l * h + c_l`` (elementwise, |a| <= 2; one probe suffices, since z * (a * z) = a). On
    other layers an entry carries the noise of its row's off-diagonal entries.

    Cost for each probe: one evaluation for ``jvp`` and ``finite_difference``, beside the iteration's own, two for
    ``vjp`` (which uses J^T, of the same diagonal, and works with attention kernels that have no forward mode); a scan
    of states.

    Attributes:
        num_probes: vectors z.
        mode: how J z is made.
        step: of the finite difference ``(f(h + step z) - f(h)) / step``.
        limit: entries are clipped to plus and minus this, as published: a probe's noise must not blow up.
        stride: of the region only layers 0, stride, 2 stride ... are estimated, the others keep A = I (published for
            training; the products are still made for all).
        reuse: estimate once, at the first iteration's inputs, for all iterations.
        detach: the estimate is a constant to reverse-mode differentiation (published for training: no second
            derivatives).
        seed: of z where ``MethodData.key`` is None. z depends on the key, the iteration and the node alone: the same
            key gives the same result, on any number of devices.
    """

    num_probes: int = 1
    mode: Literal["jvp", "vjp", "finite_difference"] = "jvp"
    step: float = 1e-2
    limit: float = 2.0
    stride: int = 1
    reuse: bool = False
    detach: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_probes < 1:
            raise ValueError(f"probes={self.num_probes}: the Diagonal correction needs at least one probe.")
        if self.mode not in ("jvp", "vjp", "finite_difference"):
            raise ValueError(f"mode {self.mode!r} is not one of jvp, vjp, finite_difference.")
        if not self.step > 0 or not self.limit > 0 or self.stride < 1:
            raise ValueError(f"step {self.step}, limit {self.limit} and stride {self.stride} must be positive.")

    def start(self, chain: Chain, x_L: PyTree, data: MethodData = NO_DATA) -> PyTree:
        """The key of the probes, or the estimate where it is reused."""
        key = jax.random.key(self.seed) if data.key is None else data.key
        return self._estimate(chain, key, 0, x_L, chain.sweep(x_L)[0]) if self.reuse else key

    def surrogate(self, chain: Chain, it: Iteration, state: PyTree) -> LinearMap:
        return state if self.reuse else self._estimate(chain, state, it.index, it.x_L, it.y_L)

    def probe(self, chain: Chain, key: jax.Array, index: jax.Array | int, number: int, like_L: PyTree) -> PyTree:
        """z of one probe for all nodes, a tree like ``like_L`` of +-1."""
        key = jax.random.fold_in(jax.random.fold_in(key, index), number)
        leaves, tree = jax.tree.flatten(like_L)
        fold_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))

        def one(position: int, leaf: jax.Array) -> jax.Array:
            keys = fold_each(jax.random.fold_in(key, position), chain.place.indices(chain.num_nodes))
            shape = leaf.shape[1:]
            if shape:  # a key for each row as well, the same wherever it lies
                keys = jax.vmap(fold_each, in_axes=(0, None))(keys, chain.place.batch_rows(shape[0]))
                shape = shape[1:]
            draw = jax.vmap(lambda key: jax.random.rademacher(key, shape, leaf.dtype))
            return draw(keys.reshape(-1)).reshape(leaf.shape)

        return jax.tree.unflatten(tree, [one(position, leaf) for position, leaf in enumerate(leaves)])

    def _estimate(self, chain: Chain, key: jax.Array, index: jax.Array | int, x_L: PyTree, y_L: PyTree) -> LinearMap:
        sweep = lambda x_L: chain.sweep(x_L)[0]  # noqa: E731
        total = jax.tree.map(jnp.zeros_like, x_L)
        for number in range(self.num_probes):
            z_L = self.probe(chain, key, index, number, x_L)
            if self.mode == "jvp":
                slope_L = jax.jvp(sweep, (x_L,), (z_L,))[1]
            elif self.mode == "vjp":
                slope_L = jax.vjp(sweep, x_L)[1](z_L)[0]
            else:
                moved_L = sweep(jax.tree.map(lambda x, z: x + self.step * z, x_L, z_L))
                slope_L = jax.tree.map(lambda moved, y: (moved - y) / self.step, moved_L, y_L)
            total = add(total, jax.tree.map(jnp.multiply, z_L, slope_L))
        maps = DiagonalMap(jax.tree.map(lambda a: jnp.clip(a / self.num_probes, -self.limit, self.limit), total))
        maps = jax.lax.stop_gradient(maps) if self.detach else maps
        is_left_L = chain.place.indices(chain.num_nodes) % self.stride > 0
        return maps if self.stride == 1 else maps.identity_where(is_left_L)

    def serial_evals(self, num_nodes: int, num_iters: int) -> int:
        # A backward pass follows a forward pass; the other two differentiate beside the evaluation.
        return (1 if self.reuse else num_iters) if self.mode == "vjp" else 0

    def extra_evals(self, num_nodes: int, num_iters: int) -> int:
        per_estimate = num_nodes * self.num_probes * (2 if self.mode == "vjp" else 1)
        return per_estimate * (1 if self.reuse else num_iters)

    @property
    def needs_forward_mode(self) -> bool:
        return self.mode == "jvp"


@dataclass(frozen=True)
class Exact(Correction):
    """``A_l = df_l/dh_{l-1}`` by forward-mode differentiation and forward substitution: Newton's method, the oracle.

    Cost: N JVPs one after another, over spread layers round all devices in every iteration. Exact in one step on any
    affine chain. Needs a block with a forward-mode derivative (XLA attention).
    """

    undamped: tuple[int, ...] = ()
    """Nodes that ``damping`` leaves as they are."""

    def __call__(
        self, chain: Chain, it: Iteration, state: PyTree = (), *, taps: tuple[int, ...] = (), packed: PyTree = ()
    ) -> Corrected:
        zero, axis = jax.tree.map(jnp.zeros_like, it.entering), chain.place.axis
        if axis is None:
            return corrected_alone(self._substitute(chain, it, zero)[1], it.entering, taps, packed)

        # The delta goes round the devices, and with it the state that enters the next one.
        def evaluate(carry: tuple[PyTree, PyTree], _: jax.Array) -> tuple[tuple[PyTree, PyTree], PyTree]:
            d, new_L = self._substitute(chain, it, carry[0])
            return (d, layer(new_L, -1)), new_L

        entered, _, new_L = pipeline(evaluate, jax.tree.map(lambda leaf: leaf[None], (zero, chain.h_in)), axis)
        new_L, num_nodes = layer(new_L, 0), chain.num_nodes
        local = (layer(new_L, -1), tuple(layer(new_L, tap % num_nodes) for tap in taps), packed)
        leaving, tapped, packed_of_all = all_gather_packed(local, axis)
        tapped = tuple(layer(of_all, tap // num_nodes) for of_all, tap in zip(tapped, taps, strict=True))
        return Corrected(new_L, layer(entered[1], 0), layer(leaving, -1), tapped, packed_of_all)

    def apply(self, chain: Chain, it: Iteration, state: PyTree, v_L: PyTree, jv_L: PyTree) -> PyTree:
        return ScalarMap(self._shares(chain)).apply(jv_L)

    def _substitute(self, chain: Chain, it: Iteration, d: PyTree) -> tuple[PyTree, PyTree]:
        """The delta after the last (local) node and the new trace, for a delta d before the first."""

        def one(d: PyTree, row: tuple) -> tuple[PyTree, PyTree]:
            params, ctx, x, y, h, share, is_padding = row
            slope = jax.tree.map(lambda s: share.astype(s.dtype) * s, jvp_of(chain, params, ctx, x, d))
            if is_padding is not None:
                slope = jax.tree.map(lambda s, d: jnp.where(is_padding, d, s), slope, d)
            new = add(y, slope)
            return subtract(new, h), new

        states = (it.x_L, it.y_L, it.h_L, self._shares(chain))
        if not chain.is_list and chain.rows is None:
            return jax.lax.scan(one, d, (chain.params, chain.ctx, *states, chain.place.is_padding()))
        news = []
        for index in range(chain.num_nodes):
            d, new = one(d, (*chain.node(index), *layer(states, index), None))
            news.append(new)
        return d, stack(news)

    def _shares(self, chain: Chain) -> jax.Array:
        """[N]: what damping leaves of each derivative."""
        return jnp.full((chain.num_nodes,), 1.0 - self.damping).at[jnp.asarray(self.undamped, int)].set(1.0)

    def serial_evals(self, num_nodes: int, num_iters: int) -> int:
        return num_nodes * num_iters

    def extra_evals(self, num_nodes: int, num_iters: int) -> int:
        return num_nodes * num_iters

    @property
    def needs_forward_mode(self) -> bool:
        return True


@dataclass(frozen=True)
class Wrapping(Correction):
    """Base of corrections that wrap another: whatever they do not override is that of ``base``."""

    base: Correction = Correction()

    def start(self, chain: Chain, x_L: PyTree, data: MethodData = NO_DATA) -> PyTree:
        return self.base.start(chain, x_L, data)

    def predict(self, chain: Chain, it: Iteration, state: PyTree) -> PyTree:
        return self.base.predict(chain, it, state)

    def serial_evals(self, num_nodes: int, num_iters: int) -> int:
        return self.base.serial_evals(num_nodes, num_iters)

    def extra_evals(self, num_nodes: int, num_iters: int) -> int:
        return self.base.extra_evals(num_nodes, num_iters)

    @property
    def needs_forward_mode(self) -> bool:
        return self.base.needs_forward_mode

    @property
    def innermost(self) -> Correction:
        return self.base.innermost


def jvp_of(chain: Chain, params: PyTree, ctx: PyTree, x: PyTree, d: PyTree) -> PyTree:
    """``J d`` of one node at the input x."""
    return jax.jvp(lambda state: chain.fns.block(params, state, ctx, chain.shared)[0], (x,), (d,))[1]
