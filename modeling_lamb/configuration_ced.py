"""Configuration of the CED audio encoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

# width and heads of the published sizes; all have 12 layers, 64 mel bins and 16 x 16 patches
CED_SIZES = {"tiny": (192, 3), "mini": (256, 4), "small": (384, 6), "base": (768, 12)}


@strict
class CedConfig(PreTrainedConfig):
    r"""
    Configuration of [`CedModel`], the Vision Transformer over log-mel patches of "CED: Consistent ensemble distillation
    for audio tagging" (Dinkel et al., ICASSP 2024). The defaults are CED-base.

    The field names of the Hub port (`embed_dim`, `depth`, `num_heads`, `n_mels`, `target_length`) are accepted too.

    Args:
        num_mel_bins (`int`): mel bins of the input, a multiple of `patch_size`.
        max_frames (`int`): frames of one window (1012 frames of 10 ms); longer clips are encoded window by window.
        patch_size (`int`): side and stride of a square patch, in mel bins and frames.
    """

    model_type = "ced"
    base_config_key = "audio_config"
    attribute_map = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "n_mels": "num_mel_bins",
        "target_length": "max_frames",
        "qkv_bias": "attention_bias",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    num_mel_bins: int = 64
    max_frames: int = 1012
    patch_size: int = 16
    attention_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.attribute_map.keys() & kwargs.keys():  # the port's names, before anything is derived from them
            setattr(self, name, kwargs.pop(name))
        mlp_ratio = kwargs.pop("mlp_ratio", 4.0)
        if self.intermediate_size is None:
            self.intermediate_size = int(self.hidden_size * mlp_ratio)
        for name in ("hidden_size", "num_attention_heads", "num_mel_bins", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into num_attention_heads="
                f"{self.num_attention_heads}: choose heads that divide it (CED uses {self.hidden_size // 64 or 1})."
            )
        if self.num_mel_bins % self.patch_size or self.max_frames < self.patch_size:
            raise ValueError(
                f"num_mel_bins={self.num_mel_bins} must be a multiple of patch_size={self.patch_size}, and max_frames="
                f"{self.max_frames} at least one patch."
            )
        super().__post_init__(**kwargs)

    @classmethod
    def of_size(cls, size: str, **kwargs: Any) -> "CedConfig":
        """The configuration of a published size: `tiny`, `mini`, `small` or `base`."""
        if size not in CED_SIZES:
            raise ValueError(f"CED has no size {size!r}; choose one of {', '.join(CED_SIZES)}.")
        hidden_size, heads = CED_SIZES[size]
        return cls(hidden_size=hidden_size, num_attention_heads=heads, **kwargs)


if "ced" not in CONFIG_MAPPING:  # beside the class, so that a Hub copy of this file knows it too
    AutoConfig.register("ced", CedConfig)

__all__ = ["CedConfig"]
