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
from training_lamb.readers import read_table, to_dataset

from modeling_lamb import LambForAudioCaptioning

SCRIPT = Path(__file__).parents[1] / "train.py"
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}


def run(recipe, *flags, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {"OMP_NUM_THREADS": "1", "LAMB_CACHE": str(recipe.parent / "cache")}
    command = [sys.executable, *launcher, str(SCRIPT), str(recipe), *flags]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


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
    (tmp_path / "train" / "7.wav").write_bytes(b"")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_a_recipe_runs_on_two_ranks(recipe, tmp_path):
    run(recipe, ranks=2)
    out = tmp_path / "run"
    noted = [(entry["clips"], entry["left_out"]) for entry in json.loads((out / "data.json").read_text())]
    assert noted == [(7, {"unreadable": 1}), (8, {})]
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    state = json.loads((out / "captioning" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and "eval_cider_d" in state["log_history"][-2]
    for folder in (out, out / "captioning"):
        assert LambForAudioCaptioning.from_pretrained(folder).config.audio_token_id


@pytest.mark.slow
def test_a_streamed_recipe_goes_on_where_it_stopped_and_runs_on_two_ranks(recipe, tmp_path):
    clips, _ = read_table(tmp_path / "train")
    for shard in range(2):
        to_dataset(clips[shard::2]).to_parquet(tmp_path / "set" / f"train-{shard}.parquet")
    content = yaml.safe_load(recipe.read_text())
    training = STEPS | {"lr_scheduler_type": "constant", "save_steps": 2}
    content |= {
        "train": {"hub": {"path": str(tmp_path / "set")}},
        "validation": None,
        "cache_encoder_tokens": False,
        "shuffle_buffer": 4,
        "max_seconds": 0.3,
        "stages": [{"name": "captioning", "training": training}],
    }
    recipe.write_text(yaml.safe_dump(content))

    def losses(folder):
        log = json.loads((tmp_path / folder / "captioning" / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}

    run(recipe, "--output_dir", str(tmp_path / "straight"), "--stages.0.training.max_steps", "4")
    run(recipe, "--output_dir", str(tmp_path / "broken"))
    (tmp_path / "broken" / "captioning" / "finished").unlink()
    run(recipe, "--output_dir", str(tmp_path / "broken"), "--stages.0.training.max_steps", "4")
    assert losses("broken") == losses("straight") and len(losses("straight")) == 4
    run(recipe, "--output_dir", str(tmp_path / "two"), ranks=2)
    assert len(losses("two")) == 2
