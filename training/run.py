"""The steps of `train.py`: data, stages, and what is kept of them."""

import dataclasses
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_lamb import LambForAudioCaptioning, LambProcessor

from .data import CaptionCollator, EncodedClips, OneRowPerCaption, WaveformClips
from .recipe import Recipe, Source, Stage
from .trainer import LambTrainer

logger = logging.get_logger(__name__)


def encode_sources(
    recipe: Recipe, model: LambForAudioCaptioning, processor: LambProcessor
) -> tuple[Dataset, Dataset | None]:
    """The training and validation rows, one a caption."""
    train = _rows(recipe, recipe.train, model, processor)
    return train, None if recipe.validation is None else _rows(recipe, recipe.validation, model, processor)


def _rows(recipe: Recipe, source: Source, model: LambForAudioCaptioning, processor: LambProcessor) -> Dataset:
    clips, name = source.read()
    if not recipe.cache_encoder_tokens:
        waveforms = WaveformClips(clips, processor.feature_extractor.sampling_rate)
        return OneRowPerCaption(waveforms, [len(clip.captions) for clip in clips])
    if not model.config.freeze_audio_encoder or model.config.audio_peft_config is not None:
        raise ValueError(
            "cache_encoder_tokens needs a frozen encoder: set freeze_audio_encoder and no audio_peft_config."
        )
    encoded = EncodedClips(clips, processor, model.eval(), recipe.token_cache(), name, recipe.preprocessing_num_workers)
    return OneRowPerCaption(encoded, [len(item["captions"]) for item in encoded.items])


def run_stages(
    recipe: Recipe,
    model: LambForAudioCaptioning,
    processor: LambProcessor,
    train: Dataset,
    validation: Dataset | None,
) -> None:
    """Trains stage after stage; one that was finished before is read back, one that was interrupted goes on."""
    _describe(recipe, model)
    for stage in recipe.stages:
        folder = Path(recipe.output_dir) / stage.name
        for name, value in stage.model.items():
            setattr(model.config, name, value)
        model.freeze_backbones()
        model.adapter.requires_grad_(not stage.freeze_adapter)
        if (folder / "finished").is_file():
            logger.warning(f"Stage {stage.name} was finished before; its weights are read from {folder}.")
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            continue
        trainer = _trainer(recipe, stage, folder, model, processor, train, validation)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
        trainer.save_model()
        trainer.save_state()
        (folder / "finished").touch()


def _trainer(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    model: LambForAudioCaptioning,
    processor: LambProcessor,
    train: Dataset,
    validation: Dataset | None,
) -> LambTrainer:
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "report_to": "none",
        "label_names": ["labels"],
    }
    settings |= stage.training
    if validation is None:
        settings["eval_strategy"] = "no"
    return LambTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor),
        alignment_only=stage.alignment_only,
        guide_learning_rate=stage.guide_learning_rate,
    )


def _describe(recipe: Recipe, model: LambForAudioCaptioning) -> None:
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    trainable = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in model.named_children()
    }
    environment = {
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "trainable_parameters": trainable,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")


def save_result(recipe: Recipe, model: LambForAudioCaptioning, processor: LambProcessor) -> None:
    """The model in `save_dtype`, its processor and its code, in the run's folder."""
    dtype = getattr(torch, recipe.save_dtype)
    weights = {
        name: value.to(dtype) if value.is_floating_point() and value.dim() else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(recipe.output_dir, state_dict=weights)
    processor.save_pretrained(recipe.output_dir)
