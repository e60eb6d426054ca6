"""Transformers' common pipeline tests, as they stand, on the task `audio-captioning`."""

import copy
import json
import os
import shutil
import tempfile
import types
import unittest
from pathlib import Path
from unittest.mock import patch

import numpy as np
import soundfile
from conftest import noise, randomized, tiny_config, tiny_tokenizer, tokenizer_json
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers_suites import suite

from modeling_lamb import AudioCaptioningPipeline, LambFeatureExtractor, LambForAudioCaptioning, LambProcessor

# The suite knows its tasks and tiny models by tables. A pipeline that joins the library adds a line to each; here the
# tiny model lies in a folder, which the suite takes instead of the Hub's.
FOLDER = Path(tempfile.mkdtemp(prefix="lamb-tiny-models-"))
(FOLDER / "reports").mkdir()
COMPONENTS = {
    "tokenizer_classes": ["PreTrainedTokenizerFast"],
    "processor_classes": ["LambFeatureExtractor"],
    "model_classes": ["LambForAudioCaptioning"],
}
(FOLDER / "reports" / "tiny_model_summary.json").write_text(json.dumps({"LambForAudioCaptioning": COMPONENTS}))
CLASSES = types.SimpleNamespace(
    PreTrainedTokenizerFast=PreTrainedTokenizerFast,
    LambFeatureExtractor=LambFeatureExtractor,
    LambProcessor=LambProcessor,
)
with (
    patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=str(FOLDER)),
    patch("transformers.utils.direct_transformers_import", return_value=CLASSES),  # of a checkout's own sources
):
    pipelines = suite("test_pipeline_mixin")
pipelines.pipeline_test_mapping["audio-captioning"] = {"test": f"{__name__}.AudioCaptioningPipelineTests"}


class AudioCaptioningPipelineTests:
    """What the suite asks of a task: a pipeline with examples, and what must come out."""

    def get_test_pipeline(
        self, model, tokenizer=None, feature_extractor=None, processor=None, dtype="float32", **kwargs
    ):
        captioner = AudioCaptioningPipeline(
            model=model, tokenizer=tokenizer, feature_extractor=feature_extractor, processor=processor, dtype=dtype
        )
        soundfile.write(FOLDER / "sound.wav", noise(0.7), 16000)
        examples = [
            {"raw": noise(0.5), "sampling_rate": 16000},
            {"array": np.stack([noise(0.4), noise(0.4, 1)]), "sampling_rate": 8000},
            str(FOLDER / "sound.wav"),
        ]
        return captioner, examples

    def run_pipeline_test(self, captioner, examples):
        for example in examples:
            assert captions(captioner(copy.copy(example))) == 1
        assert [captions(result) for result in captioner(examples, batch_size=2)] == [1] * len(examples)
        assert captions(captioner(examples[0], generate_kwargs={"num_beams": 2}, num_return_sequences=2)) == 2
        (long,) = captioner(examples[2], chunk_length_s=0.3, return_timestamps=True)
        times = [chunk["timestamp"] for chunk in long["chunks"]]
        assert times == [(0.0, 0.3), (0.3, 0.7)]  # a short rest joins the last window


def captions(result):
    """How many there are, in the form that every pipeline which writes text returns."""
    assert all(list(caption) == ["generated_text"] and isinstance(caption["generated_text"], str) for caption in result)
    return len(result)


class LambPipelineTest(pipelines.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"audio-captioning": LambForAudioCaptioning}

    @classmethod
    def setUpClass(cls):
        folder = FOLDER / "lamb" / "LambForAudioCaptioning"
        randomized(LambForAudioCaptioning(tiny_config())).save_pretrained(folder)
        tokenizer = tiny_tokenizer(tokenizer_json())
        LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=4).save_pretrained(folder)
        cls.enterClassContext(patch.dict(PROCESSOR_MAPPING_NAMES, lamb="LambProcessor"))
        cls.addClassCleanup(shutil.rmtree, FOLDER)

    def test_pipeline_audio_captioning(self):
        self.run_task_tests("audio-captioning")

    def test_pipeline_audio_captioning_fp16(self):
        self.run_task_tests("audio-captioning", dtype="float16")
