"""Log-mel front end of LAMB: CED's by default, YAMNet's as a configuration of it."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.utils import TensorType, logging

logger = logging.get_logger(__name__)
LOUDEST = 2.0**31  # samples as large as 32-bit integers are still heard; far above, a spectrum overflows


def shortest_clip(extractor: Any) -> int:
    """Samples that a clip must have at least: `min_length`, or one frame of 25 ms for another family's extractor."""
    return getattr(extractor, "min_length", extractor.sampling_rate // 40)


def check_clip(clip: Any, extractor: Any, index: int = 0) -> np.ndarray:
    """
    A clip as float32 `(samples,)`, if there is something to hear in it.

    Raises:
        ValueError: when it is empty or too short for the extractor, holds NaN, infinity, absurdly large samples or integers,
            or is not mono.
    """
    array = as_array(clip)
    shortest, rate = shortest_clip(extractor), extractor.sampling_rate
    if array.ndim != 1:
        raise ValueError(
            f"Clip {index} has the shape {array.shape}, expected mono audio (samples,): average its channels first."
        )
    if not np.issubdtype(array.dtype, np.floating) and len(array):
        raise ValueError(
            f"Clip {index} holds {array.dtype}, expected floats in [-1, 1]: divide 16-bit integers by 32768."
        )
    if len(array) < shortest:
        raise ValueError(
            f"Clip {index} has {len(array)} samples, expected at least {shortest} ({shortest / rate:.3f} s at {rate} Hz): "
            "there is too little to hear."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"Clip {index} holds NaN or infinite samples: repair the recording, or leave it out.")
    if (peak := np.abs(array).max()) > LOUDEST:
        raise ValueError(f"Clip {index} has samples as large as {peak:.1e}, expected floats in [-1, 1]: scale it.")
    return np.ascontiguousarray(array, dtype=np.float32)


def as_array(clip: Any) -> np.ndarray:
    """A clip's samples as they are, of an array, a tensor on any device, or a sequence."""
    if not isinstance(clip, torch.Tensor):
        return np.asarray(clip)
    clip = clip.detach().cpu()
    return (clip.float() if clip.dtype == torch.bfloat16 else clip).numpy()


class LambFeatureExtractor(SequenceFeatureExtractor):
    """
    Log-mel spectrograms in float32, with a mask of the real frames. A clip's features do not depend on its batch.

    The defaults are CED's: numerically torchaudio's MelSpectrogram and AmplitudeToDB(top_db=120), the floor taken clip
    by clip instead of over the batch.

    Args:
        feature_size: number of mel bins.
        sampling_rate: of the audio, in Hz.
        n_fft, win_length, hop_length: of the short-time Fourier transform, in samples (periodic Hann window).
        min_frequency, max_frequency: range of the mel filters, in Hz (HTK scale, no area normalisation).
        triangularize_in_mel_space: filters that are triangles over mel (YAMNet) instead of over Hz (torchaudio).
        power: exponent of the magnitude: 2 for power, 1 for magnitude.
        log_scale: `"dB"` (10 log10, at least -100, at most `top_db` below the clip's maximum) or `"ln"`
            (natural log of the value plus `log_offset`).
        center: frames centred on their time, the clip mirrored at its ends.
        min_length: shortest clip that is accepted, in samples.
        min_frames, frame_multiple: features are padded with silence to `min_frames` plus a multiple of `frame_multiple`
            frames, for an encoder that reads them in patches.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        n_fft: int = 512,
        win_length: int = 512,
        hop_length: int = 160,
        min_frequency: float = 0.0,
        max_frequency: float = 8000.0,
        triangularize_in_mel_space: bool = False,
        power: float = 2.0,
        log_scale: Literal["dB", "ln"] = "dB",
        log_offset: float = 1e-3,
        top_db: float = 120.0,
        center: bool = True,
        min_length: int = 2400,
        min_frames: int = 1,
        frame_multiple: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        if log_scale not in ("dB", "ln"):
            raise ValueError(f"log_scale={log_scale!r} must be 'dB' or 'ln'.")
        if log_scale == "ln" and log_offset <= 0:
            raise ValueError(
                f"log_offset={log_offset} must be above 0: it is what keeps the logarithm of silence finite."
            )
        if min_frames < 1 or frame_multiple < 1:
            raise ValueError(f"min_frames={min_frames} and frame_multiple={frame_multiple} must be at least 1.")
        if win_length > n_fft:
            raise ValueError(f"win_length={win_length} must not exceed n_fft={n_fft}.")
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.min_frequency, self.max_frequency = min_frequency, max_frequency
        self.triangularize_in_mel_space = triangularize_in_mel_space
        self.power, self.log_scale, self.log_offset, self.top_db = power, log_scale, log_offset, top_db
        self.center, self.min_length = center, min_length
        self.min_frames, self.frame_multiple = min_frames, frame_multiple
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=min_frequency,
            max_frequency=max_frequency,
            sampling_rate=sampling_rate,
            mel_scale="htk",
            triangularize_in_mel_space=triangularize_in_mel_space,
        ).astype(np.float32)

    @property
    def silence(self) -> float:
        """The feature of digital silence, with which frames are padded."""
        return -100.0 if self.log_scale == "dB" else math.log(self.log_offset)

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """Features `(feature_size, frames)` of one clip `(samples,)` in float32, on its device."""
        window = torch.hann_window(self.win_length, device=waveform.device)
        if self.center:
            spectrum = torch.stft(
                waveform, self.n_fft, self.hop_length, self.win_length, window, center=True, return_complex=True
            )
        else:  # torch.stft would centre a short window within the transform, and drop the clip's last, unfilled frames
            samples = (self._padded_frames(self.count_frames(len(waveform))) - 1) * self.hop_length + self.win_length
            waveform = torch.nn.functional.pad(waveform, (0, max(0, samples - len(waveform))))
            spectrum = torch.fft.rfft(waveform.unfold(0, self.win_length, self.hop_length) * window, self.n_fft).T
        mel = torch.from_numpy(self.mel_filters).to(waveform.device).T @ spectrum.abs().pow(self.power)
        if self.log_scale == "ln":
            return (mel + self.log_offset).log()
        decibel = 10 * mel.clamp(min=1e-10).log10()
        return decibel.clamp(min=decibel.max() - self.top_db)

    def count_frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        if self.center:
            return samples // self.hop_length + 1
        return max(0, samples - self.win_length) // self.hop_length + 1

    def _padded_frames(self, frames: int) -> int:
        return self.min_frames + max(0, -(-(frames - self.min_frames) // self.frame_multiple)) * self.frame_multiple

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | Sequence,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one clip `(samples,)` or several (a list, or an array `(clips, samples)`): mono floats in [-1, 1].
            sampling_rate: of the clips, in Hz; it must be the extractor's.
            padding: `True`/`"longest"`, `"max_length"`, or `False`.
            max_length: in samples; with `truncation`, longer clips are cut to it.
            truncation: nothing is cut unless this is asked for.
            pad_to_multiple_of: in samples.
            return_attention_mask: `input_features_mask`, on by default.
            return_tensors: `"pt"` or `"np"`; without it, lists.
            device: where to compute.

        Returns:
            `input_features (clips, feature_size, frames)` and `input_features_mask (clips, frames)`, 1 at real frames.

        Raises:
            ValueError: on another sampling rate, an empty or too short clip, NaN or infinity, integers, several channels,
                or an unknown argument; it says which clip and how to mend it.
        """
        if kwargs:
            raise ValueError(
                f"Unknown arguments {sorted(kwargs)}; see LambFeatureExtractor.__call__ for what it takes."
            )
        if sampling_rate is None:
            logger.warning_once(
                f"sampling_rate was not given; {self.sampling_rate} Hz is taken for granted. Pass it to be safe."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The audio has sampling_rate={sampling_rate} Hz, expected {self.sampling_rate} Hz: resample it first, for "
                f"example soxr.resample(audio, {sampling_rate}, {self.sampling_rate})."
            )
        if truncation and max_length is not None and max_length < self.min_length:
            raise ValueError(
                f"max_length={max_length} samples would cut the clips below the {self.min_length} that can be heard: it is "
                "counted in samples here (a processor limits tokens by text_kwargs={'max_length': ...})."
            )
        clips = self._as_clips(raw_speech)
        padded = self.pad(
            BatchFeature({"input_features": [clip[:, None] for clip in clips]}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        features, masks = [], []
        for samples, mask in zip(padded["input_features"], padded["attention_mask"], strict=True):
            # The spectrogram of the clip alone, before any padding, which would leak into its last frames.
            log_mel = self.log_mel(torch.from_numpy(samples[np.asarray(mask, dtype=bool), 0]).to(device))
            total = self._padded_frames(self.count_frames(len(samples)))
            real = self.count_frames(int(np.sum(mask)))
            missing = total - log_mel.shape[1]
            features.append(torch.nn.functional.pad(log_mel, (0, missing), value=self.silence).cpu())
            masks.append((torch.arange(total) < real).to(torch.int64))
        if return_tensors is not None:
            if len({feature.shape for feature in features}) > 1:
                raise ValueError("Clips of different length make no tensor: use padding=True, or return_tensors=None.")
            data: dict[str, Any] = {"input_features": torch.stack(features), "input_features_mask": torch.stack(masks)}
            if TensorType(return_tensors) == TensorType.NUMPY:
                data = {name: value.numpy() for name, value in data.items()}
        else:
            data = {"input_features": [f.numpy() for f in features], "input_features_mask": [m.numpy() for m in masks]}
        if return_attention_mask is False or (return_attention_mask is None and not self.return_attention_mask):
            del data["input_features_mask"]
        return BatchFeature(data)

    def _as_clips(self, raw_speech: Any) -> list[np.ndarray]:
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            clips = list(raw_speech) if raw_speech.ndim > 1 else [raw_speech]
        elif isinstance(raw_speech, Sequence) and raw_speech and not np.isscalar(raw_speech[0]):
            clips = list(raw_speech)
        else:
            clips = [raw_speech]
        return [check_clip(clip, self, index) for index, clip in enumerate(clips)]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("mel_filters", None)
        return output


__all__ = ["LambFeatureExtractor"]
