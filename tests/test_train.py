"""train.py from the outside, on two ranks: data, stages, captions of validation clips, and the model that is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml
from conftest import CAPTIONS, noise, write_table

from modeling_lamb import LambForAudioCaptioning

SCRIPT = Path(__file__).parents[1] / "train.py"
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def recipe(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for number in range(8):
            soundfile.write(tmp_path / split / f"{number}.wav", noise(0.3 + 0.1 * (number % 3), number), 16000)
        rows = [(f"{number}.wav", CAPTIONS[number % 4]) for number in range(8)]
        write_table(tmp_path / split / "metadata.csv", rows)
    chosen = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "eval_cider_d"}
    content = {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(tmp_path / "start"),
        "train": {"folder": str(tmp_path / "train")},
        "validation": {"folder": str(tmp_path / "validation")},
        "cache_encoder_tokens": True,
        "generation": {"max_new_tokens": 4},
        "stages": [
            {"name": "alignment", "alignment_only": True, "training": STEPS},
            {"name": "captioning", "training": STEPS | chosen},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_a_recipe_runs_on_two_ranks(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "LAMB_CACHE": str(tmp_path / "cache")}
    command += [str(SCRIPT), str(recipe)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    run = tmp_path / "run"
    assert [(entry["clips"], entry["left_out"]) for entry in json.loads((run / "data.json").read_text())] == [
        (8, {})
    ] * 2
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    state = json.loads((run / "captioning" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and "eval_cider_d" in state["log_history"][-2]
    for folder in (run, run / "captioning"):
        assert LambForAudioCaptioning.from_pretrained(folder).config.audio_token_id
