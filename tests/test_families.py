"""Models of other families: logits of PyTorch from golden files (tests/data/make_families.py), which need no torch."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from snlp_jax.forward import forward
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import TensorFiles, family_config, family_of, family_rows, read_params
from snlp_jax.model.convert.families import UNUSED_TENSORS
from snlp_jax.model.convert.tensor_files import Tensor, write_files
from snlp_jax.solver import Schedule

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))
FAMILY_NAMES = ("gemma2", "gemma3", "llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3")
PROMPT_LEN = 8


class Golden:
    def __init__(self, name):
        arrays = np.load(DATA / f"{name}.npz")
        self.config = json.loads(str(arrays["config"]))
        self.tokens, self.logits = arrays["tokens"], arrays["logits"]
        self.weights = {key[2:]: arrays[key].astype(np.float32) / 64 for key in arrays.files if key.startswith("w/")}

    def write(self, folder, dtype="float32", max_shard_bytes=2**30):
        tensors = [Tensor(name, w.shape, lambda w=w: w) for name, w in self.weights.items()]
        write_files(folder, tensors, dtype, max_shard_bytes)
        return folder

    def read(self, folder, shardings=None):
        config = family_config(self.config)
        rows = family_rows(config)
        return config, read_params(TensorFiles(folder), rows, UNUSED_TENSORS, shardings)


@functools.cache
def golden(name):
    return Golden(name)


def test_every_family_has_a_golden_file():
    assert tuple(NAMES) == FAMILY_NAMES
    assert {family_of(golden(name).config) is not None for name in NAMES} == {True}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_pytorch(name, tmp_path):
    """The text is what greedy decoding gave there: where each next token is the likeliest here too, so by induction is
    greedy decoding. The windows of 6 and 7 and the contexts before scaling are shorter than it."""
    told = golden(name)
    config, params = told.read(told.write(tmp_path))
    model = LanguageModel(config)
    run = jax.jit(lambda weights: forward(model, weights, told.tokens).logits_BTV)
    logits = np.asarray(run(split(model, params, Schedule.of(config.num_layers))))
    np.testing.assert_allclose(logits, told.logits, atol=1e-5, rtol=0)
    greedy = logits[:, PROMPT_LEN - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(greedy, told.tokens[:, PROMPT_LEN:])
    assert greedy.shape[1] == 32
