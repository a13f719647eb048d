"""Other people's models: a Hugging Face folder, a GGUF file or a nanochat checkpoint becomes a model here."""

from snlp_jax.pretrained.load import Imported, Pretrained, from_pretrained, import_model
