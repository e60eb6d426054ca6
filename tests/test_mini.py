"""The shipped model on the bundled recordings, none of which it was trained on. Fetches SmolLM2 on first use."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, pipeline

from modeling_lamb import LambForAudioCaptioning, default_checkpoint
from modeling_lamb.__main__ import main

EXAMPLES = Path(__file__).parents[1] / "examples"
HEARD = {
    "cow": "cow",
    "dog": "dog",
    "duck": "duck",
    "frog": "frog",
    "horse": "horse",
    "owl": "owl",
    "rooster": "rooster",
    "sheep": "sheep",
}


@pytest.fixture(scope="module")
def captioner():
    return pipeline("audio-captioning")


@pytest.mark.slow
@pytest.mark.parametrize("animal", sorted(HEARD))
def test_the_bundled_recordings_are_named(captioner, animal):
    caption = captioner(str(EXAMPLES / f"{animal}.mp3"))[0]["generated_text"].lower()
    assert HEARD[animal] in caption


@pytest.mark.slow
def test_the_default_checkpoint_is_small_and_loads_by_the_auto_class():
    folder = Path(default_checkpoint())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40e6
    assert isinstance(AutoModel.from_pretrained(folder), LambForAudioCaptioning)


@pytest.mark.slow
def test_the_command_prints_a_caption_a_line_and_goes_on_after_a_bad_file(tmp_path, capsys):
    (tmp_path / "text.wav").write_text("This is no sound.")
    assert main(["caption", str(tmp_path / "text.wav"), str(EXAMPLES / "dog.mp3"), "--json"]) == 1
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "cannot be decoded" in bad["error"] and bad["generated_text"] is None
    assert "dog" in good["generated_text"].lower()
