"""A saved folder in a fresh process that has none of our packages: its own code must do, also after load, save, load."""

import json
import os
import subprocess
import sys

import pytest
import soundfile
import torch
from conftest import noise, tiny_config
from transformers import AutoModelForCausalLM, pipeline

from modeling_lamb import CedModel, LambConfig, LambForAudioCaptioning

SCRIPT = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lamb", "processing_lamb", "training_lamb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

folder, sound, out = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
second = AutoModelForMultimodalLM.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
captioner = pipeline("audio-captioning", model=folder, **trust)
inputs = processor(audio=sound)
caption = processor.batch_decode(model.generate(**inputs, max_new_tokens=6, num_beams=2), skip_special_tokens=True)[0]
again = processor.batch_decode(second.generate(**inputs, max_new_tokens=6, num_beams=2), skip_special_tokens=True)[0]
piped = captioner(sound, max_new_tokens=6, num_beams=2)[0]["generated_text"]
guided = captioner(sound, max_new_tokens=6, token_guide_weight=3.0)[0]["generated_text"]
captioner.save_pretrained(out + "/pipeline")
model.save_pretrained(out + "/parts")
processor.save_pretrained(out + "/parts")
classes = [type(thing) for thing in (config, model, processor, extractor, captioner, model.audio_encoder)]
modules = sorted(name for name in sys.modules if name.split(".")[0] in ("modeling_lamb", "processing_lamb", "training_lamb"))
print(json.dumps({
    "captions": [caption, again, piped, guided],
    "classes": [kind.__name__ for kind in classes],
    "remote": [kind.__module__.startswith("transformers_modules.") for kind in classes],
    "imported": modules,
    "trainable": sorted({name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}),
}))
"""


def run(folder, sound, out):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    out.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(folder), str(sound), str(out)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def small_model(tmp_path):
    """Trained parts only, beside two backbones: the form in which a model is published."""
    config = tiny_config()
    CedModel(config.audio_config).save_pretrained(tmp_path / "audio")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path / "text")
    config = LambConfig.from_backbones(
        str(tmp_path / "audio"),
        str(tmp_path / "text"),
        num_audio_tokens=4,
        peft_config={"r": 4, "target_modules": ["q_proj", "v_proj"]},
    )
    model = LambForAudioCaptioning.from_backbones(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("form", ["full", "small"])
def test_a_saved_folder_runs_without_our_packages(form, request, processor, tmp_path):
    model = request.getfixturevalue("model" if form == "full" else "small_model")
    soundfile.write(tmp_path / "sound.wav", noise(0.8, 1), 16000, subtype="FLOAT")
    captioner = pipeline("audio-captioning", model=model, processor=processor)
    sound = str(tmp_path / "sound.wav")
    caption = captioner(sound, max_new_tokens=6, num_beams=2)[0]["generated_text"]
    guided = captioner(sound, max_new_tokens=6, token_guide_weight=3.0)[0]["generated_text"]
    captioner.save_pretrained(tmp_path / "saved")
    first = run(tmp_path / "saved", sound, tmp_path / "1")
    assert first == {
        "captions": [caption, caption, caption, guided],
        "classes": [
            "LambConfig",
            "LambForAudioCaptioning",
            "LambProcessor",
            "LambFeatureExtractor",
            "AudioCaptioningPipeline",
            "CedModel",
        ],
        "remote": [True] * 6,
        "imported": [],
        "trainable": ["adapter", "language_model", "token_guide"],
    }
    if form == "full":  # what it saved, and what is saved of that
        assert run(tmp_path / "1" / "pipeline", sound, tmp_path / "2") == first
        assert run(tmp_path / "2" / "parts", sound, tmp_path / "3") == first
    else:
        assert run(tmp_path / "1" / "parts", sound, tmp_path / "2") == first


def test_with_the_package_the_folders_code_is_not_run(model, processor, tmp_path):
    """No question whether to trust it, and our own classes."""
    pipeline("audio-captioning", model=model, processor=processor).save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise RuntimeError('run')")
    loaded = pipeline("audio-captioning", model=str(tmp_path))
    assert type(loaded.model) is LambForAudioCaptioning and type(loaded.processor) is type(processor)
