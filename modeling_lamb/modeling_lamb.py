"""LAMB: an audio encoder, the Two-Stream Adapter, the Cross-Modal Aligner, an LLM and the Token Guide."""

import copy
import inspect
import math
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers import initialization as init
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.processing_utils import Unpack
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.quantization_config import QuantizationConfigMixin

from .audio_encoders import audio_backbone_state_dict, build_audio_encoder, encode_audio, encode_rest, last_layers
from .caption_loss import caption_losses
from .configuration_lamb import LambConfig
from .cross_modal_aligner import CrossModalAligner, masked_mean
from .packaged_backbone import resolve_backbone
from .token_guide import TokenGuide, TokenGuideLogitsProcessor
from .two_stream_adapter import ADAPTERS, QFormerAdapter, QueryAttention, TwoStreamAdapter

logger = logging.get_logger(__name__)

# How the backbones of a small checkpoint are downloaded: as the checkpoint itself.
_download_options: ContextVar[dict[str, Any] | None] = ContextVar("download_options", default=None)

AUDIO_INPUTS = ("input_features", "input_features_mask", "audio_hidden_states", "audio_hidden_mask")
WAYS_TO_SEARCH = (
    "num_beams",
    "do_sample",
    "streamer",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
)
AUDIO_WITH_EMBEDS = (
    "Audio was given with inputs_embeds, which hold theirs already: give input_ids with placeholders instead, which the "
    "Token Guide needs as well."
)


@dataclass
class LambOutput(ModelOutput):
    """
    Output of [`LambForAudioCaptioning`]. The loss terms are unweighted scalars, present when `labels` are given.

    Args:
        loss: L_total (Eq. 14).
        decoder_loss, guided_loss: L_dec and L_tg, the cross-entropy of the original and of the guided logits (Eq. 13).
        alignment_loss: L_cma (Eq. 10), the weighted sum of the next three.
        cs_global_loss, cs_token_loss, info_nce_loss: the aligner's terms (Eq. 6-8).
        modality_gap, modality_cosine: mean distance and cosine of z_a_bar and z_t_bar (Table 2), without gradient.
        logits: unguided logits, `(batch, length, vocab_size)`; with `labels`, of the positions that predict them only.
        audio_embeds: z_a by row of `input_ids`, `(batch, placeholders, text_hidden)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    audio_embeds: Tensor | None = None
    decoder_loss: Tensor | None = None
    guided_loss: Tensor | None = None
    alignment_loss: Tensor | None = None
    cs_global_loss: Tensor | None = None
    cs_token_loss: Tensor | None = None
    info_nce_loss: Tensor | None = None
    modality_gap: Tensor | None = None
    modality_cosine: Tensor | None = None


class LambForAudioCaptioning(PreTrainedModel, GenerationMixin):
    """
    LAMB audio captioning model: `processor(audio=...)` in, caption tokens out of `generate`.

    Weights are saved *small* when the config names the backbones (`audio_model_id`, `text_model_id`): the adapter, LoRA,
    beta and whatever else was trained; a named, frozen backbone is read again from where it came. Otherwise, or with
    `save_pretrained(..., save_backbones=True)`, the checkpoint holds everything. `from_pretrained` takes either.
    """

    config: LambConfig
    audio_encoder: PreTrainedModel
    language_model: PreTrainedModel
    adapter: Any
    hf_quantizer: Any
    base_model_prefix = "lamb"
    input_modalities = ["audio", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["token_guide", "aligner"]
    _backbones = {"audio_encoder": "audio_model_id", "language_model": "text_model_id"}

    def __init__(self, config: LambConfig) -> None:
        super().__init__(config)
        self.audio_encoder = build_audio_encoder(config.audio_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if "past_key_values" not in inspect.signature(type(self.language_model).forward).parameters:
            raise ValueError(
                f"{config.get_text_config().model_type} keeps no key-value cache, which captions are written with: choose an LLM "
                "with attention as text_config."
            )
        text_hidden_size = self.get_input_embeddings().embedding_dim
        self.adapter = ADAPTERS[config.adapter_type](config, config.audio_hidden_size, text_hidden_size)
        self.aligner = CrossModalAligner(config, text_hidden_size)
        self.token_guide = TokenGuide(config)
        text_config = config.get_text_config()
        self.generation_config = GenerationConfig(
            bos_token_id=getattr(text_config, "bos_token_id", None),
            eos_token_id=getattr(text_config, "eos_token_id", None),
            pad_token_id=getattr(text_config, "pad_token_id", None),
        )
        if getattr(config, "quantization_config", None) is None:  # else onto the quantised layers, once they are there
            self._inject_lora()
        self.post_init()
        self.freeze_backbones()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As of every Transformers model. The LLM is then no longer the published one, and is saved with the checkpoint."""
        before = self.get_input_embeddings().num_embeddings
        table = super().resize_token_embeddings(*args, **kwargs)
        if table.num_embeddings != before and self.config.text_model_id is not None:
            logger.warning(f"The LLM no longer has the table of {self.config.text_model_id}; it will be saved whole.")
            self.config.text_model_id = self.config.text_model_revision = None
        return table

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def token_embeddings(self) -> Tensor:
        """v of Eq. 12, `(vocab_size, text_hidden)`: what the LLM looks up for every token."""
        table = self.get_input_embeddings()
        if type(table) is nn.Embedding and not hasattr(table.weight, "ds_id"):
            return table.weight
        # A scaled table (Gemma) or one that is sharded outside its own forward (ZeRO-3).
        return table(torch.arange(table.num_embeddings, device=str(self.device)))

    def freeze_backbones(self) -> None:
        """Fixes the backbones' own weights as the config says, and beta where nothing would train it."""
        for name, frozen in (
            ("audio_encoder", self.config.freeze_audio_encoder),
            ("language_model", self.config.freeze_text_model),
        ):
            for key, parameter in getattr(self, name).named_parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_("lora_" in key or not frozen)
        for layer in last_layers(self.audio_encoder, self.config.num_trained_audio_layers):
            layer.requires_grad_()
        guided = self.config.guide_metric != "none" and self.config.guided_loss_weight != 0
        self.token_guide.beta.requires_grad_(guided)

    def train(self, mode: bool = True) -> "LambForAudioCaptioning":
        """As in torch, except that the BatchNorm statistics and dropout of a frozen encoder stay as in evaluation."""
        super().train(mode)
        if mode and self.config.freeze_audio_encoder:
            for module in self.audio_encoder.modules():
                if self.config.audio_peft_config is None or isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
        return self

    def _inject_lora(self) -> None:
        for backbone, settings in (
            (self.language_model, self.config.peft_config),
            (self.audio_encoder, self.config.audio_peft_config),
        ):
            if settings is not None:
                from peft import LoraConfig, inject_adapter_in_model

                inject_adapter_in_model(LoraConfig(**settings), backbone)

    def merge_adapters(self) -> "LambForAudioCaptioning":
        """Adds the LoRA updates into the backbones' weights, for good; the model then saves as a full checkpoint."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for backbone, setting in (("language_model", "peft_config"), ("audio_encoder", "audio_peft_config")):
            parent = getattr(self, backbone)
            for name, module in list(parent.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    module.merge(safe_merge=True)
                    parent.set_submodule(name, module.get_base_layer())
            if getattr(self.config, setting) is not None:
                setattr(self.config, setting, None)
                setattr(self.config, self._backbones[backbone], None)  # its weights are no longer the published ones
        return self

    # -- audio to embeddings -------------------------------------------------------------------------------------------

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        audio_hidden_states: Tensor | None = None,
        audio_hidden_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_features: log-mel `(clips, mel, frames)`.
            input_features_mask: `(clips, frames)`, 1 at real frames.
            audio_hidden_states, audio_hidden_mask: instead of features, what `encode_frozen_part` computed of them before:
                the encoder's tokens `(clips, steps, bands, encoder_hidden)`, or with `num_trained_audio_layers` what these
                layers read, and `(clips, steps)`.

        Returns:
            `pooler_output`: z_a `(clips, num_audio_tokens, text_hidden)`; `last_hidden_state`: the encoder's tokens
            `(clips, steps * bands, encoder_hidden)`; `hidden_states` and `attentions`: the encoder's, on demand.
        """
        output: Any = None
        if audio_hidden_states is None:
            frozen = "audio_encoder" not in self.config.trained_backbones and self.config.audio_peft_config is None
            with torch.no_grad() if frozen else nullcontext():
                audio_hidden_states, audio_hidden_mask, output = encode_audio(
                    self.audio_encoder, input_features, input_features_mask, **kwargs
                )
        else:
            if audio_hidden_mask is None:
                audio_hidden_mask = audio_hidden_states.new_ones(audio_hidden_states.shape[:2])
            audio_hidden_states = encode_rest(
                self.audio_encoder, audio_hidden_states, audio_hidden_mask.bool(), self.config.num_trained_audio_layers
            )
        tokens = audio_hidden_states.to(self.adapter.output_proj.weight.dtype)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens.flatten(1, 2),
            pooler_output=self.adapter(tokens, audio_hidden_mask.bool()),
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def _embeds_by_row(self, audio_embeds: Tensor, input_ids: Tensor) -> Tensor:
        """z_a by clip `(clips, num_audio_tokens, D)` -> by row of input_ids `(batch, placeholders, D)`, zero-padded."""
        counts = (input_ids == self.config.audio_token_id).sum(1)
        clips, length, width = audio_embeds.shape
        torch_compilable_check(
            counts.sum() == clips * length,
            lambda: (
                f"input_ids hold {counts.tolist()} audio placeholders (id {self.config.audio_token_id}) by row, but there are "
                f"{clips} clips of {length} audio embeddings each: give {length} placeholders per clip, as the processor does."
            ),
        )
        if clips == len(counts) and (torch.compiler.is_compiling() or bool((counts == length).all())):
            return audio_embeds
        slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        rows = audio_embeds.new_zeros(*slots.shape, width)
        return rows.masked_scatter(slots[..., None], audio_embeds.flatten(0, 1))

    def _merge_embeds(self, input_ids: Tensor, audio_embeds: Tensor | None) -> Tensor:
        """Token embeddings with each row's z_a at its placeholders, `(batch, length, D)`."""
        is_audio = input_ids == self.config.audio_token_id
        # The placeholder's own id is never looked up: it may lie beyond the table.
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if audio_embeds is None:
            return inputs_embeds
        torch_compilable_check(
            is_audio.sum(1).max() == audio_embeds.shape[1],
            lambda: (
                f"audio_embeds of shape {tuple(audio_embeds.shape)} do not fit {is_audio.sum(1).tolist()} placeholders."
            ),
        )
        slot = (is_audio.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, audio_embeds.shape[-1])
        placed = audio_embeds.to(inputs_embeds.dtype).gather(1, slot)
        return torch.where(is_audio[..., None], placed, inputs_embeds)

    def _guide_bias(self, audio_embeds: Tensor, audio_mask: Tensor) -> Tensor | None:
        """Guide scores by row `(batch, vocab_size)`, 0 for rows without audio; None where the guide is off."""
        z_a_bar = masked_mean(audio_embeds, audio_mask)[:, None]
        scores = self.token_guide(z_a_bar, self.token_embeddings())
        return None if scores is None else scores * audio_mask.any(1, keepdim=True)

    # -- forward -------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_embeds: Tensor | None = None,
        audio_hidden_states: Tensor | None = None,
        audio_hidden_mask: Tensor | None = None,
        clip_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        alignment_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LambOutput:
        r"""
        Args:
            input_ids: `(batch, length)`, with `num_audio_tokens` placeholders for each clip.
            input_features: log-mel of all clips, in the order of their placeholders, `(clips, mel, frames)`.
            input_features_mask: `(clips, frames)`, 1 at real frames.
            labels: `(batch, length)`, the caption's tokens and EOS in their places, -100 elsewhere.
            audio_embeds: z_a by row, as this returns it, instead of features.
            audio_hidden_states, audio_hidden_mask: what the encoder gave before, as [`get_audio_features`] takes it.
            clip_ids: `(batch,)` integers; captions of one clip are not each other's negatives in InfoNCE.
            num_items_in_batch: caption tokens of all accumulated batches, from the Trainer.
            alignment_only: compute the aligner's losses and no logits, to train the adapter without running the LLM.

        Raises:
            ValueError: when placeholders and audio embeddings do not match, audio comes with inputs_embeds, or
                alignment_only without audio or labels.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if input_ids is None and any(
            audio is not None for audio in (input_features, audio_hidden_states, audio_embeds)
        ):
            raise ValueError(AUDIO_WITH_EMBEDS)
        if input_ids is not None:
            if input_features is not None or audio_hidden_states is not None:
                clips = self.get_audio_features(
                    input_features, input_features_mask, audio_hidden_states, audio_hidden_mask, return_dict=True
                ).pooler_output
                audio_embeds = self._embeds_by_row(clips, input_ids)
            elif (
                audio_embeds is None
                and not torch.compiler.is_compiling()  # a static cache's length would branch on data
                and (past_key_values is None or past_key_values.get_seq_length() == 0)
            ):
                torch_compilable_check(
                    (input_ids != self.config.audio_token_id).all(),
                    "input_ids hold audio placeholders, but no input_features were given.",
                )
            if alignment_only:
                return self._aligned(input_ids, audio_embeds, labels, clip_ids)
            inputs_embeds = self._merge_embeds(input_ids, audio_embeds)
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.audio_token_id, -100)  # no word to predict
            # Logits are computed only where some row has a label to predict.
            logits_to_keep = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]

        keep = {"logits_to_keep": logits_to_keep} if self._decoder_slices_logits else {}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **keep,
            **kwargs,
        )
        logits = outputs.logits
        if not keep and isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        losses: dict[str, Any] = {}
        if labels is not None:
            shifted = labels[:, 1:][:, logits_to_keep].to(logits.device)
            losses = self._losses(logits, shifted, labels, input_ids, audio_embeds, clip_ids, num_items_in_batch)
        return LambOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_embeds=audio_embeds,
            **losses,
        )

    def _aligned(
        self, input_ids: Tensor, audio_embeds: Tensor | None, labels: Tensor | None, clip_ids: Tensor | None
    ) -> LambOutput:
        if audio_embeds is None or labels is None:
            raise ValueError("alignment_only needs audio and labels: there is nothing else to align.")
        losses = self._alignment_losses(audio_embeds, self._audio_mask(input_ids, audio_embeds), labels, clip_ids)
        terms: dict[str, Any] = {"loss": self.config.alignment_weight * losses["alignment_loss"], **losses}
        return LambOutput(audio_embeds=audio_embeds, **terms)

    @property
    def _decoder_slices_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(type(self.language_model).forward).parameters

    def _audio_mask(self, input_ids: Tensor, audio_embeds: Tensor) -> Tensor:
        """True where a row's audio embeddings are its own and not padding, `(batch, placeholders)`."""
        counts = (input_ids == self.config.audio_token_id).sum(1)
        return torch.arange(audio_embeds.shape[1], device=counts.device) < counts[:, None]

    def _alignment_losses(
        self, audio_embeds: Tensor, audio_mask: Tensor, labels: Tensor, clip_ids: Tensor | None
    ) -> dict[str, Tensor]:
        caption_mask = labels != -100
        if self.generation_config.eos_token_id is not None:  # z_t is the caption itself, without EOS
            eos = torch.as_tensor(self.generation_config.eos_token_id, device=labels.device)
            caption_mask &= ~torch.isin(labels, eos)
        z_t = self.get_input_embeddings()(labels.masked_fill(~caption_mask, 0))
        losses = self.aligner(audio_embeds, z_t, caption_mask, audio_mask, clip_ids)
        weights = {
            "cs_global_loss": self.config.cs_global_weight,
            "cs_token_loss": self.config.cs_token_weight,
            "info_nce_loss": self.config.info_nce_weight,
        }
        # A term of weight 0 is left out: were it NaN, 0 times it would be too.
        terms = [weight * losses[name] for name, weight in weights.items() if weight]
        losses["alignment_loss"] = torch.stack(terms).sum() if terms else audio_embeds.new_zeros(())  # Eq. 10
        return losses

    def _losses(
        self,
        logits: Tensor,
        shifted: Tensor,
        labels: Tensor,
        input_ids: Tensor | None,
        audio_embeds: Tensor | None,
        clip_ids: Tensor | None,
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        config = self.config
        if audio_embeds is None or input_ids is None:
            decoder_loss, _ = caption_losses(logits, shifted, num_items=num_items)
            return {"loss": config.decoder_loss_weight * decoder_loss, "decoder_loss": decoder_loss}

        audio_mask = self._audio_mask(input_ids, audio_embeds)
        scores = self._guide_bias(audio_embeds, audio_mask)
        bias = None if scores is None else self.token_guide.beta * scores  # Eq. 12
        losses = self._alignment_losses(audio_embeds, audio_mask, labels, clip_ids)
        losses["decoder_loss"], losses["guided_loss"] = caption_losses(logits, shifted, bias, num_items)
        weights = {
            "alignment_loss": config.alignment_weight,
            "guided_loss": config.guided_loss_weight if scores is not None else 0.0,
            "decoder_loss": config.decoder_loss_weight,
        }
        losses["loss"] = torch.stack(
            [weight * losses[name] for name, weight in weights.items() if weight]
        ).sum()  # Eq. 14
        return losses

    # -- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """
        As of every Transformers model; `num_candidates`, given here or in the generation config, is ours: so many captions
        are written for each prompt, by beams or with `do_sample` drawn, and the one that lies nearest to the audio in the
        space that the aligner has made (s of Eq. 9) is returned, or the `num_return_sequences` nearest in their order.
        Candidates of text alone come in the order of their likelihood. The generation config's number gives way to a call
        that says itself how to search (`num_beams`, `do_sample`, a streamer, an assistant, `return_dict_in_generate`).

        Raises:
            ValueError: when `num_candidates` is no whole number from `num_return_sequences` on, or is given together with
                `return_dict_in_generate`.
        """

        def setting(name: str) -> Any:  # as the library looks for it
            found = (
                kwargs.get(name),
                getattr(generation_config, name, None),
                getattr(self.generation_config, name, None),
            )
            return next((value for value in found if value is not None), None)

        wanted = setting("num_return_sequences") or 1
        if "num_candidates" in kwargs:
            count = kwargs.pop("num_candidates")
        elif (count := setting("num_candidates")) is not None:
            count = None if any(kwargs.get(name) is not None for name in WAYS_TO_SEARCH) else max(count, wanted)
        if count is None or count == 1 == wanted:
            return super().generate(inputs, generation_config, **kwargs)
        if not isinstance(count, int) or count < wanted:
            raise ValueError(
                f"num_candidates={count!r} must be a whole number, at least num_return_sequences={wanted}."
            )
        if setting("return_dict_in_generate"):
            raise ValueError("num_candidates returns captions alone: leave return_dict_in_generate out.")
        input_ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        audio = {name: kwargs.pop(name) for name in AUDIO_INPUTS if kwargs.get(name) is not None}
        if audio and input_ids is None:
            raise ValueError(AUDIO_WITH_EMBEDS)
        if audio:
            clips = self.get_audio_features(**audio, return_dict=True).pooler_output
            kwargs["audio_embeds"] = self._embeds_by_row(clips, input_ids)
        kwargs["num_return_sequences"] = count
        if not setting("do_sample"):
            kwargs["num_beams"] = max(count, setting("num_beams") or 1)
        sequences: Any = super().generate(inputs, generation_config, **kwargs)
        sequences = sequences.unflatten(0, (-1, count))
        order = torch.arange(count, device=sequences.device).expand(len(sequences), count)
        if kwargs.get("audio_embeds") is not None:
            captions = sequences[..., input_ids.shape[1] :]
            nearness = self._similarity(kwargs["audio_embeds"], input_ids, captions, setting("eos_token_id"))
            order = nearness.sort(dim=-1, descending=True, stable=True).indices
        order = order[:, :wanted, None].expand(-1, -1, sequences.shape[-1])
        return sequences.gather(1, order).flatten(0, 1)

    def _similarity(
        self, audio_embeds: Tensor, input_ids: Tensor, captions: Tensor, eos_token_id: int | list[int] | None
    ) -> Tensor:
        """s of Eq. 9 between the audio of each row and its captions, ids `(batch, captions, length)` -> `(batch, captions)`."""
        said = torch.ones_like(captions, dtype=torch.bool)
        if eos_token_id is not None:
            eos = torch.as_tensor(eos_token_id, device=captions.device)
            said = torch.isin(captions, eos).cumsum(-1) == 0
        z_t_bar = masked_mean(self.get_input_embeddings()(captions), said)
        z_a_bar = masked_mean(audio_embeds, self._audio_mask(input_ids, audio_embeds))[:, None]
        return nn.functional.cosine_similarity(self.aligner.project(z_a_bar), self.aligner.project(z_t_bar), dim=-1)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        weight = kwargs.pop("token_guide_weight", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if weight is not None:
            generation_config.token_guide_weight = weight  # type: ignore[attr-defined]
        weight = getattr(generation_config, "token_guide_weight", None)
        if weight is not None and not (isinstance(weight, (int, float)) and math.isfinite(weight)):
            raise ValueError(f"token_guide_weight={weight!r} must be a finite number, or None for the learned one.")
        return generation_config, model_kwargs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict,
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict:
        """Encodes the audio and measures the guide's distances, once per clip and before rows are repeated for beams."""
        input_ids = inputs_tensor if model_input_name == "input_ids" else model_kwargs.get("input_ids")
        given = {name: model_kwargs.pop(name, None) for name in AUDIO_INPUTS}
        if input_ids is None or model_input_name != "input_ids":
            if any(value is not None for value in given.values()):
                raise ValueError(AUDIO_WITH_EMBEDS)
            return model_kwargs
        if given["input_features"] is not None or given["audio_hidden_states"] is not None:
            clips = self.get_audio_features(**given, return_dict=True).pooler_output
            model_kwargs["audio_embeds"] = self._embeds_by_row(clips, input_ids)
        weight = getattr(generation_config, "token_guide_weight", None)
        audio_embeds = model_kwargs.get("audio_embeds")
        if audio_embeds is not None and weight != 0:
            with torch.no_grad():
                model_kwargs["token_guide_scores"] = self._guide_bias(
                    audio_embeds, self._audio_mask(input_ids, audio_embeds)
                )
        elif (
            weight != 0 and self.config.guide_metric != "none" and bool((input_ids == self.config.audio_token_id).any())
        ):
            logger.warning(
                "input_ids hold audio placeholders, but no audio was given: the cache may know it, the Token Guide does not, and "
                "leaves the tokens to come alone. Give the audio again, or token_guide_weight=0."
            )
        return model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        ids = kwargs.get("encoder_input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1]:
            # What looks at the prompt's tokens finds a word of it where the placeholder, which may be none, stands.
            kwargs["encoder_input_ids"] = torch.where(ids == self.config.audio_token_id, ids[:, -1:], ids)
        processors = super()._get_logits_processor(generation_config, **kwargs)
        scores = (kwargs.get("model_kwargs") or {}).pop("token_guide_scores", None)
        if self.config.audio_token_id < self.config.get_text_config().vocab_size:
            processors.insert(0, SuppressTokensLogitsProcessor([self.config.audio_token_id], device=str(self.device)))
        if scores is not None:  # first of all, since the guided logits are the model's logits
            weight = getattr(generation_config, "token_guide_weight", None)
            weight = self.token_guide.beta.detach() if weight is None else weight
            renormalize = generation_config.num_beams is not None and generation_config.num_beams > 1
            processors.insert(0, TokenGuideLogitsProcessor(scores, weight, renormalize=renormalize))
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator: Any = super()._get_candidate_generator(*args, **kwargs)
        lookup = isinstance(generator, PromptLookupCandidateGenerator)
        if lookup:  # it finds placeholders too, which are no words
            generator.vocab_size = max(generator.vocab_size, self.config.audio_token_id + 1)
            look_up = generator.get_candidates

            def up_to_a_placeholder(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
                found, _ = look_up(input_ids, *args, **kwargs)
                placeholders = (found[0, input_ids.shape[1] :] == self.config.audio_token_id).nonzero()
                stop = input_ids.shape[1] + int(placeholders[0]) if len(placeholders) else found.shape[1]
                return found[:, :stop], None

            generator.get_candidates = up_to_a_placeholder
        return generator

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs: Any
    ):
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("audio_embeds") is not None:
            model_kwargs = model_kwargs | {"prompt_ids": input_ids}
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` refuses embeddings that are not named here
        audio_embeds: Tensor | None = None,
        prompt_ids: Tensor | None = None,  # of which input_ids are one chunk
        is_first_iteration: bool | None = False,
        **kwargs,
    ):
        if audio_embeds is not None and prompt_ids is not None:
            start = kwargs["past_key_values"].get_seq_length()
            audio_embeds = self._embeds_between(audio_embeds, prompt_ids, start, start + input_ids.shape[1])
        elif (
            audio_embeds is not None and next_sequence_length is not None and next_sequence_length < input_ids.shape[1]
        ):
            audio_embeds = (
                self._embeds_between(audio_embeds, input_ids, input_ids.shape[1] - next_sequence_length)
                if is_first_iteration
                else None
            )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            audio_embeds=audio_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _embeds_between(
        self, audio_embeds: Tensor, input_ids: Tensor, start: int, stop: int | None = None
    ) -> Tensor | None:
        """Of z_a by row, what belongs to the ids from `start` to `stop`; the cache holds what is before."""
        is_audio = input_ids == self.config.audio_token_id
        before, to_come = is_audio[:, :start].sum(1), int(is_audio[:, start:stop].sum(1).max())
        slots = (before[:, None] + torch.arange(to_come, device=before.device)).clamp(max=audio_embeds.shape[1] - 1)
        return audio_embeds.gather(1, slots[..., None].expand(-1, -1, audio_embeds.shape[-1])) if to_come else None

    # -- weights -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QueryAttention):
            init.normal_(module.query)
        elif isinstance(module, QFormerAdapter):
            init.normal_(module.query, std=self.config.initializer_range)
        elif isinstance(module, nn.GRU):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, TokenGuide):
            init.constant_(module.beta, float(self.config.guide_weight_init))
        elif isinstance(module, CrossModalAligner):
            init.zeros_(module.text_mean)
            init.zeros_(module.batches_seen)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        if isinstance(self.adapter, TwoStreamAdapter):
            # With the small weights of an LLM every query would see the mean of all tokens, and learn slowly to choose.
            for part in self.adapter.modules():
                if isinstance(part, (nn.Linear, nn.Conv1d)):
                    init.xavier_uniform_(part.weight)
        # To the backbones a LoRA matrix is a Linear like any other, but B must start at zero.
        for name, module in self.named_modules():
            if name.endswith(".lora_A.default"):
                init.kaiming_uniform_(module.weight, a=5**0.5)
            elif name.endswith(".lora_B.default"):
                init.zeros_(module.weight)

    @classmethod
    def from_backbones(cls, config: LambConfig, **kwargs: Any) -> "LambForAudioCaptioning":
        """
        A new model: the backbones from `config.audio_model_id` and `config.text_model_id`, the rest from scratch.

        Args:
            config: see [`LambConfig.from_backbones`]; a backbone that it does not name starts from scratch too.
            kwargs: as of `from_pretrained` (`dtype`, `device_map`, `token`, ...).
        """
        return cls.from_pretrained(None, config=config, state_dict={}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "LambForAudioCaptioning":
        """
        As of every Transformers model; reads small and full checkpoints alike.

        A `quantization_config` (`BitsAndBytesConfig`, `TorchAoConfig`) quantises the LLM's layers and nothing else; LoRA
        trains on top of them. Such a model is saved small, and quantised again by whoever loads it.

        Raises:
            ValueError: when a backbone is neither in the checkpoint nor named, or cannot be quantised in this way.
            OSError: when a file of weights is damaged.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_quantization_config(kwargs["quantization_config"])
        names = ("cache_dir", "force_download", "local_files_only", "token")
        reset = _download_options.set({name: kwargs[name] for name in names if name in kwargs})
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path}, or of a backbone that its config names, are damaged "
                f"({error}). Delete the file and fetch it again; `hf cache verify` names the damaged files of a Hub id."
            ) from error
        finally:
            _download_options.reset(reset)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_backbones()  # loading sets requires_grad everywhere
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(
                model
            )  # the LLM is quantised; what trains and is saved is not
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):  # type: ignore[override]
        # Private, but the one place that every way of loading passes through after the model was built: here a small
        # checkpoint is completed from its backbones, file by file and without reading what is not needed yet.
        if state_dict is None:
            state_dict = _lazy_state_dict(checkpoint_files)
        anew = not state_dict and not checkpoint_files  # nothing was given, so that what is not named starts at random
        for backbone, setting in LambForAudioCaptioning._backbones.items():
            if any(key.startswith(f"{backbone}.") and "lora_" not in key for key in state_dict):
                continue
            model_id = getattr(model.config, setting)
            if model_id is None and anew:
                continue
            if model_id is None:
                raise ValueError(
                    f"The checkpoint holds no weights of {backbone}, and config.{setting} does not say where they are: set it "
                    "to a folder or Hub id, or save the checkpoint with save_backbones=True."
                )
            revision = getattr(model.config, setting.replace("_id", "_revision"))
            state_dict = _backbone_state_dict(model, backbone, model_id, revision) | state_dict
        if load_config.hf_quantizer is None:
            return PreTrainedModel._load_pretrained_model(model, state_dict, None, load_config, *args, **kwargs)
        lora = {key: state_dict.pop(key) for key in list(state_dict) if "lora_" in key}
        weights = {key.replace(".base_layer.", "."): value for key, value in state_dict.items()}
        loaded = PreTrainedModel._load_pretrained_model(model, weights, None, load_config, *args, **kwargs)
        _add_lora_to_quantized(model, lora, load_config.hf_quantizer)
        return loaded

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_backbones: bool | None = None, **kwargs: Any
    ) -> None:
        """
        As of every Transformers model.

        Args:
            save_backbones: True writes a full checkpoint; None and False leave out a frozen backbone that the config
                names. (False for a backbone that it does not name is an error.)
        """
        left_out = set()
        for backbone, setting in self._backbones.items():
            frozen = backbone not in self.config.trained_backbones
            named = getattr(self.config, setting) is not None
            if save_backbones is False and not (frozen and named):
                raise ValueError(
                    f"A checkpoint without {backbone} could not be loaded: it was trained, or config.{setting} is not set."
                )
            if frozen and named and not save_backbones:
                prefix = f"{backbone}."
                left_out |= {key for key in self.state_dict() if key.startswith(prefix) and "lora_" not in key}
        quantized = getattr(self.language_model, "hf_quantizer", None) is not None
        if quantized and not any(key.startswith("language_model.") for key in left_out):
            raise ValueError(
                "The quantised language_model cannot be saved: save a small checkpoint (config.text_model_id, without "
                "save_backbones=True), or load the model without quantization_config first."
            )
        self._keys_to_ignore_on_save = left_out
        super().save_pretrained(save_directory, *args, **kwargs)


def _sparing_quantization_config(settings: dict | QuantizationConfigMixin) -> QuantizationConfigMixin:
    """The same settings for the LLM's inner layers alone; the encoder, the output layer and what trains stay as they are."""
    settings = AutoQuantizationConfig.from_dict(settings) if isinstance(settings, dict) else copy.deepcopy(settings)
    names = [name for name in ("llm_int8_skip_modules", "modules_to_not_convert") if hasattr(settings, name)]
    if not names:
        raise ValueError(
            f"quantization_config of type {type(settings).__name__} cannot leave parts of a model alone, but only the LLM "
            "may be quantised: use BitsAndBytesConfig or TorchAoConfig."
        )
    spared = [
        "audio_encoder",
        "adapter",
        "aligner",
        "token_guide",
        "language_model.lm_head",
        "language_model.embed_out",
    ]
    setattr(settings, names[0], [*(getattr(settings, names[0]) or []), *spared])
    return settings


def _add_lora_to_quantized(model: LambForAudioCaptioning, weights: dict[str, Any], quantizer: Any) -> None:
    """PEFT chooses its layers by those that they wrap, so LoRA comes last; it goes where its base layer lies."""
    llm: Any = model.language_model
    llm.hf_quantizer = quantizer
    llm.is_loaded_in_8bit = getattr(quantizer.quantization_config, "load_in_8bit", False)
    llm.is_loaded_in_4bit = getattr(quantizer.quantization_config, "load_in_4bit", False)
    model._inject_lora()
    unknown = model.load_state_dict({key: value[...] for key, value in weights.items()}, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"The checkpoint's LoRA does not fit config.peft_config: there is no place for {unknown[0]}.")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # by the checkpoint or by PEFT


def _lazy_state_dict(files: list[str] | None) -> dict[str, Any]:
    """Weights of safetensors files, read only when they are loaded into the model (ZeRO-3 wants them whole)."""
    weights = {}
    for file in files or []:
        pointer = safe_open(file, framework="pt")
        for key in pointer.keys():  # noqa: SIM118 - it is no mapping
            weights[key] = pointer.get_tensor(key) if is_deepspeed_zero3_enabled() else pointer.get_slice(key)
    return weights


def _backbone_state_dict(model: LambForAudioCaptioning, backbone: str, model_id: str, revision: str | None) -> dict:
    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=resolve_backbone(model_id),
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=False,
        download_kwargs={**(_download_options.get() or {}), "revision": revision},  # type: ignore[arg-type]
    )
    weights = _lazy_state_dict(files)
    if backbone == "audio_encoder":
        whole = {key: value[...] for key, value in weights.items()}  # small, and CED's are to be taken apart
        weights = audio_backbone_state_dict(model.config.audio_config, whole)
    elif not any(key.startswith(f"{model.language_model.base_model_prefix}.") for key in weights):
        # Saved without its (tied) head, as the Hub's GPT-2.
        weights = {f"{model.language_model.base_model_prefix}.{key}": value for key, value in weights.items()}
    expected = {
        key.removeprefix(f"{backbone}."): tuple(value.shape)
        for key, value in model.state_dict().items()
        if key.startswith(f"{backbone}.")
    }
    renamed = {}
    for key, value in weights.items():
        parent, _, leaf = key.rpartition(".")
        lora_key = f"{parent}.base_layer.{leaf}"
        key = lora_key if lora_key in expected else key
        shape = tuple(value.shape if isinstance(value, Tensor) else value.get_shape())
        if key in expected and expected[key] != shape and not is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{key} of {model_id} has the shape {shape}, expected {expected[key]}: it is not the {backbone} that this "
                f"model's config describes. Set config.{LambForAudioCaptioning._backbones[backbone]} to the one that it was made "
                "with."
            )
        renamed[f"{backbone}.{key}"] = value
    return renamed


__all__ = ["LambForAudioCaptioning", "LambOutput"]
