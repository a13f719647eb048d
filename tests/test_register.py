"""A correction of one's own: known to settings, losses, searches and the scan over devices by its name alone."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, random_params, random_tokens

from snlp_jax.config import LossConfig, MeshConfig, SearchConfig, SolverCEConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.search.space import lines_of
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.notation import CORRECTIONS, parse_schedule, register_correction
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.solver import Correction
from snlp_jax.solver.maps import ScalarMap
from snlp_jax.train.loss import make_correction

CONFIG = dataclasses.replace(SMALL, num_layers=2, window_pattern="L", use_x0_resid=False)


@dataclass(frozen=True)
class UniformScale(Correction):
    """``A_l = s I``, one s for all layers."""

    scale: float = 1.0

    def surrogate(self, chain, it, state):
        return ScalarMap(jnp.full((chain.num_nodes,), self.scale))


@pytest.fixture(autouse=True)
def uniform():
    register_correction("uniform", UniformScale)
    yield
    del CORRECTIONS["uniform"]


def test_a_setting_runs_it_over_devices():
    """With s = 1 it is Identity."""
    model, tokens = LanguageModel(CONFIG), random_tokens(CONFIG, length=4)
    params, mesh = random_params(model), make_mesh(MeshConfig(layer=2))

    def logits(setting, mesh=None):
        weights = prepare(model, params, parse_schedule(setting, 2), mesh=mesh)
        return jax.jit(lambda w, t: forward(model, w, t, mesh=mesh).logits_BTV)(weights, tokens)

    expected = logits("idn:n=2,k=1")
    np.testing.assert_allclose(logits("uniform:n=2,k=1", mesh), expected, rtol=0, atol=3e-5)
    assert parse_schedule("uniform:n=2,k=1,damp=0.5", 2).regions[0].correction == UniformScale(0.5)


def test_losses_and_searches_know_it():
    term = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,), correction="uniform")).terms["solver_ce"]
    assert make_correction(term) == UniformScale()
    with pytest.raises(InputError, match="uniform"):
        make_correction(dataclasses.replace(term, correction="unheard"))
    settings = [candidate.setting for line in lines_of(CONFIG, SearchConfig(), {}) for candidate in line.candidates]
    assert any(setting.startswith("uniform:") for setting in settings)


@pytest.mark.parametrize("name, word", (("idn", "taken"), ("skip", "taken"), ("My Own", "lower-case")))
def test_names_that_cannot_be_written_are_refused(name, word):
    with pytest.raises(InputError, match=word):
        register_correction(name, UniformScale)
