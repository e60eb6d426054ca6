"""Recipe files: what model, what data, what stages of training. A key that does not exist is refused."""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from processing_lamb import LambFeatureExtractor
from transformers import AutoFeatureExtractor, AutoTokenizer, TrainingArguments

from modeling_lamb import LambConfig, LambForAudioCaptioning, LambProcessor
from modeling_lamb.packaged_backbone import cache_folder, resolve_backbone

from .convert_yamnet import yamnet_folder
from .data import Clip, read_folder


@dataclass
class Source:
    """
    Where clips come from; exactly one of `folder` and `soundscapes`.

    Args:
        folder: sound files with a metadata.csv or metadata.jsonl.
        soundscapes: `{split, clips, seed}` of composed clips (see `training/soundscapes`).
    """

    folder: str | None = None
    soundscapes: dict | None = None

    def read(self) -> tuple[Sequence[Clip], str]:
        """The clips, and a name that changes when they do."""
        if (self.folder is None) == (self.soundscapes is None):
            raise ValueError("A data source needs either 'folder' or 'soundscapes'.")
        if self.folder is not None:
            return read_folder(self.folder), Path(self.folder).resolve().name
        from .soundscapes import mixing  # its parts are installed by the extra `mini` only
        from .soundscapes.sources import fetch

        settings = self.soundscapes or {}
        fetch()
        corpus = hashlib.sha256(
            b"".join(file.read_bytes() for file in sorted(Path(mixing.__file__).parent.glob("*.*")))
        )
        names = [str(value) for value in settings.values()]
        return mixing.SoundscapeClips(**settings), "-".join(["soundscapes", *names, corpus.hexdigest()[:8]])


@dataclass
class Stage:
    """
    One run of the Trainer.

    Args:
        name: of its folder in the run's.
        training: fields of `transformers.TrainingArguments`.
        alignment_only: train by the aligner's losses alone, without the LLM.
        freeze_adapter: keep the adapter as it is.
        guide_learning_rate: of beta (Eq. 12); None takes that of everything else.
        model: fields of LambConfig that differ in this stage (loss weights).
    """

    name: str
    training: dict = field(default_factory=dict)
    alignment_only: bool = False
    freeze_adapter: bool = False
    guide_learning_rate: float | None = None
    model: dict = field(default_factory=dict)


@dataclass
class Recipe:
    """
    Args:
        output_dir: where checkpoints, logs and the result go.
        model: fields of LambConfig; `audio_model_id: yamnet` stands for the converted YAMNet.
        processor: `prompt_template`, `prompt`.
        init_from: a LAMB checkpoint to go on from, instead of `model`.
        train, validation: sources of clips.
        cache_encoder_tokens: encode every clip once (the encoder must be frozen) and keep the tokens on disk.
        preprocessing_num_workers: processes that fill that cache, each on one CPU thread; 0 uses the model's device.
        save_dtype: of the weights that are saved at the end.
        stages: one after the other.
        seed: of everything.
    """

    output_dir: str
    train: Source
    stages: list[Stage]
    model: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    init_from: str | None = None
    validation: Source | None = None
    cache_encoder_tokens: bool = False
    preprocessing_num_workers: int = 0
    save_dtype: str = "float32"
    seed: int = 42

    def build(self) -> tuple[LambForAudioCaptioning, LambProcessor]:
        """The model and processor to train."""
        if self.init_from is not None:
            model = LambForAudioCaptioning.from_pretrained(self.init_from)
            for name, value in self.model.items():
                setattr(model.config, name, value)
            return model, LambProcessor.from_pretrained(self.init_from)
        settings = dict(self.model)
        own_encoder = settings.get("audio_model_id") == "yamnet"
        if own_encoder:
            settings["audio_model_id"] = str(yamnet_folder())
        _check_names("model", settings, LambConfig)
        audio_id, text_id = settings["audio_model_id"], settings["text_model_id"]
        extractor = (
            AutoFeatureExtractor.from_pretrained(audio_id)
            if own_encoder or Path(audio_id, "preprocessor_config.json").is_file()
            else LambFeatureExtractor()
        )
        tokens = settings.get("num_audio_tokens", LambConfig.num_audio_tokens)
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(text_id))
        processor = LambProcessor(extractor, tokenizer, num_audio_tokens=tokens, **self.processor)
        config = LambConfig.from_backbones(**settings, audio_token_id=processor.audio_token_id)
        model = LambForAudioCaptioning.from_backbones(config)
        if own_encoder:  # no hub serves this encoder: its 3 million weights travel in the checkpoint
            model.config.audio_model_id = None
        return model, processor

    def token_cache(self) -> Path:
        return cache_folder() / "encoder-tokens"


def load_recipe(file: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """
    A recipe file, with `overrides` of dotted names (`{"stages.0.training.max_steps": 100}`) laid over it.

    Raises:
        ValueError: on a key that no recipe has, suggesting the nearest; on a missing one.
    """
    data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    for name, value in (overrides or {}).items():
        _set(data, name.split("."), value, name)
    _check_names("recipe", data, Recipe)
    missing = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory and f.name not in data]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    for name in ("train", "validation"):
        if data.get(name) is not None:
            _check_names(name, data[name], Source)
            data[name] = Source(**data[name])
    stages = []
    for stage in data["stages"]:
        _check_names("stages", stage, Stage)
        _check_names("training", stage.get("training", {}), TrainingArguments)
        _check_names("model", stage.get("model", {}), LambConfig)
        stages.append(Stage(**stage))
    return Recipe(**data | {"stages": stages})


def _set(data: Any, path: list[str], value: Any, name: str) -> None:
    *parents, last = path
    for key in parents:
        if isinstance(data, list):
            data = data[int(key)]
        else:
            data = data.setdefault(key, {})
            if data is None:
                raise ValueError(f"--{name}: {key} is empty in the recipe.")
    data[int(last) if isinstance(data, list) else last] = value


def _check_names(where: str, given: dict, kind: type) -> None:
    known = {f.name for f in dataclasses.fields(kind) if not f.name.startswith("_")}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known are {', '.join(sorted(known))}."
            raise ValueError(f"{name!r} is no key of {where}.{hint}")
