"""CED audio encoder: a Vision Transformer over 16 x 16 patches of a log-mel spectrogram (Dinkel et al., ICASSP 2024)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import (
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ced import CedConfig


@dataclass
class CedModelOutput(ModelOutput):
    """
    Output of [`CedModel`].

    Args:
        last_hidden_state: patch tokens `(batch, steps * bands, hidden_size)`, time-major: token `t * bands + f`.
        attention_mask: `(batch, steps * bands)`, 1 where a token lies wholly within its clip.
        hidden_states, attentions: of every layer and window, `(batch * windows, tokens, ...)`.
    """

    last_hidden_state: Tensor | None = None
    attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CedAttention(nn.Module):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class CedMLP(nn.Module):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class CedLayer(GradientCheckpointingLayer):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = CedAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CedMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        attended, _ = self.attn(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))


class CedPatchEmbeddings(nn.Module):
    """BatchNorm over the mel bins, patches, and separate position embeddings of time and frequency."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        patch, width = config.patch_size, config.hidden_size
        self.init_bn = nn.BatchNorm2d(config.num_mel_bins, momentum=0.01)
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.time_pos_embed = nn.Parameter(torch.empty(1, width, 1, config.max_frames // patch))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, width, config.num_mel_bins // patch, 1))

    def forward(self, input_features: Tensor) -> Tensor:
        """`(batch, mel, frames)` -> `(batch, steps * bands, hidden_size)`, time-major."""
        normalized = self.init_bn(input_features[:, :, None]).transpose(1, 2)  # (batch, 1, mel, frames)
        patches = self.proj(normalized)  # (batch, hidden, bands, steps)
        patches = patches + self.time_pos_embed[..., : patches.shape[-1]] + self.freq_pos_embed
        return patches.permute(0, 3, 2, 1).flatten(1, 2)


class CedPreTrainedModel(PreTrainedModel):
    config: CedConfig
    base_model_prefix = "ced"
    main_input_name = "input_features"
    input_modalities = ["audio"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CedPatchEmbeddings", "CedLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CedLayer, "attentions": CedAttention}
    _input_embed_layer = "patch_embed"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CedPatchEmbeddings):
            init.normal_(module.time_pos_embed, std=self.config.initializer_range)
            init.normal_(module.freq_pos_embed, std=self.config.initializer_range)


class CedModel(CedPreTrainedModel):
    """
    CED encoder: log-mel features to patch tokens.

    A clip longer than the window (`config.max_frames`) is cut into windows that are encoded one by one and laid end to
    end in time, clip by clip. Frames that do not fill a patch are left out, as in the original; padded frames are
    masked, so that a clip's tokens do not depend on what else is in the batch.

    Two differences from the published ports are meant: the tokens are in time-major order (theirs are
    frequency-major, `f * steps + t`), and the last, shorter window is masked instead of filled with zeros.
    """

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        self.patch_embed = CedPatchEmbeddings(config)
        self.blocks = nn.ModuleList(CedLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):  # type: ignore[override]
        # Private, but the one place where every way of loading meets: the published files name and fuse things otherwise.
        if state_dict is None and checkpoint_files:
            state_dict = {key: value for file in checkpoint_files for key, value in load_file(file).items()}
        if state_dict:
            state_dict = convert_ced_state_dict(state_dict)
        return PreTrainedModel._load_pretrained_model(model, state_dict, None, load_config, *args, **kwargs)

    def count_steps(self, frames: Tensor) -> Tensor:
        """Time steps (columns of patches) that clips of so many `frames` have: whole patches of each window."""
        window, patch = self.config.max_frames, self.config.patch_size
        return frames // window * (window // patch) + frames % window // patch

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CedModelOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, num_mel_bins, frames)`): log-mel in dB.
            input_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 at real frames, which come
                first.

        Raises:
            ValueError: when the mel bins are not the model's, or a clip is shorter than one patch.
        """
        batch, mel_bins, frames = input_features.shape
        window, patch = self.config.max_frames, self.config.patch_size
        if mel_bins != self.config.num_mel_bins or frames < patch:
            raise ValueError(
                f"CedModel expects features of shape (batch, {self.config.num_mel_bins}, at least {patch} frames), got "
                f"{tuple(input_features.shape)}: use the checkpoint's own feature extractor, on at least 0.15 s of audio."
            )
        if input_features_mask is None:
            lengths = torch.full((batch,), frames, device=input_features.device)
        else:
            lengths = input_features_mask.sum(-1)

        windows = -(-frames // window)
        if windows > 1:
            input_features = nn.functional.pad(input_features, (0, windows * window - frames))
            input_features = input_features.unflatten(2, (windows, window)).transpose(1, 2).flatten(0, 1)
        starts = torch.arange(windows, device=lengths.device) * window
        steps = (lengths[:, None] - starts).clamp(0, window) // patch  # (batch, windows): whole patches of each window

        hidden_states = self.patch_embed(input_features.to(self.dtype))
        bands = mel_bins // patch
        columns = hidden_states.shape[1] // bands
        valid = torch.arange(columns, device=steps.device) < steps[..., None]  # (batch, windows, columns)
        token_mask = valid.flatten(0, 1).repeat_interleave(bands, dim=1)
        # A window with no frame of its clip attends to its padding, or the softmax over nothing would be NaN.
        attendable = token_mask | ~token_mask.any(1, keepdim=True)
        padded = windows > 1 or input_features_mask is not None
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attendable if padded else None
        )
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, **kwargs)
        hidden_states = self.norm(hidden_states).unflatten(0, (batch, windows)).flatten(1, 2)
        return CedModelOutput(last_hidden_state=hidden_states, attention_mask=token_mask.view(batch, -1).int())


# name in the published files -> name in CedModel
_RENAMED = (
    (re.compile(r"^(init_bn)\.(?:1\.)?"), r"patch_embed.\1."),  # the original keeps BatchNorm second in a Sequential
    (re.compile(r"^(time_pos_embed|freq_pos_embed)$"), r"patch_embed.\1"),
    (re.compile(r"\.attn\.proj\."), ".attn.o_proj."),
)
_DROPPED = re.compile(r"^(outputlayer|front_end)\.")  # the tagging head and the fixed mel filters


def convert_ced_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    The state dict of [`CedModel`] from one of its own, of the Hub port (`encoder.*`) or of the original `.pt`.

    Raises:
        ValueError: on a key that is in none of the three, naming it.
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]  # the original may be wrapped
    with torch.device("meta"):
        known = set(CedModel(CedConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=1)).state_dict())
    converted: dict[str, Tensor] = {}
    for original, value in state_dict.items():
        key = original.removeprefix("encoder.")
        if _DROPPED.match(key):
            continue
        for pattern, replacement in _RENAMED:
            key = pattern.sub(replacement, key)
        if ".attn.qkv." in key:
            parts = {key.replace("qkv", f"{name}_proj"): part for name, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            parts = {key: value}
        for name in parts:
            if re.sub(r"^blocks\.\d+\.", "blocks.0.", name) not in known:
                raise ValueError(
                    f"{original!r} is not a weight of CED: expected the state dict of CedModel, of the Hub port "
                    "(keys 'encoder.*', 'outputlayer.*') or of the original .pt (keys 'blocks.*', 'front_end.*')."
                )
        converted |= parts
    return converted


__all__ = ["CedModel", "CedPreTrainedModel"]
