"""The steps of `score.py`: clips with their references, captions of a model, scores with intervals, beside controls."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import MobileNetV1ForImageClassification
from transformers.utils import logging

from modeling_lamb import AudioCaptioningPipeline, LambForAudioCaptioning, LambProcessor
from modeling_lamb.audio_encoders import encode_audio
from modeling_lamb.packaged_backbone import cache_folder

from .captioning_metrics import CaptioningMetrics
from .convert_yamnet import yamnet_folder
from .data import EncodedClips
from .event_scores import bootstrap, named_classes, score_soundscapes
from .readers import READERS, row_captions
from .soundscapes.mixing import KINDS, SoundscapeCorpus
from .soundscapes.sources import read_classes

logger = logging.get_logger(__name__)
PER_CLASS = 5  # single-event clips of each class
MIXTURES = [kind for kind in KINDS if kind not in ("single", "silence", "noise")]
SCORED = ("cider_d", "meteor", "rouge_l", "bleu_4", "spice", "spider", "spider_fl", "fense")  # with an interval


def data_rows(reader: str, table: str, audio: str | None) -> list[dict[str, Any]]:
    """Rows to caption and score of one of the [`READERS`], one a clip with all its references."""
    clips, report = READERS[reader](table, *([audio] if audio else []))
    logger.warning(str(report))
    return [{"id": clip.id, "audio": clip.audio, "references": clip.captions} for clip in clips]


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


def read_predictions(file: str | Path) -> list[dict[str, Any]]:
    """
    Anyone's captions: a csv or jsonl with `id`, `caption` (or `prediction`), and `references` or `caption_1`, ...

    Raises:
        ValueError: when a column is missing or an id occurs twice; it names it.
    """
    file = Path(file)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        table = list(csv.DictReader(stream)) if file.suffix == ".csv" else [json.loads(line) for line in stream]
    rows = []
    for number, row in enumerate(table):
        name = next((key for key in ("prediction", "caption") if key in row), None)
        references = row.get("references") or row_captions({k: v for k, v in row.items() if k != "caption"})
        if name is None or not references:
            raise ValueError(
                f"Row {number + 1} of {file} has the columns {sorted(row)}: it needs caption (or prediction) and references "
                "(a list, in jsonl) or caption_1, caption_2, ..."
            )
        rows.append(
            {
                **row,
                "id": str(row.get("id", row.get("file_name", number))),
                "caption": row[name],
                "references": references,
            }
        )
    if double := [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(
            f"{file} holds {len(double)} ids more than once: {', '.join(double[:5])}. One row a clip is expected."
        )
    return rows


def caption_clips(model: str, rows: list[dict[str, Any]], batch_size: int, settings: dict[str, Any]) -> bool:
    """
    Adds `caption` to each row; None, and the `error`, where the clip cannot be read.

    Among several processes each captions its share. Returns whether this is the one that goes on with all rows.
    """
    state = PartialState()
    captioner = AudioCaptioningPipeline(
        model=LambForAudioCaptioning.from_pretrained(model),
        processor=LambProcessor.from_pretrained(model),
        device=state.device,
    )
    share = range(state.process_index, len(rows), state.num_processes)
    results = captioner(
        (rows[number]["audio"] for number in share),
        batch_size=batch_size,
        on_error="return",
        max_new_tokens=40,
        **settings,
    )
    found = [
        (number, result[0])
        for number, result in zip(share, tqdm(results, total=len(share), desc="captioning", disable=None), strict=True)
    ]
    for number, result in gather_object(found) if state.num_processes > 1 else found:
        rows[number]["caption"] = result["generated_text"]
        if "error" in result:
            rows[number]["error"] = result["error"]
    return state.is_main_process


def score_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of captioned rows, as [`caption_scores`]; each row gets its own `scores`."""
    result = caption_scores([row["caption"] or "" for row in rows], [row["references"] for row in rows])
    for name, values in result.pop("per_clip").items():
        for row, value in zip(rows, values, strict=True):
            row.setdefault("scores", {})[name] = value
    return result | {"unread": [row["id"] for row in rows if row["caption"] is None]}


def write(folder: Path, rows: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    """`predictions.jsonl` and `scores.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({name: value for name, value in row.items() if name != "audio"}) + "\n")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """
    Scores of the corpus with 95 % intervals over resampled clips, and `per_clip`, `skipped`, `tokenizer` as of
    [`CaptioningMetrics`].

    The interval is that of the mean of the clips' scores, moved by the difference where the corpus score is no mean.
    """
    result = CaptioningMetrics().compute(predictions=list(captions), references=[list(texts) for texts in references])
    for name in SCORED:
        if name in result["scores"]:
            interval = bootstrap(result["per_clip"][name])
            moved = result["scores"][name] - interval["value"]
            interval |= {key: interval[key] + moved for key in ("value", "low", "high")}
            result["scores"][name] = interval
    return result


def paired_differences(rows: list[dict[str, Any]], other: str | Path) -> dict[str, dict[str, float]]:
    """
    Mean difference of the scores of `rows` and of another predictions file over the same clips, by metric, with 95 %
    intervals over resampled clips.

    Raises:
        ValueError: when the two do not hold the same ids.
    """
    theirs = {row["id"]: row for row in read_predictions(other)}
    if set(theirs) != {row["id"] for row in rows}:
        odd = sorted(set(theirs) ^ {row["id"] for row in rows})
        raise ValueError(
            f"{other} is of other clips: {len(odd)} ids are in one file only, such as {', '.join(odd[:3])}."
        )
    ordered = [theirs[row["id"]] for row in rows]
    score_rows(ordered)
    return {
        name: bootstrap([row["scores"][name] - them["scores"][name] for row, them in zip(rows, ordered, strict=True)])
        for name in SCORED
        if name in rows[0]["scores"] and name in ordered[0]["scores"]
    }


# -- controls of the soundscapes ---------------------------------------------------------------------------------------


def soundscape_scores(model: str, rows: list[dict[str, Any]], train_clips: int, num_workers: int = 0) -> dict[str, Any]:
    """
    Scores of captioned soundscapes, and the same of five controls that need no LAMB.

    `random_class` and `majority_class` guess; `probe` is a logistic regression on the mean token of the same frozen encoder,
    trained on the single events among the first `train_clips` training clips. `most_frequent`, `shuffled`,
    `nearest_neighbour` and `yamnet_tags` are captions: the commonest of training, the model's own dealt to other clips,
    the one of the nearest training clip by mean token, and a template filled with YAMNet's two highest tags.
    """
    keywords = {name: sound.keywords for name, sound in read_classes().items()}
    events, kinds = [row["events"] for row in rows], [row["kind"] for row in rows]
    captions = [row["caption"] or "" for row in rows]
    lamb, processor = LambForAudioCaptioning.from_pretrained(model), LambProcessor.from_pretrained(model)
    from .recipe import Source

    clips, name = Source(soundscapes={"split": "train", "clips": train_clips, "seed": 0}).read()
    encoded = EncodedClips(clips, processor, lamb.eval(), cache_folder() / "encoder-tokens", name, num_workers)
    said = [item["captions"][0] for item in encoded.items]
    seen = np.stack([_mean(encoded[number]["audio_hidden_states"]) for number in range(len(encoded))])
    heard = _tokens(lamb, processor, [row["audio"]["array"] for row in rows])

    controls = {
        "most_frequent": [Counter(said).most_common(1)[0][0]] * len(rows),
        "shuffled": [captions[number] for number in _derangement(len(rows))],
        "nearest_neighbour": [said[number] for number in _nearest(seen, np.stack([_mean(t) for t in heard]))],
        "yamnet_tags": _tag_captions(heard),
    }
    systems: dict[str, Any] = {}
    for name, texts in controls.items():
        scores = caption_scores(texts, [row["references"] for row in rows])["scores"]
        systems[name] = scores | score_soundscapes(texts, events, kinds, keywords)
    single = [number for number, row in enumerate(rows) if row["kind"] == "single"]
    truth = [events[number][0] for number in single]
    named = [named_classes(text, keywords) for text in said]
    alone = [number for number, names in enumerate(named) if len(names) == 1]
    names = [named[number][0] for number in alone]
    probe = _probe(seen[alone], names, np.stack([_mean(heard[number]) for number in single]), truth)
    majority = Counter(names).most_common(1)[0][0]
    systems["probe"] = {"single_accuracy": bootstrap(probe)}
    systems["majority_class"] = {"single_accuracy": bootstrap([float(majority == name) for name in truth])}
    systems["random_class"] = {"single_accuracy": bootstrap([1 / len(set(truth))] * len(truth))}
    return {
        "soundscapes": score_soundscapes(captions, events, kinds, keywords) | {"classes": len(set(truth))},
        "controls": systems,
    }


def _probe(seen: np.ndarray, names: list[str], heard: np.ndarray, truth: list[str]) -> list[float]:
    """Right or wrong by clip, at the regularisation that suits the tested clips best."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(seen)
    trials = []
    for strength in (1e-4, 1e-3, 1e-2):
        probe = LogisticRegression(C=strength, max_iter=300).fit(scaler.transform(seen), names)
        guesses = probe.predict(scaler.transform(heard))
        trials.append([float(guess == name) for guess, name in zip(guesses, truth, strict=True)])
    return max(trials, key=sum)


def _nearest(seen: np.ndarray, heard: np.ndarray) -> np.ndarray:
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    unit_seen, unit_heard = ((x - mean) / deviation for x in (seen, heard))
    unit_seen /= np.linalg.norm(unit_seen, axis=1, keepdims=True)
    return (unit_heard @ unit_seen.T).argmax(1)


def _derangement(count: int) -> np.ndarray:
    """A permutation that leaves nothing in its place."""
    order = np.random.default_rng(0).permutation(count)
    shifted = np.empty(count, dtype=int)
    shifted[order] = np.roll(order, 1)
    return shifted


@torch.inference_mode()
def _tag_captions(heard: list[torch.Tensor]) -> list[str]:
    yamnet = MobileNetV1ForImageClassification.from_pretrained(yamnet_folder()).eval()
    captions = []
    for tokens in heard:
        scores = yamnet.classifier(tokens.mean(1)).sigmoid().mean(0)
        first, second = (yamnet.config.id2label[int(index)].lower() for index in scores.topk(2).indices)
        captions.append(f"The sound of {first} and {second}.")
    return captions


@torch.inference_mode()
def _tokens(model: LambForAudioCaptioning, processor: LambProcessor, clips: list[np.ndarray]) -> list[torch.Tensor]:
    """Encoder tokens `(steps, bands, hidden)` of each clip."""
    found = []
    for clip in tqdm(clips, desc="encoding", disable=None):
        inputs = processor.feature_extractor(clip, sampling_rate=16000, return_tensors="pt")
        tokens, mask, _ = encode_audio(model.audio_encoder, inputs["input_features"], inputs["input_features_mask"])
        found.append(tokens[0, mask[0].bool()])
    return found


def _mean(tokens: torch.Tensor) -> np.ndarray:
    return tokens.float().mean((0, 1)).numpy()
