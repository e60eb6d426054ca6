"""`pipeline("audio-captioning")`: sound files in, sentences out."""

import base64
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from huggingface_hub.utils import httpx  # the client that load_audio fetches with
from transformers import GenerationConfig, GenerationMixin
from transformers.audio_utils import load_audio
from transformers.pipelines.base import ChunkPipeline

from .feature_extraction_lamb import as_array, check_clip, shortest_clip

SLOWEST, FASTEST = 100, 10_000_000  # sampling rates of arrays that are believed, in Hz


def read_audio(source: Any, sampling_rate: int, source_rate: int | None = None) -> np.ndarray:
    """
    Mono float32 audio `(samples,)` at `sampling_rate` (Hz) of a path, a URL, bytes of a file, an array or tensor, or a
    dictionary that holds one of these.

    Files are decoded by soundfile, mixed to mono and resampled by soxr.

    Args:
        source: a path, `http(s)://` URL, `bytes`, a decoder of torchcodec, array or tensor `(samples,)` or `(channels, samples)`, or a dictionary
            with `array` or `raw` and `sampling_rate`, or with `bytes` or `path` (as `datasets.Audio(decode=False)` gives).
        source_rate: of an array, in Hz.

    Raises:
        ValueError: when there is nothing to read, it cannot be decoded, or an array comes without its rate.
    """
    if isinstance(source, dict):
        for key in ("array", "raw"):
            if source.get(key) is not None:
                return read_audio(source[key], sampling_rate, source.get("sampling_rate", source_rate))
        for key in ("bytes", "path", "url"):
            if source.get(key) is not None:
                return read_audio(source[key], sampling_rate)
        raise ValueError(f"A dictionary of audio needs 'array', 'raw', 'bytes' or 'path'; got {sorted(source)}.")
    if isinstance(source, (str, os.PathLike, bytes)):
        return _decode(source, sampling_rate)
    if hasattr(source, "get_all_samples"):  # torchcodec's decoder, which a column of datasets.Audio holds
        samples = source.get_all_samples()
        return read_audio(samples.data, sampling_rate, samples.sample_rate)
    array = as_array(source)
    if source_rate is None:
        raise ValueError(
            "An array of audio needs its rate: pass sampling_rate=, or {'array': ..., 'sampling_rate': ...}."
        )
    if not (isinstance(source_rate, (int, float)) and SLOWEST <= source_rate <= FASTEST):
        raise ValueError(f"sampling_rate={source_rate!r} of an array must be a number of Hz, {SLOWEST} to {FASTEST}.")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"The array holds {array.dtype}, expected floats in [-1, 1]: divide 16-bit integers by 32768.")
    if array.ndim == 2:
        if array.shape[0] > array.shape[1]:
            raise ValueError(f"An array of shape {array.shape} is not (channels, samples): transpose it.")
        array = array.mean(0)
    if source_rate != sampling_rate and array.size:
        array = soxr.resample(array.astype(np.float32), source_rate, sampling_rate)
    return array.astype(np.float32, copy=False)


def _decode(source: str | os.PathLike | bytes, sampling_rate: int) -> np.ndarray:
    if isinstance(source, bytes):
        name, location = f"{len(source)} bytes", "data:;base64," + base64.b64encode(source).decode()
    else:
        name = location = os.fspath(source)
        if not location.startswith(("http://", "https://", "data:")) and not os.path.isfile(location):
            raise ValueError(f"There is no file {location!r}: give a path to a sound file, a URL, or an array.")
    try:
        return load_audio(location, sampling_rate=sampling_rate, backend="soundfile")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{name} cannot be fetched ({error}): check the address and the network.") from error
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be decoded as audio ({error}): give WAV, FLAC, OGG or MP3, or convert it, for example "
            "`ffmpeg -i input output.flac`."
        ) from error


class AudioCaptioningPipeline(ChunkPipeline):
    """
    Captions audio with LAMB.

    ```python
    >>> from transformers import pipeline
    >>> import modeling_lamb
    >>> captioner = pipeline("audio-captioning", model=folder)
    >>> captioner("dog.wav")
    [{'generated_text': 'A dog barks.'}]
    ```
    """

    processor: Any
    model: Any
    _load_processor: bool | None = True  # type: ignore[assignment]
    _load_feature_extractor: bool | None = False  # type: ignore[assignment]
    _load_image_processor: bool | None = False  # type: ignore[assignment]
    _load_video_processor: bool | None = False  # type: ignore[assignment]
    _load_tokenizer: bool | None = False  # type: ignore[assignment]
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=64)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "The pipeline needs the model's own processor: pass `processor=LambProcessor.from_pretrained(...)`."
            )
        # Clips are batched by the processor; the library would refuse a tokenizer and an extractor that pad differently.
        self.feature_extractor = None

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs: a path, a URL, the bytes of a file, an array or tensor with `sampling_rate=`, a dictionary
                (`{"array" | "raw": ..., "sampling_rate": ...}`, `{"path" | "bytes": ...}`), a list of these, a column of a
                data set, or a `KeyDataset`.
            sampling_rate (`int`): of arrays, in Hz.
            prompt (`str`): what to ask instead of the processor's default.
            batch_size (`int`): clips in one `generate`.
            chunk_length_s (`float`): caption a long recording window by window, each this many seconds.
            return_timestamps (`bool`): with `chunk_length_s`, also each window's caption, start and end in seconds.
            num_return_sequences (`int`), generate_kwargs (`dict`): for `generate`; any of its parameters may also be given
                by itself, `token_guide_weight` and `num_candidates` among them.
            on_error (`str`): `"raise"` (default), or `"return"` to give `{"generated_text": None, "error": ...}` for a clip
                that cannot be read and go on.

        Returns:
            For one clip a list of `{"generated_text": str}`, one a returned sequence; for several, a list of those.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, list, tuple)):
            inputs = list(inputs)  # a column of a data set
        elif isinstance(inputs, tuple):
            inputs = list(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self,
        sampling_rate: int | None = None,
        prompt: str | None = None,
        chunk_length_s: float | None = None,
        return_timestamps: bool | None = None,
        on_error: str | None = None,
        generate_kwargs: dict | None = None,
        token_guide_weight: float | None = None,
        num_candidates: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if on_error not in (None, "raise", "return"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'return'.")
        if chunk_length_s is not None and not (
            isinstance(chunk_length_s, (int, float)) and 0 < chunk_length_s < math.inf
        ):
            raise ValueError(f"chunk_length_s={chunk_length_s!r} must be a positive number of seconds.")
        if return_timestamps not in (None, True, False):
            raise ValueError(
                f"return_timestamps={return_timestamps!r} must be True or False: windows have times, words not."
            )
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r} must be one text, which is asked about every clip.")
        known = vars(GenerationConfig()).keys() | inspect.signature(GenerationMixin.generate).parameters.keys()
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"Unknown arguments {unknown}: neither the pipeline nor generate() takes them.")
        preprocess = {
            "sampling_rate": sampling_rate,
            "prompt": prompt,
            "chunk_length_s": chunk_length_s,
            "on_error": on_error,
        }
        generate = {**kwargs, **(generate_kwargs or {})}
        own = {"token_guide_weight": token_guide_weight, "num_candidates": num_candidates}
        generate |= {name: value for name, value in own.items() if value is not None}
        postprocess = {"return_timestamps": return_timestamps}
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {"generate_kwargs": generate} if generate else {},
            {name: value for name, value in postprocess.items() if value is not None},
        )

    def preprocess(  # type: ignore[override]
        self,
        inputs: Any,
        sampling_rate: int | None = None,
        prompt: str | None = None,
        chunk_length_s: float | None = None,
        on_error: str = "raise",
    ) -> Iterator[dict[str, Any]]:
        extractor = self.processor.feature_extractor
        rate, error = extractor.sampling_rate, None
        try:
            audio = check_clip(read_audio(inputs, rate, sampling_rate), extractor)
        except ValueError as problem:
            if on_error == "raise":
                raise
            audio, error = np.zeros(rate, dtype=np.float32), str(problem)
        window = len(audio) if chunk_length_s is None else round(chunk_length_s * rate)
        if window < shortest_clip(extractor):
            raise ValueError(
                f"chunk_length_s={chunk_length_s} makes windows of {window} samples, expected at least "
                f"{shortest_clip(extractor)}: there would be too little to hear in each."
            )
        starts = list(range(0, len(audio), window))
        if len(starts) > 1 and len(audio) - starts[-1] < shortest_clip(extractor):
            starts.pop()  # what is left is too short to hear; the window before it takes it in
        for index, start in enumerate(starts):
            is_last = index == len(starts) - 1
            stop = len(audio) if is_last else start + window
            yield {
                "is_last": is_last,
                "audio": audio[start:stop],
                "timestamp": (start / rate, stop / rate),
                "prompt": prompt,
                "error": error,
            }

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict | None = None) -> dict[str, Any]:
        batched = isinstance(model_inputs["audio"], list)
        columns = model_inputs if batched else {name: [value] for name, value in model_inputs.items()}
        prompts = None if columns["prompt"][0] is None else list(columns["prompt"])
        inputs = self.processor(
            text=prompts, audio=columns["audio"], sampling_rate=self.processor.feature_extractor.sampling_rate
        ).to(self.model.device)
        sequences = self.model.generate(**inputs, **self._prepare_generate_kwargs(generate_kwargs or {}))
        if not isinstance(sequences, torch.Tensor):
            sequences = sequences.sequences
        texts = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        per_clip = len(texts) // len(columns["audio"])
        output = {
            "texts": [
                [text.strip() for text in texts[start : start + per_clip]] for start in range(0, len(texts), per_clip)
            ],
            **{name: columns[name] for name in ("timestamp", "error", "is_last")},
        }
        return output if batched else {name: value[0] for name, value in output.items()}

    def postprocess(self, model_outputs: list[dict[str, Any]], return_timestamps: bool = False) -> list[dict[str, Any]]:  # type: ignore[override]
        if model_outputs[0]["error"] is not None:
            return [{"generated_text": None, "error": model_outputs[0]["error"]}]
        results = []
        for candidate in range(len(model_outputs[0]["texts"])):
            chunks = [{"timestamp": tuple(o["timestamp"]), "text": o["texts"][candidate]} for o in model_outputs]
            result: dict[str, Any] = {"generated_text": " ".join(chunk["text"] for chunk in chunks)}
            if return_timestamps:
                result["chunks"] = chunks
            results.append(result)
        return results

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the model, the processor and the pipeline's own code."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["AudioCaptioningPipeline", "read_audio"]
