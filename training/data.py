"""Clips as rows of training: read when asked for, or from the cache of a frozen encoder's tokens; and their batches."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from processing_lamb import LambProcessor, read_audio
from torch.utils.data import ConcatDataset, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_lamb import LambForAudioCaptioning
from modeling_lamb.audio_encoders import encode_frozen_part, last_layers

from .readers import FEATURES, Clip

logger = logging.get_logger(__name__)
_APART = 10**9  # between the clip numbers of joined sources


class EncodedClips(Dataset):
    """
    Encoder tokens of clips, computed once and kept on disk in float16.

    A frozen encoder gives the same tokens in every epoch; reading them back is several times faster than encoding again.
    Of one whose last layers train (`num_trained_audio_layers`) what these read is kept.
    The folder is named after the encoder, its front end and the clips, and is filled shard by shard, so that an
    interrupted run goes on where it stopped. A file that cannot be read is left out and counted in `skipped`.

    Args:
        clips: what to encode.
        processor, model: a LAMB processor and model; the model's audio encoder must be frozen.
        folder: where caches live.
        name: of these clips; change it when they change.
        num_workers: processes that encode, each on one thread; 0 encodes in this one, on the model's device.
        max_seconds: of a longer clip the first so many seconds are encoded; how many were cut is logged.
    """

    SHARD = 200

    def __init__(
        self,
        clips: Sequence[Clip],
        processor: LambProcessor,
        model: LambForAudioCaptioning,
        folder: str | Path,
        name: str,
        num_workers: int = 0,
        max_seconds: float | None = None,
    ) -> None:
        digest, trained = hashlib.sha256(), model.config.num_trained_audio_layers
        layers = last_layers(model.audio_encoder, trained)
        changing = {tensor.data_ptr() for layer in layers for tensor in layer.state_dict().values()}
        for tensor in model.audio_encoder.state_dict().values():  # in half precision, as small checkpoints hold it
            if tensor.data_ptr() not in changing:
                digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
        if trained:
            digest.update(f"without {trained} layers".encode())
        settings = processor.feature_extractor.to_dict().items()
        front_end = json.dumps(
            {key: value for key, value in settings if key != "auto_map"}, sort_keys=True, default=str
        )
        digest.update(front_end.encode() + f"{name} {len(clips)}".encode())
        if max_seconds is not None:
            digest.update(f" {max_seconds} s".encode())
        self.folder = Path(folder) / f"{name}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.items: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.cut = 0
        shards = {
            self.folder / f"{start:08d}.json": range(start, min(start + self.SHARD, len(clips)))
            for start in range(0, len(clips), self.SHARD)
        }
        missing = [(index, numbers) for index, numbers in shards.items() if not index.is_file()]
        parts = (clips, processor.feature_extractor, model.audio_encoder, trained, max_seconds)
        with tqdm(total=len(missing), desc=f"encoding {name}", unit="shard", disable=None) as bar:
            if num_workers > 1 and len(missing) > 1:
                with ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                    for done in as_completed([pool.submit(_encode_shard, *parts, *shard) for shard in missing]):
                        done.result()
                        bar.update()
            else:
                for shard in missing:
                    _encode_shard(*parts, *shard)
                    bar.update()
        for index in shards:
            content = json.loads(index.read_text())
            self.items += [{**item, "file": index.with_suffix(".f16")} for item in content["items"]]
            self.skipped |= content["skipped"]
            self.cut += content.get("cut", 0)
        if self.cut:
            logger.warning(f"{self.cut} clips of {name} are longer than {max_seconds} s; their first part is used.")
        if self.skipped:
            logger.warning(f"{len(self.skipped)} clips of {name} were left out: {json.dumps(self.skipped)[:500]}")
        if not self.items:
            raise ValueError(
                f"None of the {len(clips)} clips of {name} could be read: {json.dumps(self.skipped)[:500]}"
            )

    def clip_name(self, number: int) -> str:
        return self.items[number]["id"]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = self.items[number]
        shape = tuple(item["shape"])
        tokens = np.fromfile(item["file"], "<f2", int(np.prod(shape)), offset=2 * item["offset"]).reshape(shape)
        return {
            "audio_hidden_states": torch.from_numpy(tokens),
            "captions": item["captions"],
            "id": item["id"],
            "clip": number,
        }


@torch.inference_mode()
def _encode_shard(
    clips: Sequence[Clip],
    extractor: Any,
    encoder: PreTrainedModel,
    trained_layers: int,
    max_seconds: float | None,
    index: Path,
    numbers: range,
) -> None:
    device = next(encoder.parameters()).device
    items, skipped, offset, cut = [], {}, 0, 0
    temporary = index.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        for number in numbers:
            clip = clips[number]
            try:
                audio = read_audio(clip.audio, extractor.sampling_rate, extractor.sampling_rate)
                if max_seconds is not None and len(audio) > max_seconds * extractor.sampling_rate:
                    audio, cut = audio[: round(max_seconds * extractor.sampling_rate)], cut + 1
                inputs = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
            except ValueError as error:
                skipped[clip.id] = str(error)
                continue
            tokens, mask = encode_frozen_part(
                encoder, inputs["input_features"], inputs["input_features_mask"], trained_layers
            )
            array = tokens[0, : int(mask.sum())].to(torch.float16).cpu().numpy()
            stream.write(array.tobytes())
            items.append({"id": clip.id, "captions": clip.captions, "offset": offset, "shape": array.shape})
            offset += array.size
    os.replace(temporary, index.with_suffix(".f16"))
    temporary.write_text(json.dumps({"items": items, "skipped": skipped, "cut": cut}))
    os.replace(temporary, index)  # the shard counts as done only now


class WaveformClips(Dataset):
    """
    Clips read and decoded when they are asked for; one that cannot be read is replaced by the next that can.

    Args:
        clips: what to read.
        sampling_rate: in Hz, to which they are resampled.
        max_seconds: longer clips are cropped to this; None takes them whole.
        random_crop: at a place drawn by torch's generator instead of at the start.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        sampling_rate: int,
        max_seconds: float | None = None,
        random_crop: bool = False,
    ) -> None:
        self.clips, self.sampling_rate, self.random_crop = clips, sampling_rate, random_crop
        self.max_seconds = max_seconds
        self.skipped: dict[str, str] = {}

    def clip_name(self, number: int) -> str:
        return self.clips[number].id

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict[str, Any]:
        for shift in range(len(self.clips)):
            position = (number + shift) % len(self.clips)
            clip = self.clips[position]
            try:
                audio = _cropped(clip.audio, self.sampling_rate, self.max_seconds, self.random_crop)
            except ValueError as error:
                if clip.id not in self.skipped:
                    logger.warning(f"{clip.id} is left out: {error}")
                self.skipped[clip.id] = str(error)
                continue
            item = {"audio": audio, "captions": clip.captions, "id": clip.id, "clip": position}
            return item | {"augment": self.random_crop}
        raise ValueError(f"None of the {len(self.clips)} clips could be read.")


def _cropped(audio: Any, sampling_rate: int, max_seconds: float | None, random_crop: bool) -> np.ndarray:
    samples = read_audio(audio, sampling_rate, sampling_rate)
    length = len(samples) if max_seconds is None else round(max_seconds * sampling_rate)
    start = int(torch.randint(len(samples) - length + 1, ())) if random_crop and len(samples) > length else 0
    return samples[start : start + length]


def stream_rows(
    streams: Sequence[tuple[datasets.IterableDataset, float]],
    sampling_rate: int,
    max_seconds: float | None = None,
    shuffle_buffer: int = 1000,
    seed: int = 42,
) -> datasets.IterableDataset:
    """
    Endless rows, one a caption, of data sets that are read as they come and never held whole.

    Ranks and data workers read different shards, so there must be as many of these as of them for either to help. A clip
    that cannot be read is left out with a warning.

    Args:
        streams: data sets with the columns of `readers.FEATURES`, and of each its share of the rows.
        sampling_rate, max_seconds: as of [`WaveformClips`], with random crops.
        shuffle_buffer: rows among which the next one is drawn; their audio stays encoded.
        seed: of the mixing and the order.
    """
    parts = [stream.map(_split_captions, batched=True, batch_size=1).repeat(None) for stream, _ in streams]
    whole = sum(weight for _, weight in streams)
    if len(parts) > 1:
        shares = [weight / whole for _, weight in streams]
        rows = datasets.interleave_datasets(parts, probabilities=shares, seed=seed)
    else:
        (rows,) = parts
    decode = partial(_decode_row, sampling_rate=sampling_rate, max_seconds=max_seconds)
    return rows.shuffle(seed=seed, buffer_size=shuffle_buffer).map(
        decode, batched=True, batch_size=1, remove_columns=list(FEATURES)
    )


def _split_captions(batch: dict[str, list]) -> dict[str, list]:
    (captions,) = batch["captions"]
    return {name: values * len(captions) for name, values in batch.items()} | {"captions": [[c] for c in captions]}


def _decode_row(batch: dict[str, list], sampling_rate: int, max_seconds: float | None) -> dict[str, list]:
    (name,), (source,), (audio,), ((caption,),) = (batch[key] for key in ("id", "source", "audio", "captions"))
    try:
        samples = _cropped(audio["bytes"] or audio["path"], sampling_rate, max_seconds, random_crop=True)
    except ValueError as error:
        logger.warning(f"{name} is left out: {error}")
        return {"audio": [], "caption": [], "clip": [], "augment": []}
    number = int.from_bytes(hashlib.sha256(f"{source} {name}".encode()).digest()[:7])  # the same in every process
    return {"audio": [samples], "caption": [caption], "clip": [number], "augment": [True]}


class OneRowPerCaption(Dataset):
    """Every caption of a clip as a row of its own, as the peers train."""

    def __init__(self, clips: EncodedClips | WaveformClips, captions_per_clip: Iterable[int]) -> None:
        self.clips = clips
        self.rows = [(clip, caption) for clip, count in enumerate(captions_per_clip) for caption in range(count)]

    def clip_name(self, number: int) -> str:
        """The id of the clip that a row calls by `number`."""
        return self.clips.clip_name(number)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        clip, caption = self.rows[number]
        item = dict(self.clips[clip])
        captions = item.pop("captions")
        return item | {"caption": captions[min(caption, len(captions) - 1)]}


class WeightedRows(Dataset):
    """`weight` times as many rows an epoch: some again, or some left out, as a generator of `seed` chooses."""

    def __init__(self, rows: OneRowPerCaption, weight: float, seed: int) -> None:
        self.rows = rows
        generator = torch.Generator().manual_seed(seed)
        whole, rest = divmod(round(weight * len(rows)), len(rows))
        self.order = list(range(len(rows))) * whole + torch.randperm(len(rows), generator=generator)[:rest].tolist()

    def clip_name(self, number: int) -> str:
        """As of [`OneRowPerCaption`]."""
        return self.rows.clip_name(number)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[self.order[number]]


class JoinedRows(ConcatDataset):
    """Rows of several sources, with clip numbers that stay apart."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = super().__getitem__(number)
        return item | {"clip": item["clip"] + _APART * bisect_right(self.cumulative_sizes, number)}

    def clip_name(self, number: int) -> str:
        """As of [`OneRowPerCaption`]."""
        rows: Any = self.datasets[number // _APART]
        return rows.clip_name(number % _APART)


@dataclass
class CaptionCollator:
    """
    Rows of [`OneRowPerCaption`] -> the model's inputs, with labels on caption and EOS.

    Args:
        processor: of the model.
        spec_augment: `{"time": frames, "frequency": bands, "count": n}`: that many stripes of up to so many frames and mel
            bands of each training clip are set to its mean (SpecAugment); None leaves the features as they are.
    """

    processor: LambProcessor
    spec_augment: dict[str, int] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [row["caption"] for row in rows]
        if "audio" in rows[0]:
            rate = self.processor.feature_extractor.sampling_rate
            batch = dict(self.processor(audio=[row["audio"] for row in rows], sampling_rate=rate, captions=captions))
            if self.spec_augment and rows[0].get("augment"):
                batch["input_features"] = spec_augment(batch["input_features"], **self.spec_augment)
        else:
            batch = dict(self.processor.label_texts(captions)) | _pad_tokens(rows)
        return batch | {"clip_ids": torch.tensor([row["clip"] for row in rows])}


def prompt_inputs(rows: list[dict[str, Any]], processor: LambProcessor) -> dict[str, torch.Tensor]:
    """Rows of clips -> the inputs of `generate`, prompts alone."""
    if "audio" in rows[0]:
        rate = processor.feature_extractor.sampling_rate
        return dict(processor(audio=[row["audio"] for row in rows], sampling_rate=rate))
    return dict(processor.prompt_texts(len(rows))) | _pad_tokens(rows)


def _pad_tokens(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = [row["audio_hidden_states"] for row in rows]
    lengths = torch.tensor([len(item) for item in tokens])
    return {
        "audio_hidden_states": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        "audio_hidden_mask": torch.arange(int(lengths.max())) < lengths[:, None],
    }


def spec_augment(features: torch.Tensor, time: int, frequency: int, count: int = 2) -> torch.Tensor:
    """SpecAugment's masks (Park et al. 2019): `features` `(batch, mel, frames)`, stripes at the clip's mean."""
    features = features.clone()
    for clip in features:
        mean = clip.mean()
        for axis, widest in ((0, frequency), (1, time)):
            for _ in range(count):
                width = int(torch.randint(min(widest, clip.shape[axis]) + 1, ()))
                start = int(torch.randint(clip.shape[axis] - width + 1, ()))
                clip.narrow(axis, start, width).fill_(mean)
    return features
