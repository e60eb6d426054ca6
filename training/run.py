"""The steps of `train.py`: data, stages, and what is kept of them."""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_lamb import LambForAudioCaptioning, LambProcessor

from .data import CaptionCollator, EncodedClips, JoinedRows, OneRowPerCaption, WaveformClips, WeightedRows, stream_rows
from .memory import GIB, estimate_memory
from .readers import caption_counts
from .recipe import Recipe, Source, Stage
from .trainer import LambTrainer

logger = logging.get_logger(__name__)


def processes() -> PartialState:
    """
    The processes that `torchrun` started, one where none did. Accelerate alone takes those without an accelerator for
    single ones.
    """
    return PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether there is no accelerator, or ACCELERATE_USE_CPU forbids it."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def encode_sources(
    recipe: Recipe, model: LambForAudioCaptioning, processor: LambProcessor
) -> tuple[Dataset, OneRowPerCaption | None]:
    """The training and validation rows, one a caption."""
    train: Any
    if recipe.shuffle_buffer is not None:
        streams = [(source.stream(), source.weight) for source in recipe.train]
        rate = processor.feature_extractor.sampling_rate
        train = stream_rows(streams, rate, recipe.max_seconds, recipe.shuffle_buffer, recipe.seed)
    else:
        parts: list[Any] = []
        for source in recipe.train:
            rows = _rows(recipe, source, model, processor, True)
            parts.append(rows if source.weight == 1 else WeightedRows(rows, source.weight, recipe.seed))
        train = parts[0] if len(parts) == 1 else JoinedRows(parts)
    if recipe.validation is None:
        return train, None
    if re.search(r"test|evaluation", str(recipe.validation), re.IGNORECASE):
        logger.warning(f"{recipe.validation} looks like a test set: a checkpoint chosen on it has no test score.")
    return train, _rows(recipe, recipe.validation, model, processor, False)


def _rows(
    recipe: Recipe, source: Source, model: LambForAudioCaptioning, processor: LambProcessor, random_crop: bool
) -> OneRowPerCaption:
    clips, name = source.read()
    left_out = {} if source.report is None else {why: len(ids) for why, ids in source.report.left_out.items()}
    if not recipe.cache_encoder_tokens:
        rate = processor.feature_extractor.sampling_rate
        _note_data(Path(recipe.output_dir), name, len(clips), left_out)
        waveforms = WaveformClips(clips, rate, recipe.max_seconds, random_crop)
        return OneRowPerCaption(waveforms, caption_counts(clips))
    if not model.config.freeze_audio_encoder or model.config.audio_peft_config is not None:
        raise ValueError(
            "cache_encoder_tokens needs a frozen encoder: set freeze_audio_encoder and no audio_peft_config."
        )
    encoded = EncodedClips(
        clips,
        processor,
        model.eval(),
        recipe.token_cache(),
        name,
        recipe.preprocessing_num_workers,
        recipe.max_seconds,
    )
    unreadable = {"unreadable": len(encoded.skipped)} if encoded.skipped else {}
    _note_data(Path(recipe.output_dir), name, len(encoded), left_out | unreadable)
    return OneRowPerCaption(encoded, [len(item["captions"]) for item in encoded.items])


def _note_data(folder: Path, name: str, clips: int, left_out: dict[str, int]) -> None:
    """Keeps in `data.json` how many clips of each source are used, and how many are not and why."""
    if not processes().is_main_process:
        return
    file = folder / "data.json"
    folder.mkdir(parents=True, exist_ok=True)
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    noted = [entry for entry in noted if entry["name"] != name] + [{"name": name, "clips": clips, "left_out": left_out}]
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(noted, indent=2), encoding="utf-8")
    os.replace(temporary, file)  # another process never sees half of it


def run_stages(
    recipe: Recipe,
    model: LambForAudioCaptioning,
    processor: LambProcessor,
    train: Dataset,
    validation: OneRowPerCaption | None,
) -> None:
    """Trains stage after stage; one that was finished before is read back, one that was interrupted goes on."""
    if processes().is_main_process:
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
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        trainer.save_model()
        trainer.save_state()
        (folder / "finished").touch()


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer's state comes last, and a full disk may prevent it."""
    found = {
        int(path.parent.name.split("-")[-1]): path.parent
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
    }
    whole = {step: path for step, path in found.items() if _is_json(path / "trainer_state.json")}
    return str(whole[max(whole)]) if whole else None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _trainer(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    model: LambForAudioCaptioning,
    processor: LambProcessor,
    train: Dataset,
    validation: OneRowPerCaption | None,
) -> LambTrainer:
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "report_to": "none",
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "use_cpu": on_cpu(),
    }
    if recipe.shuffle_buffer is not None:  # each rank reads its own shards, and pads its own batches
        settings["accelerator_config"] = {"dispatch_batches": False}
    settings |= stage.training
    if validation is None:
        settings["eval_strategy"] = "no"
    return LambTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor, recipe.spec_augment),
        processing_class=processor,
        caption_dataset=None if validation is None else validation.clips,
        generation=recipe.generation,
        alignment_only=stage.alignment_only,
        learning_rates=stage.learning_rates,
    )


def plan(recipe: Recipe) -> str:
    """
    What a recipe would do, without weights: the recipe itself, its data, parameters, steps and memory.

    The memory is for clips of `max_seconds` (10 without) and 40 tokens of text. The largest batches leave a tenth of the
    device free.
    """
    lines = [yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)]
    config, ranks, rows = recipe.config(), int(os.environ.get("WORLD_SIZE", 1)), 0
    for source in [*recipe.train, *([recipe.validation] if recipe.validation else [])]:
        if recipe.shuffle_buffer is not None and source is not recipe.validation:
            lines.append(f"{source.hub}: streamed, {source.stream().num_shards} shards")
            continue
        clips, name = source.read()
        captions = len(clips) if source.soundscapes else sum(caption_counts(clips))
        lines.append(f"{name}: {len(clips)} clips, {captions} captions")
        rows += 0 if source is recipe.validation else round(source.weight * captions)
    dtype = getattr(torch, str(recipe.load.get("dtype", "float32")))
    for stage in recipe.stages:
        training = stage.training
        batch = training.get("per_device_train_batch_size", 8)
        whole = batch * training.get("gradient_accumulation_steps", 1) * ranks
        steps = training.get("max_steps") or -(-rows // whole) * training.get("num_train_epochs", 3)
        memory, one, two = (
            estimate_memory(
                config,
                size,
                seconds=recipe.max_seconds or 10.0,
                dtype=dtype,
                gradient_checkpointing=bool(training.get("gradient_checkpointing")),
                alignment_only=stage.alignment_only,
            )
            for size in (batch, 1, 2)
        )
        trainable = ", ".join(f"{part} {count:,}" for part, count in memory.trainable.items())
        lines.append(
            f"stage {stage.name}: {steps} steps of {whole} clips ({batch} x {whole // batch}); trains {trainable}"
        )
        parts = ("frozen_weights", "trained_weights", "gradients", "optimizer", "activations", "logits")
        lines.append("  GiB a device: " + ", ".join(f"{part} {getattr(memory, part) / GIB:.2f}" for part in parts))
        devices = ranks if ranks > 1 else 8
        for zero in range(4):
            clip = two.total(zero, devices) - one.total(zero, devices)
            rest = one.total(zero, devices) - clip
            sizes = ", ".join(f"{max(0, int((0.9 * gpu * GIB - rest) // clip))} on {gpu} GiB" for gpu in (24, 40, 80))
            lines.append(
                f"  ZeRO-{zero} on {devices}: {memory.total(zero, devices) / GIB:.2f} GiB a device; largest batch {sizes}"
            )
    return "\n".join(lines)


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
        "hardware": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processes": processes().num_processes,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "trainable_parameters": trainable,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")


def save_result(recipe: Recipe, model: LambForAudioCaptioning, processor: LambProcessor) -> None:
    """The model in `save_dtype`, its processor and its code, in the run's folder; one process writes."""
    if not processes().is_main_process:
        return
    if is_deepspeed_zero3_enabled():  # the model holds shards; the last stage's folder, the whole
        for file in (Path(recipe.output_dir) / recipe.stages[-1].name).iterdir():
            if file.is_file() and file.suffix in (".safetensors", ".json", ".py"):
                shutil.copy(file, recipe.output_dir)
        return
    dtype = getattr(torch, recipe.save_dtype)
    weights = {
        name: value.to(dtype) if value.is_floating_point() and value.numel() > 1 else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(recipe.output_dir, state_dict=weights)
    processor.save_pretrained(recipe.output_dir)
