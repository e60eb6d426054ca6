"""The steps of `score.py`: clips with their ground truth, captions of a model, scores beside controls."""

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_lamb import AudioCaptioningPipeline, LambForAudioCaptioning, LambProcessor
from modeling_lamb.audio_encoders import encode_audio

from .data import read_folder
from .event_scores import bootstrap, score_soundscapes
from .soundscapes.mixing import KINDS, SoundscapeCorpus
from .soundscapes.sources import read_classes

PER_CLASS = 5  # single-event clips of each class
MIXTURES = [kind for kind in KINDS if kind not in ("single", "silence", "noise")]


def folder_rows(folder: str) -> list[dict[str, Any]]:
    """Clips of a folder, as [`read_folder`] finds them."""
    return [{"id": clip.id, "audio": clip.audio, "references": clip.captions} for clip in read_folder(folder)]


def soundscape_rows(split: str, clips: int) -> list[dict[str, Any]]:
    """`PER_CLASS` single-event clips of every class of the split, and `clips` mixtures of all kinds in turn."""
    corpus = SoundscapeCorpus(split)
    plan = [("single", [name]) for name in corpus.names for _ in range(PER_CLASS)]
    plan += [(MIXTURES[number % len(MIXTURES)], None) for number in range(clips)]
    rows = []
    for number, (kind, names) in enumerate(tqdm(plan, desc="composing", disable=None)):
        soundscape = corpus.compose(number, kind, names)
        rows.append(
            {
                "id": f"{split}-{number:05d}",
                "audio": {"array": soundscape.audio, "sampling_rate": 16000},
                "references": soundscape.captions,
                "kind": kind,
                "events": [event.class_name for event in soundscape.events],
            }
        )
    return rows


def caption_clips(model: str, rows: list[dict[str, Any]], batch_size: int, settings: dict[str, Any]) -> None:
    """Adds `caption` to each row; None, and the `error`, where the clip cannot be read."""
    captioner = AudioCaptioningPipeline(
        model=LambForAudioCaptioning.from_pretrained(model), processor=LambProcessor.from_pretrained(model)
    )
    results = captioner(
        (row["audio"] for row in rows), batch_size=batch_size, on_error="return", max_new_tokens=40, **settings
    )
    for row, result in zip(rows, tqdm(results, total=len(rows), desc="captioning", disable=None), strict=True):
        row["caption"] = result[0]["generated_text"]
        if "error" in result[0]:
            row["error"] = result[0]["error"]


def score_rows(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of captioned soundscapes, and the same of the controls."""
    keywords = {name: sound.keywords for name, sound in read_classes().items()}
    captions = [row["caption"] or "" for row in rows]
    events, kinds = [row["events"] for row in rows], [row["kind"] for row in rows]
    shuffled = list(np.random.default_rng(0).permutation(captions))
    scores: dict[str, Any] = score_soundscapes(captions, events, kinds, keywords)
    scores |= {
        f"shuffled_{name}": score for name, score in score_soundscapes(shuffled, events, kinds, keywords).items()
    }
    single = [row for row in rows if row["kind"] == "single"]
    chance = 1 / len({row["events"][0] for row in single})
    scores["random_class"] = {"value": chance, "low": chance, "high": chance, "n": len(single)}
    scores["probe_single_accuracy"] = bootstrap(_probe(model, single))
    return scores


def _probe(model: str, rows: list[dict[str, Any]], per_class: int = 20) -> list[float]:
    """Right or wrong, by clip, of a logistic regression on the mean token of the same frozen encoder."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    lamb, processor = LambForAudioCaptioning.from_pretrained(model), LambProcessor.from_pretrained(model)
    corpus = SoundscapeCorpus("train")
    names = [name for name in corpus.names for _ in range(per_class)]
    training = [corpus.compose(number, "single", [name]).audio for number, name in enumerate(names)]
    scaler = StandardScaler()
    features = scaler.fit_transform(_mean_tokens(lamb, processor, training))
    probe = LogisticRegression(C=0.01, max_iter=500).fit(features, names)
    tested = scaler.transform(_mean_tokens(lamb, processor, [row["audio"]["array"] for row in rows]))
    truth = [row["events"][0] for row in rows]
    return [float(guess == name) for guess, name in zip(probe.predict(tested), truth, strict=True)]


@torch.inference_mode()
def _mean_tokens(model: LambForAudioCaptioning, processor: LambProcessor, clips: list[np.ndarray]) -> np.ndarray:
    means = []
    for clip in tqdm(clips, desc="probe", disable=None):
        inputs = processor.feature_extractor(clip, sampling_rate=16000, return_tensors="pt")
        tokens, mask, _ = encode_audio(model.audio_encoder, inputs["input_features"], inputs["input_features_mask"])
        means.append(tokens[0, mask[0].bool()].mean((0, 1)).numpy())
    return np.stack(means)
