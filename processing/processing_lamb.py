"""Audio, prompts and captions in, model inputs out; generated tokens in, captions out."""

import math
import os
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging

from .feature_extraction_lamb import LambFeatureExtractor, check_clip
from .pipeline_audio_captioning import AudioCaptioningPipeline, read_audio

logger = logging.get_logger(__name__)


class LambProcessor(ProcessorMixin):
    """
    Wraps a feature extractor (LAMB's own, Whisper's or AST's) and the LLM's tokenizer.

    A prompt is laid out as in Eq. 11: audio, then text, then (in training) the caption and EOS.

    Args:
        feature_extractor: gives the encoder's input.
        tokenizer: the LLM's; the audio placeholder is added to it as a special token if it has none. The LLM's table
            need not grow: the placeholder is never looked up there.
        num_audio_tokens: placeholders per clip, the model's `num_audio_tokens`.
        audio_token: the placeholder.
        prompt_template: with `{audio}` and `{prompt}`; the text after `{prompt}` marks where the caption starts.
        prompt: what is asked when no text is given (the paper does not give its prompt).
    """

    audio_kwargs = {"return_attention_mask": True}
    pipeline_class = AudioCaptioningPipeline  # so that its file travels with this one when they are saved for the Hub

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        num_audio_tokens: int = 32,
        audio_token: str = "<|audio|>",
        prompt_template: str = "{audio}USER: {prompt}\nASSISTANT:",
        prompt: str = "Describe the audio you hear.",
        chat_template: str | None = None,
    ) -> None:
        for field in ("{audio}", "{prompt}"):
            if prompt_template.count(field) != 1:
                raise ValueError(f"prompt_template={prompt_template!r} must contain {field} exactly once.")
        if tokenizer.pad_token is None:  # LLaMA has none; padding is masked by the attention mask, never by its id
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(audio_token, special=True, normalized=False)])
        self.num_audio_tokens, self.audio_token = num_audio_tokens, audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.prompt_template, self.prompt = prompt_template, prompt
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(  # type: ignore[override]
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        captions: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            text: prompts. None asks the default question about each clip; a text without the placeholder is put into
                the template; one with it is taken as it stands. Without audio, it is plain text for the LLM.
            audio: one clip or a list: arrays or tensors `(samples,)`, or paths and URLs.
            captions: one for each text; adds `labels` and pads on the right, for training, and gives torch tensors. Without
                them the padding is on the left, for generation.
            kwargs: `text_kwargs`, `audio_kwargs`, or arguments of the tokenizer and the feature extractor, of which arrays and
                tensors need `sampling_rate`, in Hz.

        Returns:
            `input_ids`, `attention_mask` (batch, length); with audio `input_features`, `input_features_mask`; with captions
            `labels`, -100 outside the caption and its EOS.

        Raises:
            ValueError: on captions without audio, a placeholder in a caption, counts that do not match, an unknown
                argument, or audio that the feature extractor refuses.
        """
        self._refuse_unknown(kwargs)
        kwargs.setdefault("return_tensors", "pt")
        if audio is None and captions is not None:
            raise ValueError("captions were given without audio: pass the clips that they describe as audio=.")
        text_kwargs = dict(kwargs.pop("text_kwargs", {}))
        defaults = {
            "padding": self.tokenizer.init_kwargs.get("padding", audio is not None or isinstance(text, (list, tuple))),
            "padding_side": "left" if captions is None else "right",
        }
        for name, value in defaults.items():
            if name not in kwargs:
                text_kwargs.setdefault(name, value)
        if audio is not None:
            audio = self._read_files(audio, kwargs)
            _, _, _, audio = self.prepare_inputs_layout(audio=audio)
            text = self._prompts(text, len(audio))
        if captions is None:
            return super().__call__(text=text, audio=audio, text_kwargs=text_kwargs, **kwargs)

        text_kwargs |= {name: kwargs[name] for name in defaults if name in kwargs}
        labelled = self.label_texts(captions, text, **text_kwargs)
        kwargs["return_tensors"] = "pt"
        return BatchFeature(dict(labelled) | dict(super().__call__(audio=audio, **kwargs)))

    def label_texts(
        self, captions: str | list[str], text: str | list[str] | None = None, **text_kwargs: Any
    ) -> BatchFeature:
        """
        The text side of training alone, for audio that was encoded before.

        Args:
            captions: one for each prompt.
            text: prompts with their placeholders; None asks the default question.
            text_kwargs: for the tokenizer.

        Returns:
            `input_ids`, `attention_mask`, `labels` (batch, length), padded on the right.

        Raises:
            ValueError: as of the call.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        prompts = self._prompts(text, len(captions))
        if len(captions) != len(prompts):
            raise ValueError(f"Got {len(captions)} captions for {len(prompts)} prompts; they must match one to one.")
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"Caption {index} is {caption!r}, expected a text.")
            if not caption.strip():
                raise ValueError(f"Caption {index} is empty: leave the clip out.")
            if self.audio_token in caption:
                raise ValueError(f"Caption {index} contains the audio placeholder {self.audio_token}: remove it.")
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ValueError("The tokenizer has no eos_token, so captions would never end: set tokenizer.eos_token.")
        prompts = self._expand(prompts)
        joined = [f"{prompt} {caption.strip()}{eos}" for prompt, caption in zip(prompts, captions, strict=True)]
        settings = {"padding": True, "padding_side": "right", "return_tensors": "pt"} | text_kwargs
        inputs = self.tokenizer(joined, **settings)
        inputs.pop("token_type_ids", None)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, prompt in enumerate(self.tokenizer(prompts)["input_ids"]):
            start = int(inputs["attention_mask"][row].argmax())  # 0, unless someone pads on the left
            end = start + len(prompt)
            if inputs["input_ids"][row, start:end].tolist() != prompt:
                raise ValueError(
                    f"Prompt {prompts[row]!r} ends within a token once a caption follows: end it with punctuation, so that "
                    "training and generation see the same tokens."
                )
            labels[row, start:end] = -100
        return BatchFeature(dict(inputs) | {"labels": labels})

    def prompt_texts(self, clips: int, text: str | list[str] | None = None) -> BatchFeature:
        """The text side of generation alone, for audio that was encoded before: `input_ids` and `attention_mask`."""
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = self.tokenizer(self._expand(self._prompts(text, clips)), **settings)
        inputs.pop("token_type_ids", None)
        return inputs

    def _expand(self, prompts: list[str]) -> list[str]:
        return [prompt.replace(self.audio_token, self.audio_token * self.num_audio_tokens) for prompt in prompts]

    def _read_files(self, audio: Any, kwargs: dict) -> Any:
        """Paths and URLs decoded at the extractor's rate; anything else as it is."""
        sources = audio if isinstance(audio, (list, tuple)) else [audio]
        if not sources or not all(isinstance(source, (str, os.PathLike)) for source in sources):
            return audio
        kwargs["sampling_rate"] = self.feature_extractor.sampling_rate
        return [read_audio(source, kwargs["sampling_rate"]) for source in sources]

    def _refuse_unknown(self, kwargs: dict) -> None:
        known = set(self.valid_processor_kwargs.__annotations__) | {"common_kwargs", "videos", "images"}
        for group in ("text_kwargs", "audio_kwargs"):
            known |= set(self.valid_processor_kwargs.__annotations__[group].__annotations__)
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"Unknown arguments {unknown}: LambProcessor takes {', '.join(sorted(known))}.")

    def _prompts(self, text: Any, clips: int) -> list[str]:
        if isinstance(text, (str, type(None))):
            texts = [self.prompt] * clips if text is None else [text]
        elif isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text):
            texts = list(text)
        else:
            raise ValueError(f"text={text!r} must be a text, or a list of texts with one for each clip.")
        if any(self.audio_token in item for item in texts):
            return texts
        if len(texts) != clips:
            raise ValueError(f"Got {len(texts)} texts for {clips} clips; they must match one to one.")
        return [self.prompt_template.format(audio=self.audio_token, prompt=item) for item in texts]

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        extractor = self.feature_extractor
        if not isinstance(extractor, LambFeatureExtractor):
            audio = [check_clip(clip, extractor, index) for index, clip in enumerate(audio)]
            self._warn_of_truncation(audio)
        processed = extractor(audio, **kwargs)
        if "input_features" in processed:
            features = processed["input_features"]
            mask = processed.get("input_features_mask", processed.get("attention_mask"))
        else:  # AST's extractor gives no mask: `(clips, frames, mel)`, 10 ms a frame
            features, mask = processed["input_values"], None
            if kwargs.get("return_attention_mask") is not False:
                real = [math.ceil(len(clip) / extractor.sampling_rate * 100) for clip in audio]
                rows = [(np.arange(len(features[0])) < frames).astype(np.int64) for frames in real]
                mask = BatchFeature({"mask": rows}, tensor_type=kwargs.get("return_tensors"))["mask"]
        data = {"input_features": features}
        if mask is not None:
            data["input_features_mask"] = mask
        return data, [self.audio_token * self.num_audio_tokens] * len(audio)

    def _warn_of_truncation(self, audio: Any) -> None:
        extractor = self.feature_extractor
        limit = getattr(extractor, "n_samples", None) or getattr(extractor, "max_length", math.inf) * 160
        for index, clip in enumerate(audio):
            if len(clip) > limit:
                logger.warning(
                    f"Clip {index} has {len(clip)} samples, but {type(extractor).__name__} reads only the first {limit}: "
                    "cut it into windows (the pipeline's chunk_length_s does) to caption all of it."
                )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "input_features", "input_features_mask"]

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As [`decode`], of every row."""
        return [self.decode(row, *args, **kwargs) for row in sequences]

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """
        The caption among generated tokens; with `skip_special_tokens=True` the prompt before it is left out.

        `generate` returns the prompt and the caption, as for every decoder-only model.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and isinstance(ids[0], list):
            return self.batch_decode(ids, *args, **kwargs)
        if not kwargs.get("skip_special_tokens") or self.audio_token_id not in ids:
            return self.tokenizer.decode(ids, *args, **kwargs)
        after_audio = len(ids) - ids[::-1].index(self.audio_token_id)
        text = self.tokenizer.decode(ids[after_audio:], *args, **kwargs)
        marker = self.prompt_template.split("{prompt}")[1]
        return text.split(marker, 1)[-1].strip() if marker else text.strip()


__all__ = ["LambProcessor"]
