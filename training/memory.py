"""What a training step needs in memory, from the configuration alone: no weights are made or read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling_lamb import LambConfig, LambForAudioCaptioning
from modeling_lamb.audio_encoders import PATCH_BANDS, PATCH_FRAMES, encode_audio

OPTIMIZER_BYTES = 8  # AdamW's two float32 moments
GIB = 2**30


@dataclass
class MemoryEstimate:
    """
    Bytes on one GPU by part, and how ZeRO's stages divide them.

    Args:
        frozen_weights, trained_weights, gradients, optimizer: by their parameters; what is trained is float32.
        activations: tensors that autograd keeps for the backward pass.
        logits: those of the caption's positions, their gradient, and the guide's scores over the vocabulary.
        trainable: parameters by part.
    """

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    trainable: dict[str, int]

    def total(self, zero_stage: int = 0, ranks: int = 1) -> int:
        """Bytes a GPU under a ZeRO stage: 1 shards the optimizer's state, 2 also the gradients, 3 also the weights."""
        share = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
        weights = (self.frozen_weights + self.trained_weights) / share[2]
        return round(weights + self.optimizer / share[0] + self.gradients / share[1] + self.activations + self.logits)


def estimate_memory(
    config: LambConfig,
    batch_size: int,
    seconds: float = 10.0,
    text_tokens: int = 40,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    alignment_only: bool = False,
) -> MemoryEstimate:
    """
    The memory of one step on one GPU.

    Encoder, adapter and LLM are run on torch's meta device, and what autograd keeps is counted.

    Args:
        config: of the model, with its LoRA.
        batch_size: clips on the GPU at a time.
        seconds: of audio a clip.
        text_tokens: of prompt, caption and EOS together.
        dtype: of the frozen weights and of the activations.
        gradient_checkpointing: keep only each layer's input, and one layer's inside.
        alignment_only: the LLM is not run.
    """
    with torch.device("meta"):
        model: Any = LambForAudioCaptioning(config)
    model = model.to(dtype).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if alignment_only:
        trained = {name: p for name, p in trained.items() if name.startswith(("adapter.", "audio_encoder."))}
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in trained.values())
    count = sum(p.numel() for p in trained.values())
    parts: dict[str, int] = {}
    for name, parameter in trained.items():
        part = "lora" if "lora_" in name else name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()

    width = model.get_input_embeddings().embedding_dim
    vocabulary = model.get_output_embeddings().weight.shape[0]
    features = _features(config.audio_config, batch_size, seconds, dtype)
    (tokens, mask, _), kept = _run(model.audio_encoder, lambda: encode_audio(model.audio_encoder, features, None))
    tokens, mask = (part.detach().reshape(batch_size, -1, *part.shape[2:]) for part in (tokens, mask))
    kept += _run(model.adapter, lambda: model.adapter(tokens, mask))[1]
    logits = 0
    if not alignment_only:
        length = config.num_audio_tokens + text_tokens
        embeds = torch.empty(batch_size, length, width, dtype=dtype, device="meta", requires_grad=True)
        # a whole mask, because a short one is looked into, which the meta device cannot
        causal = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta")
        inputs = {"inputs_embeds": embeds, "attention_mask": causal, "use_cache": False}
        _, inner = _run(model.language_model, lambda: model.get_decoder()(**inputs).last_hidden_state)
        if gradient_checkpointing:
            layers = config.get_text_config().num_hidden_layers
            inner = layers * embeds.numel() * embeds.element_size() + inner // layers
        kept += inner
        size = torch.empty((), dtype=dtype).element_size()
        logits = batch_size * vocabulary * (2 * size * text_tokens + 3 * 4)  # scores, bias and its gradient in float32
        if dtype != torch.float32 and config.guide_metric != "none":
            logits += vocabulary * width * 4  # the table in float32, where distances are measured
    return MemoryEstimate(
        frozen_weights=frozen * torch.empty((), dtype=dtype).element_size(),
        trained_weights=4 * count,
        gradients=4 * count,
        optimizer=OPTIMIZER_BYTES * count,
        activations=kept,
        logits=logits,
        trainable=parts,
    )


def _features(audio: Any, batch: int, seconds: float, dtype: torch.dtype) -> Tensor:
    """
    Log-mel features of the size that the encoder reads: Whisper and AST pad to a length of their own, and CED, which reads
    longer clips in windows, gets the windows as clips.
    """
    frames = max(PATCH_FRAMES, round(100 * seconds))
    if audio.model_type == "ced" and frames > audio.max_frames:
        batch, frames = batch * -(-frames // audio.max_frames), audio.max_frames
    shape = {
        "ced": lambda: (audio.num_mel_bins, frames),
        "whisper": lambda: (audio.num_mel_bins, 2 * audio.max_source_positions),
        "audio-spectrogram-transformer": lambda: (audio.max_length, audio.num_mel_bins),
        "mobilenet_v1": lambda: (PATCH_BANDS, frames),
    }[audio.model_type]()
    return torch.empty(batch, *shape, dtype=dtype, device="meta")


def _run(module: nn.Module, forward: Callable[[], Any]) -> tuple[Any, int]:
    """What `forward` gives, and the bytes that autograd keeps of it, each storage once and without the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, lest a storage's address is used again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
