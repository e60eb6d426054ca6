"""From a run's folder to a repository that a stranger loads: files, checks and the card, rendered from what was measured."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from modeling_lamb import AudioCaptioningPipeline, LambConfig, LambForAudioCaptioning, LambProcessor

TEMPLATE = Path(__file__).resolve().parents[1] / "model_card.md"
NEEDED = (
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "README.md",
    "configuration_lamb.py",
    "modeling_lamb.py",
)
GATED = re.compile(r"meta-llama/|google/gemma|mistralai/", re.IGNORECASE)
METRICS = {
    "cider_d": "CIDEr-D",
    "meteor": "METEOR",
    "spice": "SPICE",
    "spider": "SPIDEr",
    "spider_fl": "SPIDEr-FL",
    "fense": "FENSE",
    "rouge_l": "ROUGE-L",
    "bleu_4": "BLEU-4",
    "single_accuracy": "class named, single events",
    "event_f1": "event F1, mixtures",
    "order": "right order, sequences with both events named",
}
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {  # file: what its panels draw, by title
    "training": {"losses": ("loss", "decoder_loss", "guided_loss", "alignment_loss")},
    "modality_gap": {
        "distance of mean audio and text embedding": ("modality_gap",),
        "their cosine": ("modality_cosine",),
    },
}
CONTROL_COLUMNS = ("single_accuracy", "event_f1", "cider_d", "meteor")
PAPER = (("METEOR", 27.1), ("CIDEr-D", 91.1), ("SPICE", 19.7), ("SPIDEr", 55.4), ("SPIDEr-FL", 55.3), ("FENSE", 67.7))


def build_repository(
    run: str | Path, out: str | Path, repo_id: str, merge: bool = False, max_shard_size: str = "5GB"
) -> None:
    """
    The exact repository of a run: weights, processor, code, recipe, scores and card.

    Args:
        run: the `output_dir` of a recipe; `scores/scores.json` in it is what `score.py` wrote.
        out: the folder to fill.
        repo_id: `organisation/name`, for the card's quick start.
        merge: fold LoRA into the backbones and save everything, instead of a small checkpoint.
        max_shard_size: of a file of weights.
    """
    run, out = Path(run), Path(out)
    model, processor = LambForAudioCaptioning.from_pretrained(run, dtype="auto"), LambProcessor.from_pretrained(run)
    weights = model.state_dict()
    if merge:
        weights = model.merge_adapters().state_dict()
    else:  # in the precision in which the run keeps them
        for file in run.glob("*.safetensors"):
            with safe_open(file, framework="pt") as kept:
                weights |= {key: weights[key].to(kept.get_tensor(key).dtype) for key in kept.keys()}  # noqa: SIM118
    model.save_pretrained(out, state_dict=weights, save_backbones=merge or None, max_shard_size=max_shard_size)
    processor.save_pretrained(out)
    for name in ("recipe.yaml", "environment.json", "data.json", "scores/scores.json"):
        if (run / name).is_file():
            (out / Path(name).name).write_bytes((run / name).read_bytes())
    plot_training(run, out)
    render_card(run, repo_id).save(out / "README.md")


def plot_training(run: str | Path, out: str | Path) -> None:
    """
    Draws what the run's stages logged, one after the other, into `out`: `training.png`, the losses by step, and
    `modality_gap.png`, the distance and cosine of mean audio and mean text embedding (the columns of Table 2).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The card's figures need matplotlib: pip install 'lamb-captioning[publish]'") from error
    log, ends = _whole_log(Path(run))
    for name, panels in _drawn(log).items():
        figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
        for axes, (title, terms) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for term in terms:
                points = [(entry["step"], float(entry[term])) for entry in log if term in entry]
                axes.plot(*zip(*points, strict=True), label=term.replace("_", " "))
            for end in ends[:-1]:
                axes.axvline(end, color="0.7", linestyle=":")  # where one stage ends and the next begins
            axes.set(xlabel="step", title=title)
            axes.legend()
        figure.savefig(Path(out) / f"{name}.png", dpi=110)


def _drawn(log: list[dict[str, float]]) -> dict[str, dict[str, list[str]]]:
    """Of the figures, their panels and what these draw, what the log holds."""
    found = {
        name: {
            title: [term for term in terms if any(term in entry for entry in log)] for title, terms in panels.items()
        }
        for name, panels in FIGURES.items()
    }
    return {name: panels for name, panels in found.items() if any(panels.values())}


def _whole_log(run: Path) -> tuple[list[dict[str, float]], list[float]]:
    """The logs of all stages with their steps counted on, and the step at which each stage ended."""
    log: list[dict[str, float]] = []
    ends: list[float] = [0]
    for stage in yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["stages"]:
        log += [entry | {"step": ends[-1] + entry["step"]} for entry in _log(run / stage["name"])]
        ends.append(log[-1]["step"] if log else 0)
    return log, ends[1:]


def _log(folder: Path) -> list[dict[str, float]]:
    """What the Trainer logged of a stage while it trained."""
    state = _json(folder / "trainer_state.json") or {"log_history": []}
    return [entry for entry in state["log_history"] if "loss" in entry]


def problems(folder: str | Path) -> list[str]:
    """Why a repository's folder must not be sent, a sentence each; empty when all is well."""
    folder = Path(folder)
    found = [f"{name} is missing." for name in NEEDED if not (folder / name).is_file()]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found.append("There are no weights (*.safetensors).")
    keys: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                keys.add(key)
                tensor = weights.get_tensor(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    found.append(f"{file.name}: {key} holds NaN or infinite values.")
    if (folder / "config.json").is_file():
        text_model_id = str(LambConfig.from_pretrained(folder).text_model_id or "")
        base = [key for key in keys if key.startswith("language_model.") and "lora_" not in key]
        if base and GATED.search(text_model_id):
            found.append(
                f"The weights of {text_model_id}, which is gated, are in it ({base[0]}): save a small checkpoint."
            )
    if (folder / "adapter_config.json").is_file():
        found.append("adapter_config.json would make the Hub load another model: remove it.")
    if (folder / "README.md").is_file():
        found += _card_problems(folder)
    return found


def _card_problems(folder: Path) -> list[str]:
    card = ModelCard.load(folder / "README.md")
    found = []
    if not card.data.get("license"):
        found.append("The card names no licence: give `card.license` in the recipe.")
    if residue := re.search(r"\{\{|\}\}|\{%|TODO|FIXME|More Information Needed|\[\w+ here\]", card.content):
        found.append(f"The card holds placeholder text: {residue[0]!r}.")
    measured = json.loads((folder / "scores.json").read_text()) if (folder / "scores.json").is_file() else None
    if card.data.eval_results and measured is None:
        found.append("The card gives scores, but there is no scores.json that measured them.")
    return found


def render_card(run: str | Path, repo_id: str) -> ModelCard:
    """The card of `model_card.md`, filled with the run's recipe, logs, environment, data and scores."""
    run = Path(run)
    config: Any = LambConfig.from_pretrained(run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    said = recipe.get("card") or {}
    scores = _json(run / "scores" / "scores.json")
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        language=said.get("language", "en"),
        license=said.get("license"),
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=["audio-captioning", "lamb"],
        datasets=said.get("datasets"),
        metrics=["cider", "meteor"] if scores else None,
        base_model=said.get("base_model"),
        model_name=name,
        eval_results=_eval_results(scores, said) if scores else None,
    )
    adapters = {"two_stream": "a Two-Stream Adapter", "linear": "a linear adapter", "qformer": "a Q-Former"}
    sources = [
        f"{source['name']}, {source['clips']} clips"
        + "".join(f", {count} {reason}" for reason, count in source.get("left_out", {}).items())
        for source in _json(run / "data.json") or []
    ]
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        summary=said.get("summary", "Describes what is heard in a recording."),
        audio_model=said.get("audio_model") or config.audio_model_id or config.audio_config.model_type,
        text_model=said.get("text_model") or config.text_model_id or config.text_config.model_type,
        frozen_encoder=config.freeze_audio_encoder,
        trained_audio_layers=config.num_trained_audio_layers,
        adapter=f"{adapters[config.adapter_type]} ({config.num_audio_tokens} embeddings a clip)",
        lora=config.peft_config,
        audio_lora=config.audio_peft_config,
        parameters=f"{environment['parameters']:,}",
        trained=f"{sum(environment['trainable_parameters'].values()):,}",
        scores=_scores(scores, said) if scores else None,
        paper=PAPER if scores else None,
        stages=[_stage(run / stage["name"], stage) for stage in recipe["stages"]],
        figures=list(_drawn(_whole_log(run)[0])),
        data=sources or ["not recorded"],
        environment=", ".join(
            f"{key} {environment[key]}" for key in ("hardware", "python", "torch", "transformers") if key in environment
        ),
        limits=said.get("limits", "Not known."),
        licences=said.get("licences", []),
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _measured(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every score with an interval, by name."""
    both = scores["scores"] | scores.get("soundscapes", {})
    return {name: both[name] for name in METRICS if isinstance(both.get(name), dict) and both[name]["n"]}


def _scores(scores: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    controls = []
    for name, values in scores.get("controls", {}).items():
        cells = [
            f"{values[c]['value']:.3f}" if isinstance(values.get(c), dict) and values[c]["n"] else ""
            for c in CONTROL_COLUMNS
        ]
        controls.append({"name": name.replace("_", " "), "cells": cells})
    return {
        "intro": f"{said.get('test_set', 'Test split')}, {scores['clips']} clips, {_decoding(scores)}; measured by `score.py`, with "
        f"bootstrap intervals over clips. Words were split by the {'Penn Treebank' if scores['tokenizer'] == 'ptb' else 'Python'} tokenizer.",
        "rows": [{"name": METRICS[name]} | value for name, value in _measured(scores).items()],
        "controls": controls,
        "columns": [METRICS[name] for name in CONTROL_COLUMNS],
        "skipped": [METRICS.get(name, name) for name in scores.get("skipped", {})],
    }


def _decoding(scores: dict[str, Any]) -> str:
    beams = scores["generation"].get("num_beams", 1)
    candidates, weight = (scores["generation"].get(name) for name in ("num_candidates", "token_guide_weight"))
    how = "greedy decoding" if beams == 1 else f"{beams} beams"
    if candidates is not None:
        how = f"nearest of {candidates} candidates"
    return how + ("" if weight is None else f", guide {weight}")


def _eval_results(scores: dict[str, Any], said: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="audio-text-to-text",
            task_name="audio captioning",
            dataset_type=said.get("test_set_id", "custom"),
            dataset_name=said.get("test_set", "test split"),
            dataset_split="test",
            metric_type=name,
            metric_name=f"{METRICS[name]} ({_decoding(scores)}, n {value['n']}, 95 % {value['low']:.3f} to {value['high']:.3f})",
            metric_value=round(value["value"], 4),
        )
        for name, value in _measured(scores).items()
    ]


def _stage(folder: Path, stage: dict[str, Any]) -> dict[str, Any]:
    state, log = _json(folder / "trainer_state.json") or {"log_history": []}, _log(folder)
    # of the steps since the last interruption, which are what the Trainer times
    pace = next((entry["train_steps_per_second"] for entry in state["log_history"] if "train_runtime" in entry), 0)
    terms = [
        term
        for term in ("decoder_loss", "guided_loss", "alignment_loss", "modality_gap", "modality_cosine", "guide_weight")
        if log and term in log[0]
    ]
    shown = [log[round(i * (len(log) - 1) / 7)] for i in range(8)] if len(log) >= 8 else log
    training = stage.get("training", {})
    return {
        "name": stage["name"],
        "steps": state.get("global_step", "?"),
        "batch": training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1),
        "rate": training.get("learning_rate", 5e-5),
        "minutes": round(state["global_step"] / pace / 60) if pace else "?",
        "terms": terms,
        "curve": [[entry["step"], *(f"{float(entry[term]):.3f}" for term in terms)] for entry in shown],
    }


STRANGER = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lamb", "processing_lamb", "training_lamb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from transformers import pipeline

repo, revision, sound = sys.argv[1:]
captioner = pipeline(
    "audio-captioning", model=repo, revision=revision, code_revision=revision, trust_remote_code=True
)
print(captioner(sound, max_new_tokens=40)[0]["generated_text"])
"""


def verify(folder: str | Path, repo_id: str, revision: str, sound: str) -> str:
    """
    Downloads a repository into an empty cache in a fresh process that has none of our packages, and captions a sound.

    Returns:
        The caption.

    Raises:
        RuntimeError: when it cannot be loaded, or its caption is not that of the local `folder`.
    """
    captioner = AudioCaptioningPipeline(
        model=LambForAudioCaptioning.from_pretrained(folder), processor=LambProcessor.from_pretrained(folder)
    )
    mine = captioner(sound, max_new_tokens=40)[0]["generated_text"]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, repo_id, revision, sound],
            env=os.environ | {"HF_HOME": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{repo_id} at {revision} could not be loaded: {done.stderr.strip().splitlines()[-1]}")
    theirs = done.stdout.strip().splitlines()[-1]
    if theirs != mine:
        raise RuntimeError(f"{repo_id} at {revision} says {theirs!r}, the local model {mine!r}.")
    print(f"Verified: {theirs}")
    return theirs
