"""Captioned clips in one shape, the cache of a frozen encoder's tokens, and the batches that the model takes."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processing_lamb import LambProcessor, read_audio
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import FeatureExtractionMixin
from transformers.utils import logging

from modeling_lamb import LambForAudioCaptioning
from modeling_lamb.audio_encoders import encode_audio

logger = logging.get_logger(__name__)


@dataclass
class Clip:
    """One clip: its audio (path, bytes, or float32 samples at the extractor's rate), all its captions, and its name."""

    audio: Any
    captions: list[str]
    id: str


def read_folder(folder: str | Path) -> list[Clip]:
    """
    Clips of a folder of sound files with a `metadata.csv` or `metadata.jsonl` beside them.

    The table has a column `file_name`, and `caption`, `captions` (a list, jsonl only) or `caption_1`, `caption_2`, ...

    Raises:
        ValueError: when the table, a column, every file or every caption of a row is missing; it names it.
    """
    folder = Path(folder)
    tables = [table for table in (folder / "metadata.jsonl", folder / "metadata.csv") if table.is_file()]
    if not tables:
        raise ValueError(f"{folder} holds no metadata.csv or metadata.jsonl with the columns file_name and caption.")
    with open(tables[0], newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream)) if tables[0].suffix == ".csv" else [json.loads(line) for line in stream]
    if not rows or "file_name" not in rows[0]:
        raise ValueError(
            f"{tables[0]} has the columns {sorted(rows[0]) if rows else []}, expected file_name and caption."
        )
    clips, missing = [], []
    for number, row in enumerate(rows):
        captions = _captions(row)
        if not captions:
            raise ValueError(
                f"Row {number + 1} of {tables[0]} ({row['file_name']}) has no caption: fill it in or remove it."
            )
        path = folder / row["file_name"]
        if path.is_file():
            clips.append(Clip(str(path), captions, row["file_name"]))
        else:
            missing.append(row["file_name"])
    if missing:
        logger.warning(f"{len(missing)} of {len(rows)} files of {tables[0]} are missing: {', '.join(missing[:5])} ...")
    if not clips:
        raise ValueError(f"None of the {len(rows)} files that {tables[0]} names is in {folder}.")
    return clips


def _captions(row: dict[str, Any]) -> list[str]:
    values = row.get("captions") or [
        row.get("caption"),
        *(row[name] for name in sorted(row) if name.startswith("caption_")),
    ]
    return [" ".join(value.split()) for value in values if value and value.strip()]


class EncodedClips(Dataset):
    """
    Encoder tokens of clips, computed once and kept on disk in float16.

    A frozen encoder gives the same tokens in every epoch; reading them back is several times faster than encoding again.
    The folder is named after the encoder, its front end and the clips, and is filled shard by shard, so that an
    interrupted run goes on where it stopped. A file that cannot be read is left out and counted in `skipped`.

    Args:
        clips: what to encode.
        processor, model: a LAMB processor and model; the model's audio encoder must be frozen.
        folder: where caches live.
        name: of these clips; change it when they change.
        num_workers: processes that encode, each on one thread; 0 encodes in this one, on the model's device.
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
    ) -> None:
        key = hashlib.sha256()
        for tensor in model.audio_encoder.state_dict().values():
            key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        key.update(processor.feature_extractor.to_json_string().encode() + f"{name} {len(clips)}".encode())
        self.folder = Path(folder) / f"{name}-{key.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.items: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        shards = {
            self.folder / f"{start:08d}.json": range(start, min(start + self.SHARD, len(clips)))
            for start in range(0, len(clips), self.SHARD)
        }
        missing = [(index, numbers) for index, numbers in shards.items() if not index.is_file()]
        parts = (clips, processor.feature_extractor, model.audio_encoder)
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
        if self.skipped:
            logger.warning(f"{len(self.skipped)} clips of {name} were left out: {json.dumps(self.skipped)[:500]}")
        if not self.items:
            raise ValueError(
                f"None of the {len(clips)} clips of {name} could be read: {json.dumps(self.skipped)[:500]}"
            )

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
    clips: Sequence[Clip], extractor: FeatureExtractionMixin, encoder: nn.Module, index: Path, numbers: range
) -> None:
    device = next(encoder.parameters()).device
    items, skipped, offset = [], {}, 0
    temporary = index.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        for number in numbers:
            clip = clips[number]
            try:
                audio = read_audio(clip.audio, extractor.sampling_rate, extractor.sampling_rate)
                inputs = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
            except ValueError as error:
                skipped[clip.id] = str(error)
                continue
            tokens, mask, _ = encode_audio(encoder, inputs["input_features"], inputs["input_features_mask"])
            array = tokens[0, : int(mask.sum())].to(torch.float16).cpu().numpy()
            stream.write(array.tobytes())
            items.append({"id": clip.id, "captions": clip.captions, "offset": offset, "shape": array.shape})
            offset += array.size
    os.replace(temporary, index.with_suffix(".f16"))
    temporary.write_text(json.dumps({"items": items, "skipped": skipped}))
    os.replace(temporary, index)  # the shard counts as done only now


class WaveformClips(Dataset):
    """Clips read and decoded when they are asked for; one that cannot be read is replaced by the next that can."""

    def __init__(self, clips: Sequence[Clip], sampling_rate: int) -> None:
        self.clips, self.sampling_rate = list(clips), sampling_rate
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict[str, Any]:
        for shift in range(len(self.clips)):
            clip = self.clips[(number + shift) % len(self.clips)]
            try:
                audio = read_audio(clip.audio, self.sampling_rate, self.sampling_rate)
            except ValueError as error:
                if clip.id not in self.skipped:
                    logger.warning(f"{clip.id} is left out: {error}")
                self.skipped[clip.id] = str(error)
                continue
            return {
                "audio": audio,
                "captions": clip.captions,
                "id": clip.id,
                "clip": (number + shift) % len(self.clips),
            }
        raise ValueError(f"None of the {len(self.clips)} clips could be read.")


class OneRowPerCaption(Dataset):
    """Every caption of a clip as a row of its own, as the peers train."""

    def __init__(self, clips: Dataset, captions_per_clip: Iterable[int]) -> None:
        self.clips = clips
        self.rows = [(clip, caption) for clip, count in enumerate(captions_per_clip) for caption in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        clip, caption = self.rows[number]
        item = dict(self.clips[clip])
        captions = item.pop("captions")
        return item | {"caption": captions[min(caption, len(captions) - 1)]}


@dataclass
class CaptionCollator:
    """Rows of [`OneRowPerCaption`] -> the model's inputs, with labels on caption and EOS."""

    processor: LambProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [row["caption"] for row in rows]
        if "audio" in rows[0]:
            rate = self.processor.feature_extractor.sampling_rate
            batch = dict(self.processor(audio=[row["audio"] for row in rows], sampling_rate=rate, captions=captions))
        else:
            batch = self.processor.label_texts(captions)
            tokens = [row["audio_hidden_states"] for row in rows]
            batch["audio_hidden_states"] = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            lengths = torch.tensor([len(item) for item in tokens])
            batch["audio_hidden_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch | {"clip_ids": torch.tensor([row["clip"] for row in rows])}
