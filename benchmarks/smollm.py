"""The shape of SmolLM2-135M, the LLM that the benchmarks run with random weights."""

from transformers import LlamaConfig

VOCABULARY = 49152


def smollm_config(**kwargs) -> LlamaConfig:
    """Its configuration, with `kwargs` laid over it."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**shape | kwargs)
