"""GGUF files: equal to the Hugging Face folder of the same model, type by type, and refused in a sentence."""

import struct

import chex
import gguf
import jax
import numpy as np
import pytest
from gguf_files import VOCABULARY, fields_of, llama3_factors, tensors_of, write_gguf, write_model
from test_families import FAMILY_NAMES, golden

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.model.convert import family_config, family_rows, read_params
from snlp_jax.model.convert.tensor_files import StateDict
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.pretrained import from_pretrained, import_model
from snlp_jax.pretrained.gguf_header import read_gguf_header
from snlp_jax.pretrained.gguf_model import KINDS, GgufTensors, gguf_config, llama3_scaling
from snlp_jax.pretrained.gguf_tokenizer import gguf_ids, gguf_templates, gguf_tokenizer, gguf_tokenizer_config


def twin(name):
    """Config and parameters of the Hugging Face folder."""
    config = golden(name).config | ({"use_sliding_window": False} if name == "qwen2" else {})
    config = {key: value for key, value in config.items() if name != "qwen2" or key != "layer_types"}
    made = family_config(config)
    return made, read_params(StateDict(golden(name).weights), family_rows(made))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_file_is_its_folder_bit_for_bit(name, tmp_path):
    """Queries and keys of Llama in their order again, norms of Gemma without their one, scalings and windows."""
    imported = import_model(write_model(tmp_path / "m.gguf", name))
    config, params = twin(name)
    assert imported.config == config
    chex.assert_trees_all_equal(imported.params, params)


@pytest.mark.parametrize("kind", ("F16", "BF16"))
def test_halves_are_exact(kind, tmp_path):
    """The weights are multiples of 1/64."""
    imported = import_model(write_model(tmp_path / "m.gguf", "llama_bias", kind=kind))
    chex.assert_trees_all_equal(imported.params, twin("llama_bias")[1])


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_parts_of_tensors(kind, tmp_path):
    """Any rows and columns of a tensor are those of the whole, whatever its type, in Llama's order of channels too."""
    rng, code = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    wanted = rng.normal(size=(16, 512)).astype(np.float32)
    try:
        stored = gguf.quantize(wanted, code)
    except NotImplementedError:  # the package only reads those: blocks of random bytes with scales that are numbers
        stored = rng.integers(0, 60, gguf.quant_shape_to_byte_shape(wanted.shape, code)).astype(np.uint8)
        wanted = gguf.dequantize(stored, code)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("blk.0.attn_q.weight", "output.weight"):
        writer.add_tensor(name, stored, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "m.gguf")
    config = {"model_type": "llama", "head_dim": 8, "hidden_size": 512, "num_attention_heads": 2}
    tensors = GgufTensors(tmp_path / "m.gguf", header, config)
    whole = np.empty((16, 512), np.float32)
    tensors.check("lm_head.weight", whole.shape)
    tensors.read_into("lm_head.weight", (slice(None), slice(None)), whole)
    np.testing.assert_array_equal(whole, gguf.dequantize(stored, code))
    np.testing.assert_allclose(whole, wanted, atol=0.3)  # half a step of four bits
    part = np.empty((5, 100), np.float32)
    tensors.read_into("model.layers.0.self_attn.q_proj.weight", (slice(6, 11), slice(200, 300)), part)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(part, whole[np.concatenate([order, order + 8])][6:11, 200:300])


def test_tensors_are_read_straight_onto_a_mesh(tmp_path):
    mesh = make_mesh(MeshConfig(data=2, layer=2, tensor=2), jax.devices()[:8])
    path = write_model(tmp_path / "m.gguf", "llama_bias")
    model, params, _ = from_pretrained(path, mesh=mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {mesh}
    assert model.config == twin("llama_bias")[0]
    chex.assert_trees_all_equal(params, twin("llama_bias")[1])


def test_scaling_of_llama_3_is_found_in_the_factors():
    """Llama 3.1 and 3.2: factors 8 and 32 over 8192 tokens."""
    for factor in (8.0, 32.0):
        rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
        for size in (64, 128):
            assert llama3_scaling(llama3_factors(rope | {"rope_theta": 5e5}, size), 5e5) == rope
    assert llama3_scaling(np.ones(32, np.float32), 5e5) is None
    other = llama3_factors(rope | {"high_freq_factor": 3.0, "rope_theta": 5e5}, 128)
    for factors in (other, np.linspace(1, 8, 32, dtype=np.float32), np.zeros(32, np.float32)):
        with pytest.raises(InputError, match=r"'rope_freqs.weight' holds factors"):
            llama3_scaling(factors, 5e5)


def test_what_is_not_known_is_named(tmp_path):
    for number, (change, word) in enumerate((
        ({"general.architecture": "mamba"}, "architecture 'mamba'; known are llama, qwen2"),
        ({"llama.expert_count": 8}, "'llama.expert_count' is 8, which is not known"),
        ({"llama.rope.dimension_count": 4}, "'llama.rope.dimension_count' is 4"),
        ({"llama.residual_scale": 0.5}, "'llama.residual_scale' is 0.5"),
        ({"llama.block_count": None}, "lacks the field 'llama.block_count'"),
        ({"llama.attention.head_count": 0}, "'llama.attention.head_count' is 0; it must be a whole number, 1 or more"),
        ({"llama.attention.key_length": 8.5}, "'llama.attention.key_length' is 8.5; it must be a whole number"),
        ({"llama.rope.freq_base": "1e4"}, "'llama.rope.freq_base' is '1e4'; it must be a number"),
        ({"llama.attention.head_count_kv": [2, 2, 2, 1]}, "head_count_kv' differs between layers"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"split.count": 2}, "one part of several; join them first with llama-gguf-split --merge"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'; known are gpt2 and llama, so give .* with --tokenizer"),
        ({"tokenizer.ggml.pre": "falcon"}, "into words as 'falcon' does; known are gpt-2, .* with --tokenizer"),
        ({"tokenizer.ggml.pre": None}, "into words as 'no name' does"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=word) as caught:
            import_model(write_model(tmp_path / f"{number}.gguf", "llama", change))
        assert "\n" not in str(caught.value)
    tensors = tensors_of("llama") | {"blk.0.ffn_gate_inp.weight": np.ones((2, 16))}
    with pytest.raises(InputError, match=r"holds the tensor 'blk.0.ffn_gate_inp.weight', which the model has no place"):
        import_model(write_gguf(tmp_path / "more.gguf", fields_of("llama") | VOCABULARY, tensors))
    wide = {"output_norm.weight": np.zeros(32), "token_embd.weight": np.zeros((40, 32))}
    path = write_gguf(tmp_path / "q.gguf", fields_of("llama") | VOCABULARY, tensors_of("llama") | wide, "F16")
    content = path.read_bytes()
    name = b"token_embd.weight" + struct.pack("<IQQ", 2, 32, 40)
    assert content.count(name + struct.pack("<I", 1)) == 1
    path.write_bytes(content.replace(name + struct.pack("<I", 1), name + struct.pack("<I", 20)))  # IQ4_NL
    with pytest.raises(InputError, match="is of type IQ4_NL; only F32, F16, .* can be read"):
        import_model(path)


def test_another_tokenizer_takes_the_place_of_one_that_is_not_known(tmp_path):
    from test_import import write_source

    source = write_source(tmp_path / "hf", vocab=40)
    path = write_model(tmp_path / "m.gguf", "llama", {"tokenizer.ggml.pre": "falcon"})
    assert import_model(path, str(source / "tokenizer.json")).tokenizer.name == "wordlevel-40"


def test_fields_of_the_wrong_type_are_refused(tmp_path):
    """Whatever a field holds: a sentence, or a model."""
    path = write_model(tmp_path / "m.gguf", "gemma3")
    header, num_refused = read_gguf_header(path), 0
    for key in header.fields:
        for value in ("x", 1.5, -1, True, [], ["a"], [1] * 40, float("nan")):
            fields = header.fields | {key: value}
            try:
                gguf_config(path, header._replace(fields=fields))
                gguf_tokenizer(fields)
                gguf_tokenizer_config(fields)
                gguf_ids(fields)
                gguf_templates(path, fields)
            except InputError as error:
                num_refused += 1
                assert "\n" not in str(error)
    assert num_refused > 100


def test_damaged_files_are_refused(tmp_path):
    """No length is believed: a file that promises 2**60 fields is refused at once."""
    whole = write_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"
    promises = [whole[:at] + struct.pack("<Q", 2**60) + whole[at + 8 :] for at in (8, 16, 24)]
    for content in (b"", b"GGUF", whole[:100], whole[:3000], whole[:-100], b"PK" + whole[2:], *promises):
        path.write_bytes(content)
        with pytest.raises(InputError, match="download it again") as caught:
            import_model(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(InputError, match="format version 50331648, little-endian 2 and 3 can be read"):
        import_model(path)
