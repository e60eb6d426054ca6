"""One door for every audio encoder: log-mel features and mask in, a time grid of tokens and its mask out."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .modeling_ced import CedModel, convert_ced_state_dict

# YAMNet's patches: 96 frames (0.96 s) of 64 mel bands every 48 frames
PATCH_FRAMES, PATCH_HOP, PATCH_BANDS = 96, 48, 64
# Of each family, where its layers are and what follows them; MobileNet's come in pairs, depthwise and pointwise
_LAYERS = {
    "ced": ("blocks", "norm"),
    "whisper": ("layers", "layer_norm"),
    "audio-spectrogram-transformer": ("layers", "layernorm"),
    "mobilenet_v1": ("layer", None),
}


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


def last_layers(encoder: PreTrainedModel, count: int) -> list[nn.Module]:
    """
    The last `count` layers of an encoder, and the norm that follows them where there is one; none for 0.

    Raises:
        ValueError: when it has fewer.
    """
    name, norm = _LAYERS[encoder.config.model_type]
    layers: Any = encoder.get_submodule(name)
    size = 2 if encoder.config.model_type == "mobilenet_v1" else 1
    if not 0 <= count * size <= len(layers):
        raise ValueError(
            f"num_trained_audio_layers={count} must be from 0 to the encoder's {len(layers) // size} layers."
        )
    if not count:
        return []
    return [*layers[-count * size :], *([encoder.get_submodule(norm)] if norm else [])]


def encode_frozen_part(
    encoder: Any, features: Tensor, mask: Tensor | None, trained_layers: int = 0
) -> tuple[Tensor, Tensor]:
    """
    What does not change while the last `trained_layers` layers train, for [`encode_rest`] to go on from.

    Returns:
        Hidden states `(batch, steps, positions, channels)` (without trained layers the tokens of [`encode_audio`]), and a
        mask `(batch, steps)`, true at real steps.

    Raises:
        ValueError: for trained layers of an encoder whose layers mix the steps of a clip, which MobileNet's do not.
    """
    if not trained_layers:
        tokens, mask, _ = encode_audio(encoder, features, mask)
        return tokens, mask
    _check_steps_are_separate(encoder, trained_layers)
    images, mask = _patches(features, mask)
    maps = encoder.conv_stem(images.to(encoder.dtype))
    for layer in encoder.layer[: -len(last_layers(encoder, trained_layers))]:
        maps = layer(maps)
    return maps.flatten(2).mT.unflatten(0, tuple(mask.shape)), mask


def encode_rest(encoder: PreTrainedModel, hidden_states: Tensor, mask: Tensor, trained_layers: int) -> Tensor:
    """
    The tokens `(batch, steps, bands, hidden)` that the trained layers make of [`encode_frozen_part`]'s hidden states, with
    its errors. Without trained layers these are the tokens already.
    """
    if not trained_layers:
        return hidden_states
    _check_steps_are_separate(encoder, trained_layers)
    real = hidden_states[mask].to(encoder.dtype).mT  # (real steps, channels, positions)
    height = round((real.shape[-1] * PATCH_FRAMES / PATCH_BANDS) ** 0.5)  # at every layer in a patch's own proportions
    maps = real.unflatten(-1, (height, -1))
    for layer in last_layers(encoder, trained_layers):
        maps = layer(maps)
    tokens = maps.flatten(2).mT
    return tokens.new_zeros(*mask.shape, *tokens.shape[1:]).masked_scatter(mask[..., None, None], tokens)


def _check_steps_are_separate(encoder: PreTrainedModel, trained_layers: int) -> None:
    if encoder.config.model_type != "mobilenet_v1":
        raise ValueError(
            f"The hidden states of {encoder.config.model_type} cannot be kept while num_trained_audio_layers="
            f"{trained_layers} of its layers train: set it to 0, or set cache_encoder_tokens to false."
        )


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
    images, mask = _patches(features, mask)
    output = encoder(images.to(encoder.dtype), **kwargs)
    return output.last_hidden_state.flatten(2).mT.unflatten(0, tuple(mask.shape)), mask, output


def _patches(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """YAMNet's images `(batch * steps, 1, 96, mel)`, and which steps are real."""
    patches = features.unfold(2, PATCH_FRAMES, PATCH_HOP)  # (batch, mel, steps, 96)
    images = patches.permute(0, 2, 3, 1).flatten(0, 1)[:, None]
    real = -(-(_lengths(features, mask) - PATCH_FRAMES) // PATCH_HOP) + 1  # the last patch may be partly padding
    return images, _prefix_mask(real.clamp(min=1), patches.shape[2])


_GRIDS = {
    "ced": _ced_grid,
    "whisper": _whisper_grid,
    "audio-spectrogram-transformer": _ast_grid,
    "mobilenet_v1": _mobilenet_grid,
}
