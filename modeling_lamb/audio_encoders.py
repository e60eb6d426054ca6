"""One door for every audio encoder: log-mel features and mask in, a time grid of tokens and its mask out."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .modeling_ced import CedModel, convert_ced_state_dict

# YAMNet's patches: 96 frames (0.96 s) every 48 frames
PATCH_FRAMES, PATCH_HOP = 96, 48


def build_audio_encoder(config: Any) -> PreTrainedModel:
    """
    The encoder of an `audio_config`, with random weights.

    Raises:
        ValueError: for a model that [`encode_audio`] cannot read.
    """
    if config.model_type not in _GRIDS:
        raise ValueError(
            f"audio_config has model_type {config.model_type!r}; LAMB reads the tokens of {', '.join(_GRIDS)}."
        )
    if config.model_type == "ced":
        return CedModel._from_config(config)
    if config.model_type == "whisper":
        return WhisperEncoder._from_config(config)
    return AutoModel.from_config(config)


def audio_backbone_state_dict(config: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's state dict with the names that the encoder of [`build_audio_encoder`] has."""
    if config.model_type == "ced":
        return convert_ced_state_dict(state_dict)
    if config.model_type == "whisper":
        return {
            key.removeprefix("model.").removeprefix("encoder."): value
            for key, value in state_dict.items()
            if ".decoder." not in f".{key}" and "proj_out." not in key
        }
    prefix = {"audio-spectrogram-transformer": "audio_spectrogram_transformer.", "mobilenet_v1": "mobilenet_v1."}
    heads = ("classifier.", "pooler.")
    return {
        key.removeprefix(prefix[config.model_type]): value
        for key, value in state_dict.items()
        if not key.startswith(heads)
    }


def encode_audio(encoder: PreTrainedModel, features: Any, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor, Any]:
    """
    Args:
        encoder: from [`build_audio_encoder`].
        features: as the encoder's feature extractor gives them: `(batch, mel, frames)`, for AST `(batch, frames, mel)`.
        mask: `(batch, frames)`, 1 at real frames, which come first; None if all are.

    Returns:
        Tokens `(batch, steps, bands, hidden)` in time order, a mask `(batch, steps)`, true at real steps, and the encoder's
        own output.
    """
    return _GRIDS[encoder.config.model_type](encoder, features, mask, **kwargs)


def _prefix_mask(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _lengths(features: Tensor, mask: Tensor | None, frame_dim: int = -1) -> Tensor:
    if mask is not None:
        return mask.sum(-1)
    return torch.full((features.shape[0],), features.shape[frame_dim], device=features.device)


def _ced_grid(encoder: PreTrainedModel, features: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor, Any]:
    output = encoder(features, mask, **kwargs)
    bands = encoder.config.num_mel_bins // encoder.config.patch_size
    tokens = output.last_hidden_state.unflatten(1, (-1, bands))
    return tokens, output.attention_mask[:, ::bands].bool(), output


def _whisper_grid(
    encoder: PreTrainedModel, features: Tensor, mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor, Any]:
    output = encoder(features.to(encoder.dtype), **kwargs)
    tokens = output.last_hidden_state
    steps = (_lengths(features, mask) + 1) // 2  # its second convolution halves the 100 frames a second
    return tokens[:, :, None], _prefix_mask(steps, tokens.shape[1]), output


def _ast_grid(encoder: PreTrainedModel, features: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor, Any]:
    config = encoder.config
    output = encoder(features.to(encoder.dtype), **kwargs)
    tokens = output.last_hidden_state[:, 2:]  # without [CLS] and distillation
    bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    tokens = tokens.unflatten(1, (bands, -1)).transpose(1, 2)  # AST's tokens are frequency-major
    steps = (_lengths(features, mask, 1) - config.patch_size) // config.time_stride + 1
    return tokens, _prefix_mask(steps.clamp(min=1), tokens.shape[1]), output


def _mobilenet_grid(
    encoder: PreTrainedModel, features: Tensor, mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor, Any]:
    """A step is a patch of 0.96 s, its bands are the positions of the last feature map (3 in time x 2 in frequency)."""
    patches = features.unfold(2, PATCH_FRAMES, PATCH_HOP)  # (batch, mel, steps, 96)
    batch, _, steps, _ = patches.shape
    images = patches.permute(0, 2, 3, 1).flatten(0, 1)[:, None]  # (batch * steps, 1, 96, mel)
    output = encoder(images.to(encoder.dtype), **kwargs)
    tokens = output.last_hidden_state.flatten(2).mT
    real = -(-(_lengths(features, mask) - PATCH_FRAMES) // PATCH_HOP) + 1  # the last patch may be partly padding
    return tokens.unflatten(0, (batch, steps)), _prefix_mask(real.clamp(min=1), steps), output


_GRIDS = {
    "ced": _ced_grid,
    "whisper": _whisper_grid,
    "audio-spectrogram-transformer": _ast_grid,
    "mobilenet_v1": _mobilenet_grid,
}
