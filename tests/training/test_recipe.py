import json
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from conftest import ENCODERS, noise, randomized, tiny_config, write_table
from training_lamb.memory import estimate_memory
from training_lamb.recipe import load_recipe
from training_lamb.run import last_whole_checkpoint, plan

import train
from modeling_lamb import LambForAudioCaptioning, LambProcessor

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    recipe = load_recipe(file, {"data_root": "data"})
    assert recipe.stages and recipe.output_dir


def test_flags_override_by_dotted_name():
    recipe = load_recipe(RECIPES / "mini.yaml", {"stages.1.training.max_steps": 7, "train.soundscapes.clips": 9})
    assert recipe.stages[1].training["max_steps"] == 7
    assert recipe.train[0].soundscapes["clips"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sead": 1}, "Did you mean 'seed'"),
        ({"stages.0.training.learning_rat": 1}, "learning_rate"),
        ({"train.folders": "x"}, "Did you mean 'folder'"),
        ({"stages.1.model": {"num_trained_audio_layers": 0}}, "is the same in all stages"),
    ],
)
def test_wrong_keys_are_refused_with_what_is_right(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / "mini.yaml", override)


def test_a_recipe_without_stages_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output_dir": "x", "train": {"folder": "y"}}))
    with pytest.raises(ValueError, match="lacks stages"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_lies_over_its_base(tmp_path):
    recipe = load_recipe(RECIPES / "audiocaps.yaml", {"data_root": "/data"})
    assert recipe.stages[0].training["learning_rate"] == 3e-6 and recipe.stages[0].training["num_train_epochs"] == 30
    assert len(recipe.train) == 1 and recipe.train[0].audiocaps["table"] == "/data/audiocaps/train.csv"
    with pytest.raises(ValueError, match="--data_root"):
        load_recipe(RECIPES / "audiocaps.yaml")
    ablation = load_recipe(RECIPES / "ablations" / "table3_l1.yaml", {"data_root": "/data"})
    assert ablation.model["guide_metric"] == "l1" and ablation.model["audio_model_id"] == "mispeech/ced-base"


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def recipe(checkpoint, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16000)
    write_table(tmp_path / "metadata.csv", [("a.wav", "A dog barks."), ("a.wav", "Rain falls.")])
    data = {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(checkpoint),
        "train": {"folder": str(tmp_path)},
        "validation": {"folder": str(tmp_path)},
        "generation": {"max_new_tokens": 3, "num_candidates": 2},
        "stages": [{"name": "all", "training": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


def test_the_plan_names_data_parameters_steps_and_memory(recipe):
    text = plan(load_recipe(recipe))
    assert "1 clips, 2 captions" in text and "2 steps of 2 clips" in text
    assert "trains lora" in text and "ZeRO-3 on 8" in text and "on 24 GiB" in text


@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_the_plan_counts_what_a_trained_encoder_keeps(encoder_name):
    def kept(seconds=10.0, **settings):
        config = tiny_config(audio_config=ENCODERS[encoder_name][0], **settings)
        return estimate_memory(config, 2, seconds).activations

    assert kept() < kept(num_trained_audio_layers=1) < kept(freeze_audio_encoder=False)
    pads_to_one_length = encoder_name in ("whisper", "ast")
    assert kept(30.0) == kept() if pads_to_one_length else kept(30.0) > kept()


def test_a_checkpoint_of_another_architecture_is_refused(recipe):
    with pytest.raises(ValueError, match="num_audio_tokens=4, the recipe 8"):
        load_recipe(recipe, {"model.num_audio_tokens": 8}).build()
    assert load_recipe(recipe, {"model.guide_metric": "l1"}).build()[0].config.guide_metric == "l1"


def test_of_the_special_tokens_only_the_end_may_be_written(recipe, checkpoint):
    model, processor = load_recipe(recipe).build()
    suppressed = set(model.generation_config.suppress_tokens)
    assert {processor.audio_token_id, processor.tokenizer.bos_token_id} <= suppressed
    assert processor.tokenizer.eos_token_id not in suppressed
    model, _ = load_recipe(recipe, {"generation.suppress_tokens": None}).build()
    assert model.generation_config.suppress_tokens is None
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suppress_tokens": [5]}))
    assert load_recipe(recipe).build()[0].generation_config.suppress_tokens == [5]


def test_an_encoder_that_was_trained_is_kept_when_it_is_frozen(recipe, checkpoint):
    file = checkpoint / "config.json"
    trained = {"audio_model_id": "mispeech/ced-base", "num_trained_audio_layers": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | trained))
    assert load_recipe(recipe).config().audio_model_id == "mispeech/ced-base"
    frozen = load_recipe(recipe, {"model.num_trained_audio_layers": 0}).config()
    assert frozen.audio_model_id is None  # what is saved next holds its weights, which that name does not stand for


def test_an_encoder_whose_last_layers_train_is_of_one_dtype(recipe):
    model, _ = load_recipe(recipe, {"model.num_trained_audio_layers": 1, "load.dtype": "bfloat16"}).build()
    assert model.language_model.dtype == torch.bfloat16
    weights = [value for value in model.audio_encoder.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in weights)


def test_last_layers_train_on_cached_states(recipe, checkpoint, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMB_CACHE", str(tmp_path / "cache"))
    settings, extractor = ENCODERS["mobilenet"]
    before = randomized(LambForAudioCaptioning(tiny_config(audio_config=settings, num_trained_audio_layers=2)), 0.5)
    before.save_pretrained(checkpoint)
    LambProcessor(extractor(), tokenizer, num_audio_tokens=4).save_pretrained(checkpoint)
    stage = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "learning_rate": 1e-2}
    stages = [{"name": "alignment", "alignment_only": True, "training": stage}, {"name": "captions", "training": stage}]
    data = yaml.safe_load(recipe.read_text()) | {"cache_encoder_tokens": True, "stages": stages}
    recipe.write_text(yaml.safe_dump(data))
    train.main([str(recipe)])
    after = LambForAudioCaptioning.from_pretrained(tmp_path / "run").audio_encoder.state_dict()
    moved = {name for name, value in before.audio_encoder.state_dict().items() if not torch.equal(value, after[name])}
    assert moved and all(int(name.split(".")[1]) >= 22 for name in moved)  # of 26 modules the last four, two pairs
    assert not any("running" in name for name in moved)


def test_train_py_trains_scores_and_goes_on(recipe, tmp_path):
    flags = ["--stages.0.training.eval_strategy", "epoch", "--stages.0.training.report_to", "none"]
    train.main([str(recipe), *flags])
    state = json.loads((tmp_path / "run" / "all" / "trainer_state.json").read_text())
    assert any("eval_cider_d" in entry for entry in state["log_history"])
    trained = LambForAudioCaptioning.from_pretrained(tmp_path / "run")
    assert trained.config.num_audio_tokens == 4
    assert (trained.generation_config.max_new_tokens, trained.generation_config.num_candidates) == (3, 2)
    train.main([str(recipe), *flags])  # finished: nothing is trained again


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, text in ((10, "{}"), (20, ""), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
