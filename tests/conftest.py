"""Tiny models, tokenizers and sounds, made in code: no network, no GPU."""

import csv
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from training_lamb.convert_yamnet import yamnet_feature_extractor
from transformers import ASTFeatureExtractor, LlamaConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

from modeling_lamb import LambConfig, LambFeatureExtractor, LambForAudioCaptioning, LambProcessor

CAPTIONS = [
    "A dog barks twice in the distance.",
    "Rain falls on a tin roof while thunder rolls.",
    "A man speaks, then a door slams shut.",
    "Birds chirp and a rooster crows on a farm.",
]
VOCAB_SIZE = 369  # of the tokenizer below; the placeholder takes the id after it, beyond the LLM's table
PROMPTS = ["USER: Describe the audio you hear.\nASSISTANT:"]

torch.set_num_threads(1)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# audio_config of every encoder family, and the feature extractor that goes with it; Whisper's and AST's windows are 1 s
ENCODERS = {
    "ced": ({"model_type": "ced", **TINY}, LambFeatureExtractor),
    "whisper": (
        {
            "model_type": "whisper",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64,
            "max_source_positions": 50,
            "num_mel_bins": 80,
            "vocab_size": 100,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        lambda: WhisperFeatureExtractor(chunk_length=1),
    ),
    "ast": (
        {"model_type": "audio-spectrogram-transformer", **TINY, "intermediate_size": 64, "max_length": 100},
        lambda: ASTFeatureExtractor(max_length=100),
    ),
    "mobilenet": (
        {"model_type": "mobilenet_v1", "num_channels": 1, "depth_multiplier": 0.125, "hidden_act": "relu"},
        yamnet_feature_extractor,
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CAPTIONS * 4 + PROMPTS * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(trained: str) -> PreTrainedTokenizerFast:
    """The tokenizer of [`tokenizer_json`]'s text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def trained_tokenizer() -> str:
    return tokenizer_json()


@pytest.fixture
def tokenizer(trained_tokenizer) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(trained_tokenizer)


@pytest.fixture
def processor(tokenizer) -> LambProcessor:
    return LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=4)


def tiny_text_config(vocab_size: int = VOCAB_SIZE, **kwargs) -> LlamaConfig:
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | kwargs))


# text_config of every kind of decoder: untied, tied, with scaled embeddings, with Conv1D layers; and what LoRA adapts
SMALL = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = SMALL | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
DECODERS = {
    "llama": ({"model_type": "llama", **ROTARY}, ["q_proj", "v_proj"]),
    "qwen3": ({"model_type": "qwen3", **ROTARY, "tie_word_embeddings": True}, ["q_proj", "v_proj"]),
    "gemma": ({"model_type": "gemma", **ROTARY}, ["q_proj", "v_proj"]),
    "gemma3": ({"model_type": "gemma3_text", **ROTARY, "sliding_window": 16}, ["q_proj", "v_proj"]),
    "gpt2": ({"model_type": "gpt2", **SMALL, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}, ["c_attn"]),
}


def tiny_config(**kwargs) -> LambConfig:
    settings = {
        "audio_config": {"model_type": "ced", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "text_config": tiny_text_config(),
        "audio_token_id": VOCAB_SIZE,
        "num_audio_tokens": 4,
        "num_semantic_queries": 3,
        "num_temporal_queries": 2,
        "peft_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    }
    return LambConfig(**(settings | kwargs))


@pytest.fixture
def config() -> LambConfig:
    return tiny_config()


@pytest.fixture
def model(config) -> LambForAudioCaptioning:
    return randomized(LambForAudioCaptioning(config)).eval()


def randomized(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Weights large enough that no term of a comparison is lost in rounding; LoRA's B among them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "lora" in name:
                parameter.normal_(0, std, generator=generator)
    return model


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise with a moving tone, 16 kHz."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    tone = np.sin(2 * np.pi * (200 + 150 * seed) * time * (1 + time / 10))
    return (0.3 * tone + 0.05 * generator.standard_normal(len(time))).astype(np.float32)


def write_table(file: Path, rows: list[tuple], columns: tuple[str, ...] = ("file_name", "caption")) -> Path:
    """A csv file with a header."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file
