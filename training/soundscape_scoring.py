"""Scores of captioned soundscapes: which events are named, and what controls that need no LAMB would reach."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm
from transformers import MobileNetV1ForImageClassification, PreTrainedModel

from modeling_lamb import LambForAudioCaptioning, LambProcessor
from modeling_lamb.audio_encoders import encode_audio
from modeling_lamb.packaged_backbone import cache_folder

from .convert_yamnet import yamnet_feature_extractor, yamnet_folder
from .data import EncodedClips
from .event_scores import bootstrap, named_classes, score_soundscapes
from .recipe import Source
from .scoring import caption_scores
from .soundscapes.mixing import KINDS, SoundscapeCorpus
from .soundscapes.sources import read_classes

MIXTURES = [kind for kind in KINDS if kind not in ("single", "silence", "noise")]


def soundscape_rows(split: str, clips: int, per_class: int = 5) -> list[dict[str, Any]]:
    """`per_class` single-event clips of every class of the split, and `clips` mixtures of all kinds in turn."""
    corpus = SoundscapeCorpus(split)
    plan = [("single", [name]) for name in corpus.names for _ in range(per_class)]
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


def soundscape_scores(model: str, rows: list[dict[str, Any]], train_clips: int, num_workers: int = 0) -> dict[str, Any]:
    """
    Events named in captioned soundscapes (`soundscapes`), and the scores of `controls` that need no LAMB.

    `random_class` and `majority_class` guess; `probe` is a logistic regression on the mean token of the model's own
    encoder, trained on the single events among the first `train_clips` training clips. `most_frequent`, `shuffled`,
    `nearest_neighbour` and `yamnet_tags` are captions: the commonest of training, the model's own dealt to other clips,
    the one of the nearest training clip by mean token, and a template filled with YAMNet's two highest tags.

    Args:
        model: whose encoder they use.
        rows: captioned clips of [`soundscape_rows`].
        train_clips: how many training clips they know, of the split that the model's recipe names; 0 leaves the controls
            out.
        num_workers: processes that encode these.
    """
    keywords = {name: sound.keywords for name, sound in read_classes().items()}
    events, kinds = [row["events"] for row in rows], [row["kind"] for row in rows]
    captions = [row["caption"] or "" for row in rows]
    own = {"soundscapes": score_soundscapes(captions, events, kinds, keywords)}
    if not train_clips:
        return own
    lamb, processor = LambForAudioCaptioning.from_pretrained(model), LambProcessor.from_pretrained(model)
    lamb.config.num_trained_audio_layers = 0  # nothing trains here: the tokens themselves are kept
    source = {"split": trained_split(model), "clips": train_clips, "seed": 0}
    clips, name = Source(soundscapes=source).read()
    encoded = EncodedClips(clips, processor, lamb.eval(), cache_folder() / "encoder-tokens", name, num_workers)
    said = [item["captions"][0] for item in encoded.items]
    seen = np.stack([_mean(encoded[number]["audio_hidden_states"]) for number in range(len(encoded))])
    audio = [row["audio"]["array"] for row in rows]
    heard = _tokens(lamb.audio_encoder, processor.feature_extractor, audio)

    controls = {
        "most_frequent": [Counter(said).most_common(1)[0][0]] * len(rows),
        "shuffled": [captions[number] for number in _derangement(len(rows))],
        "nearest_neighbour": [said[number] for number in _nearest(seen, np.stack([_mean(t) for t in heard]))],
        "yamnet_tags": _tag_captions(audio),
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
    return own | {"classes": len(set(truth)), "controls": systems, "controls_know": source}


def trained_split(model: str | Path) -> str:
    """Of which soundscapes a run's folder says that it was trained on; `train` where it says nothing."""
    file = Path(model) / "recipe.yaml"
    sources = yaml.safe_load(file.read_text(encoding="utf-8"))["train"] if file.is_file() else []
    return next((given["split"] for source in sources if (given := source.get("soundscapes"))), "train")


def _probe(seen: np.ndarray, names: list[str], heard: np.ndarray, truth: list[str]) -> list[float]:
    """Right or wrong by clip, at the regularisation that suits the tested clips best."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(seen)
    trials = []
    for strength in (1e-3, 1e-2, 1e-1):
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
def _tag_captions(clips: list[np.ndarray]) -> list[str]:
    yamnet = MobileNetV1ForImageClassification.from_pretrained(yamnet_folder()).eval()
    captions = []
    for tokens in _tokens(yamnet.mobilenet_v1, yamnet_feature_extractor(), clips):
        scores = yamnet.classifier(tokens.mean(1)).sigmoid().mean(0)
        first, second = (yamnet.config.id2label[int(index)].lower() for index in scores.topk(2).indices)
        captions.append(f"The sound of {first} and {second}.")
    return captions


@torch.inference_mode()
def _tokens(encoder: PreTrainedModel, extractor: Any, clips: list[np.ndarray]) -> list[torch.Tensor]:
    """Encoder tokens `(steps, bands, hidden)` of each clip."""
    found = []
    for clip in tqdm(clips, desc="encoding", disable=None):
        inputs = extractor(clip, sampling_rate=16000, return_tensors="pt")
        tokens, mask, _ = encode_audio(encoder, inputs["input_features"], inputs["input_features_mask"])
        found.append(tokens[0, mask[0].bool()])
    return found


def _mean(tokens: torch.Tensor) -> np.ndarray:
    return tokens.float().mean((0, 1)).numpy()
