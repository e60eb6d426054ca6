"""Configuration of LAMB: the two backbones, the adapter, the aligner, the Token Guide and the objective."""

import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.hub import resolve_revision

from .configuration_ced import CedConfig  # registers the model type of the default encoder
from .packaged_backbone import PREFIX, resolve_backbone


@strict
class LambConfig(PreTrainedConfig):
    r"""
    Configuration of [`LambForAudioCaptioning`] ("LAMB: LLM-based Audio Captioning with Modality Gap Bridging via
    Cauchy-Schwarz Divergence"). The defaults are the paper's; where it gives no value, the docstring says "ours".

    Args:
        audio_config: the encoder's configuration: CED (default), Whisper, AST or MobileNetV1 (YAMNet).
        text_config: any causal LM's configuration (default: Llama).
        audio_model_id, text_model_id (`str`, *optional*): folder or Hub id of the frozen backbone's weights. A backbone
            that is named here, and of which no weight trains, is left out of saved checkpoints and read from there on
            loading.
        audio_model_revision, text_model_revision (`str`, *optional*): commit, tag or branch of the above.
        freeze_audio_encoder, freeze_text_model (`bool`): keep the backbone's own weights fixed; LoRA still trains.
        num_trained_audio_layers (`int`): last layers of a frozen encoder that train all the same (ours: 0).
        peft_config, audio_peft_config (`dict`, *optional*): arguments of `peft.LoraConfig` for the LLM and the encoder,
            for example `{"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}`.
        audio_token_id (`int`): id of the audio placeholder in `input_ids`. It is never looked up in the LLM's table
            and may lie beyond its end.
        adapter_type: `two_stream` (Eq. 1-4), or Table 2's baselines `linear` and `qformer`.
        adapter_hidden_size (`int`, *optional*): width of the adapter, reached by a Linear, GELU and LayerNorm (ours); None
            takes the encoder's.
        adapter_num_attention_heads (`int`, *optional*): H of Eq. 1; None gives heads of size 64 (ours).
        num_semantic_queries, num_temporal_queries (`int`): N_s and N_t; 0 leaves that stream out.
        num_audio_tokens (`int`): N_g, the number of audio embeddings and of placeholders per clip.
        conv_kernel_sizes, gru_num_layers: the temporal stream's front-end (kernel sizes are ours).
        qformer_num_layers (`int`): layers of the Q-Former baseline.
        kernel_space: where Eq. 6, 7 and 9 measure: `normalized` (unit vectors), `centred` (running mean of the text side
            subtracted, then unit) or `raw` (ours).
        kernel_width: sigma of the Gaussian kernel, or `"median"` for the median pairwise distance of each batch (ours).
        info_nce_temperature (`float`): tau of Eq. 9 (ours).
        cs_global_weight, cs_token_weight, info_nce_weight: alpha_1, alpha_2, alpha_3 of Eq. 10 (ours: 1).
        alignment_weight, guided_loss_weight, decoder_loss_weight: lambda_1, lambda_2, lambda_3 of Eq. 14 (ours: 1).
        guide_metric: distance of the Token Guide: `l2` (squared, Eq. 12), `l1`, `cosine`, or `none` for no guide.
        guide_weight_init (`float`): start of the learnable beta of Eq. 12 (ours).
    """

    model_type = "lamb"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type=CedConfig.model_type),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    # True where the package is installed and `pipeline` knows the task; false in a Hub copy of this file
    pipeline_is_registered: ClassVar[bool] = False

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_model_id: str | None = None
    audio_model_revision: str | None = None
    text_model_id: str | None = None
    text_model_revision: str | None = None
    freeze_audio_encoder: bool = True
    freeze_text_model: bool = True
    num_trained_audio_layers: int = 0
    peft_config: dict | None = None
    audio_peft_config: dict | None = None
    audio_token_id: int = 32000

    adapter_type: Literal["two_stream", "linear", "qformer"] = "two_stream"
    adapter_hidden_size: int | None = None
    adapter_num_attention_heads: int | None = None
    num_semantic_queries: int = 8
    num_temporal_queries: int = 8
    num_audio_tokens: int = 32
    conv_kernel_sizes: list[int] | tuple[int, ...] = (3, 5, 7)
    gru_num_layers: int = 2
    qformer_num_layers: int = 2

    kernel_space: Literal["normalized", "centred", "raw"] = "normalized"
    kernel_width: float | int | str = 1.0
    info_nce_temperature: float = 0.07
    cs_global_weight: float | int = 1.0
    cs_token_weight: float | int = 1.0
    info_nce_weight: float | int = 1.0
    alignment_weight: float | int = 1.0
    guided_loss_weight: float | int = 1.0
    decoder_loss_weight: float | int = 1.0
    guide_metric: Literal["l2", "l1", "cosine", "none"] = "l2"
    guide_weight_init: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pipeline_is_registered:  # else `pipeline` would ask to trust the repo's copy of what is installed
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.conv_kernel_sizes = list(self.conv_kernel_sizes)
        self._check()

    def _check(self) -> None:
        for name, least in (
            ("num_trained_audio_layers", 0),
            ("num_audio_tokens", 1),
            ("num_semantic_queries", 0),
            ("num_temporal_queries", 0),
            ("gru_num_layers", 1),
            ("qformer_num_layers", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.adapter_num_attention_heads is not None and self.adapter_num_attention_heads < 1:
            raise ValueError(f"adapter_num_attention_heads={self.adapter_num_attention_heads} must be at least 1.")
        width, heads = self.adapter_hidden_size or self.audio_hidden_size, self.adapter_heads
        if width % heads:
            raise ValueError(
                f"The adapter's width {width} does not divide into adapter_num_attention_heads={heads}: choose heads that "
                "divide it, or another adapter_hidden_size."
            )
        if width % 2:
            raise ValueError(f"The adapter's width {width} must be even: each GRU direction takes one half of it.")
        if self.adapter_type == "two_stream" and self.num_semantic_queries + self.num_temporal_queries < 1:
            raise ValueError("Both streams are off: set num_semantic_queries or num_temporal_queries above 0.")
        if not self.conv_kernel_sizes or any(size < 1 or size % 2 == 0 for size in self.conv_kernel_sizes):
            raise ValueError(
                f"conv_kernel_sizes={self.conv_kernel_sizes} must be odd numbers, to keep the length of the audio."
            )
        if self.kernel_width != "median" and not (
            isinstance(self.kernel_width, (int, float)) and self.kernel_width > 0
        ):
            raise ValueError(f"kernel_width={self.kernel_width!r} must be a positive number or 'median'.")
        if not 0 < self.info_nce_temperature < math.inf:
            raise ValueError(f"info_nce_temperature={self.info_nce_temperature} must be a positive number.")
        if not math.isfinite(self.guide_weight_init):
            raise ValueError(f"guide_weight_init={self.guide_weight_init} must be a finite number.")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["custom_pipelines"] = {
            "audio-captioning": {
                "impl": "pipeline_audio_captioning.AudioCaptioningPipeline",
                "pt": ["AutoModel"],
                "type": "multimodal",
            }
        }
        if "AutoModel" in (auto_map := output.get("auto_map") or {}):
            output["auto_map"] = auto_map | {"AutoModelForMultimodalLM": auto_map["AutoModel"]}
        return output

    @property
    def audio_hidden_size(self) -> int:
        """D, the width of the encoder's tokens."""
        config: Any = self.audio_config
        if config.model_type == "mobilenet_v1":
            return max(int(1024 * config.depth_multiplier), config.min_depth)
        return config.hidden_size

    @property
    def trained_backbones(self) -> set[str]:
        """Backbones of which weights of their own train, not LoRA alone: they are no longer what their id names."""
        audio = not self.freeze_audio_encoder or self.num_trained_audio_layers
        return ({"audio_encoder"} if audio else set()) | (set() if self.freeze_text_model else {"language_model"})

    @property
    def adapter_heads(self) -> int:
        """H of Eq. 1."""
        return self.adapter_num_attention_heads or max(1, (self.adapter_hidden_size or self.audio_hidden_size) // 64)

    @classmethod
    def from_backbones(
        cls,
        audio_model_id: str,
        text_model_id: str,
        audio_model_revision: str | None = None,
        text_model_revision: str | None = None,
        **kwargs: Any,
    ) -> "LambConfig":
        """
        The configuration of a model made of two published backbones.

        Args:
            audio_model_id, text_model_id: folders or Hub ids.
            audio_model_revision, text_model_revision: commit, tag or branch of each; the configuration keeps the commit
                that it stands for now, so that whoever loads a small checkpoint gets the same backbones.
            kwargs: the other fields of [`LambConfig`]; without `audio_token_id`, the first id beyond the LLM's table.
        """
        audio_model_revision = _commit(audio_model_id, audio_model_revision)
        text_model_revision = _commit(text_model_id, text_model_revision)
        audio, _ = PreTrainedConfig.get_config_dict(audio_model_id, revision=audio_model_revision)
        text_config = AutoConfig.from_pretrained(resolve_backbone(text_model_id), revision=text_model_revision)
        text_config._name_or_path = text_model_id  # not the folder of this machine in which it lies
        kwargs.setdefault("audio_token_id", text_config.get_text_config().vocab_size)
        return cls(
            audio_config=audio,
            text_config=text_config,
            audio_model_id=audio_model_id,
            audio_model_revision=audio_model_revision,
            text_model_id=text_model_id,
            text_model_revision=text_model_revision,
            **kwargs,
        )


def _commit(model_id: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a Hub id stands for; a folder's revision as it is."""
    if model_id.startswith(PREFIX):
        return revision
    resolved = resolve_revision(model_id, revision)
    return getattr(resolved, "resolved", resolved)


__all__ = ["LambConfig"]
