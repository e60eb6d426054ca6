"""Small, full, sharded, merged and quantised checkpoints: what they hold, and that nothing changes on the way."""

import json

import pytest
import torch
from conftest import CAPTIONS, DECODERS, ENCODERS, VOCAB_SIZE, noise, randomized, tiny_config, tiny_text_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AqlmConfig,
    ASTForAudioClassification,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    MobileNetV1ForImageClassification,
    TorchAoConfig,
    WhisperForConditionalGeneration,
)
from transformers.trainer_utils import validate_quantization_for_training

from modeling_lamb import CedModel, LambConfig, LambForAudioCaptioning

BOTH_LORA = {"audio_peft_config": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture
def batch(processor):
    clips = [noise(0.5, 0), noise(0.8, 1)]
    return processor(audio=clips, sampling_rate=16000, captions=CAPTIONS[:2])


@pytest.fixture
def prompts(processor):
    return processor(audio=[noise(0.5, 0), noise(0.8, 1)], sampling_rate=16000)


def model_of(config):
    """Everything random, so that nothing equals what a fresh model would have; BatchNorm's statistics too."""
    model = randomized(LambForAudioCaptioning(config)).eval()
    with torch.no_grad():
        model.token_guide.beta.fill_(0.321)
        model.aligner.text_mean.normal_()
    return model


def assert_same(model, other, prompts):
    own, others = model.state_dict(), other.state_dict()
    assert own.keys() == others.keys()
    assert not [key for key in own if not torch.equal(own[key], others[key])]
    with torch.no_grad():
        assert torch.equal(model(**prompts).logits, other(**prompts).logits)
    assert other.token_guide.beta.item() == model.token_guide.beta.item()
    assert not other.training


def assert_frozen(model):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(
        "lora_" in name or not name.startswith(("audio_encoder", "language_model")) for name in trainable
    )
    assert any(name.startswith("adapter") for name in trainable)


def keys_of(folder):
    keys = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            keys |= set(weights.keys())
    return keys


# -- full --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, BOTH_LORA, {"peft_config": None}, {"adapter_type": "qformer"}])
def test_full_checkpoints_load_save_load(settings, prompts, tmp_path):
    model = model_of(tiny_config(**settings))
    model.save_pretrained(tmp_path / "1")
    loaded, report = LambForAudioCaptioning.from_pretrained(tmp_path / "1", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(model, loaded, prompts)
    assert_frozen(loaded)
    loaded.save_pretrained(tmp_path / "2")
    assert (
        load_file(tmp_path / "1" / "model.safetensors").keys() == load_file(tmp_path / "2" / "model.safetensors").keys()
    )
    assert_same(model, AutoModel.from_pretrained(tmp_path / "2"), prompts)
    third = AutoModelForMultimodalLM.from_pretrained(tmp_path / "2")
    assert_same(model, third, prompts)
    third.save_pretrained(tmp_path / "3")
    assert (tmp_path / "2/config.json").read_text() == (tmp_path / "3/config.json").read_text()
    assert not list(tmp_path.glob("*/adapter_config.json")) and not list(tmp_path.glob("*/*.bin"))


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_survives(name, prompts, tmp_path):
    text_config, targets = DECODERS[name]
    model = model_of(tiny_config(text_config=text_config, peft_config={"r": 2, "target_modules": targets}))
    model.save_pretrained(tmp_path)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path)
    assert_same(model, loaded, prompts)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "llama")


def test_sharded_checkpoints(prompts, tmp_path):
    model = model_of(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(model, LambForAudioCaptioning.from_pretrained(tmp_path), prompts)


def test_training_goes_on_after_loading(batch, tmp_path):
    model = model_of(tiny_config(**BOTH_LORA))
    model.save_pretrained(tmp_path)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path).train()
    assert not loaded.audio_encoder.patch_embed.init_bn.training
    loaded(**batch).loss.backward()
    learning = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert learning == {name for name, p in model.named_parameters() if p.requires_grad}


# -- small -------------------------------------------------------------------------------------------------------------


def save_backbones(folder, audio=None, text=None):
    """Two published backbones, as folders."""
    config = tiny_config()
    audio = audio or randomized(CedModel(config.audio_config))
    text = text or randomized(AutoModelForCausalLM.from_config(config.text_config))
    audio.save_pretrained(folder / "audio")
    text.save_pretrained(folder / "text")
    return str(folder / "audio"), str(folder / "text")


def adapter_settings(**kwargs):
    settings = {
        "num_audio_tokens": 4,
        "num_semantic_queries": 3,
        "num_temporal_queries": 2,
        "peft_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    }
    return settings | kwargs


def train_a_little(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.fixture
def backbones(tmp_path):
    return save_backbones(tmp_path)


def small(backbones, **kwargs):
    config = LambConfig.from_backbones(*backbones, **adapter_settings(**kwargs))
    return train_a_little(LambForAudioCaptioning.from_backbones(config))


def test_a_new_model_starts_from_its_backbones(backbones):
    config = LambConfig.from_backbones(*backbones, **adapter_settings(**BOTH_LORA))
    assert config.audio_token_id == 369
    model, report = LambForAudioCaptioning.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    audio, text = CedModel.from_pretrained(backbones[0]), AutoModelForCausalLM.from_pretrained(backbones[1])
    for part, reference in ((model.audio_encoder, audio), (model.language_model, text)):
        weights = {
            key.replace("base_layer.", ""): value for key, value in part.state_dict().items() if "lora_" not in key
        }
        assert weights.keys() == reference.state_dict().keys()
        torch.testing.assert_close(weights, dict(reference.state_dict()), atol=0, rtol=0)
    assert all(p.any() == ("lora_A" in name) for name, p in model.named_parameters() if "lora_" in name)
    assert not [
        key
        for key in report["missing_keys"]
        if key.startswith(("audio_encoder", "language_model")) and "lora_" not in key
    ]
    assert not report["unexpected_keys"]
    assert model.token_guide.beta.item() == pytest.approx(0.1)
    assert_frozen(model)


def test_small_checkpoints_hold_what_was_trained(backbones, prompts, tmp_path):
    model = small(backbones, **BOTH_LORA)
    model.save_pretrained(tmp_path / "small")
    keys = keys_of(tmp_path / "small")
    assert keys and all("lora_" in key or key.startswith(("adapter.", "aligner.", "token_guide.")) for key in keys)
    assert {key.split(".")[0] for key in keys if "lora_" in key} == {"audio_encoder", "language_model"}
    loaded, report = LambForAudioCaptioning.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(model, loaded, prompts)
    assert_frozen(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert keys_of(tmp_path / "again") == keys
    assert_same(model, LambForAudioCaptioning.from_pretrained(tmp_path / "again"), prompts)


def test_small_becomes_full_when_asked(backbones, prompts, tmp_path):
    model = small(backbones)
    model.save_pretrained(tmp_path / "full", save_backbones=True)
    assert keys_of(tmp_path / "full") == set(model.state_dict())
    for file in (tmp_path / "audio" / "model.safetensors", tmp_path / "text" / "model.safetensors"):
        file.unlink()  # a full checkpoint needs no one
    assert_same(model, LambForAudioCaptioning.from_pretrained(tmp_path / "full"), prompts)


def test_saving_full_once_does_not_change_the_next_save(backbones, tmp_path):
    model = small(backbones)
    model.save_pretrained(tmp_path / "1", save_backbones=True)
    model.save_pretrained(tmp_path / "2")
    model.save_pretrained(tmp_path / "3", save_backbones=False)
    assert keys_of(tmp_path / "2") == keys_of(tmp_path / "3") < keys_of(tmp_path / "1")


def test_a_trained_backbone_is_saved_although_it_has_a_name(backbones, prompts, tmp_path):
    model = small(backbones, freeze_audio_encoder=False)
    model.save_pretrained(tmp_path / "small")
    keys = keys_of(tmp_path / "small")
    assert any(key.startswith("audio_encoder.blocks") for key in keys)
    assert not any(key.startswith("language_model") and "lora_" not in key for key in keys)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path / "small")
    assert_same(model, loaded, prompts)
    assert all(p.requires_grad for p in loaded.audio_encoder.parameters())
    with pytest.raises(ValueError, match="without audio_encoder could not be loaded"):
        model.save_pretrained(tmp_path / "wrong", save_backbones=False)


def test_an_encoder_whose_last_layers_train_is_saved(backbones, prompts, tmp_path):
    model = small(backbones, num_trained_audio_layers=1)
    with torch.no_grad():
        model.audio_encoder.norm.weight += 1
    model.save_pretrained(tmp_path / "small")
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path / "small")
    assert_same(model, loaded, prompts)
    trained = {name for name, p in loaded.audio_encoder.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("blocks.1.", "norm.")) for name in trained)


def test_a_small_checkpoint_needs_to_know_its_backbones(backbones, tmp_path):
    with pytest.raises(ValueError, match=r"without audio_encoder could not be loaded.*audio_model_id is not set"):
        model_of(tiny_config()).save_pretrained(tmp_path / "wrong", save_backbones=False)
    small(backbones).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"text_model_id": None}))
    with pytest.raises(ValueError, match=r"no weights of language_model, and config\.text_model_id does not say"):
        LambForAudioCaptioning.from_pretrained(tmp_path / "small")


def test_a_resized_table_is_saved_with_the_checkpoint(backbones, tmp_path):
    model = small(backbones)
    model.resize_token_embeddings(VOCAB_SIZE + 11)
    model.save_pretrained(tmp_path / "resized")
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path / "resized")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_backbone_of_another_width_is_refused(backbones, tmp_path):
    """Named weights that do not fit the config that was saved."""
    small(backbones).save_pretrained(tmp_path / "small")
    other = tiny_config(audio_config=ENCODERS["ced"][0] | {"hidden_size": 64}).audio_config
    CedModel(other).save_pretrained(tmp_path / "audio")
    with pytest.raises(ValueError, match=r"has the shape .* expected .* config.audio_model_id"):
        LambForAudioCaptioning.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("name", ["whisper", "ast", "mobilenet"])
def test_published_encoders_are_read_with_their_heads_left_out(name, tmp_path, prompts):
    published = {
        "whisper": WhisperForConditionalGeneration,
        "ast": ASTForAudioClassification,
        "mobilenet": MobileNetV1ForImageClassification,
    }[name]
    settings = dict(ENCODERS[name][0])
    source = randomized(published(AutoConfig.for_model(settings.pop("model_type"), **settings)))
    backbones = save_backbones(tmp_path, audio=source)
    config = LambConfig.from_backbones(*backbones, **adapter_settings())
    model, report = LambForAudioCaptioning.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert not [key for key in report["missing_keys"] if key.startswith("audio_encoder")]
    assert not report["unexpected_keys"]
    encoder = {
        "whisper": lambda: source.model.encoder,
        "ast": lambda: source.audio_spectrogram_transformer,
        "mobilenet": lambda: source.mobilenet_v1,
    }[name]()
    torch.testing.assert_close(dict(model.audio_encoder.state_dict()), dict(encoder.state_dict()), atol=0, rtol=0)
    train_a_little(model).save_pretrained(tmp_path / "small")
    assert not any(key.startswith("audio_encoder") for key in keys_of(tmp_path / "small"))
    again = LambForAudioCaptioning.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("without_head", [False, True])
def test_published_decoders_are_read_with_and_without_their_head(name, without_head, tmp_path, prompts):
    """The Hub's gpt2, for one, holds the keys of the model without its (tied) head."""
    text_config, targets = DECODERS[name]
    if without_head and name == "llama":
        pytest.skip("its head is not tied, so that a checkpoint without it is no causal LM")
    source = randomized(AutoModelForCausalLM.from_config(tiny_config(text_config=text_config).text_config))
    backbones = save_backbones(tmp_path, text=source.base_model if without_head else source)
    peft = {"r": 2, "target_modules": targets}
    config = LambConfig.from_backbones(*backbones, **adapter_settings(peft_config=peft))
    model, report = LambForAudioCaptioning.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if key.startswith("language_model") and "lora_" not in key]
    assert not missing and not report["unexpected_keys"]
    weights = {
        key.replace("base_layer.", ""): v for key, v in model.language_model.state_dict().items() if "lora_" not in key
    }
    torch.testing.assert_close(weights, dict(source.state_dict()), atol=0, rtol=0)
    train_a_little(model).save_pretrained(tmp_path / "small")
    assert_same(model, LambForAudioCaptioning.from_pretrained(tmp_path / "small"), prompts)


def test_sharded_backbones(tmp_path, prompts):
    save_backbones(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "text").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    model = small((str(tmp_path / "audio"), str(tmp_path / "shards")))
    assert_same(model, small_again(model, tmp_path), prompts)


def small_again(model, folder):
    model.save_pretrained(folder / "small")
    return LambForAudioCaptioning.from_pretrained(folder / "small")


def test_an_unknown_backbone_key_is_reported(backbones, tmp_path):
    file = tmp_path / "text" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.surplus": torch.zeros(1)}, file, metadata={"format": "pt"})
    config = LambConfig.from_backbones(*backbones, **adapter_settings())
    _, report = LambForAudioCaptioning.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert report["unexpected_keys"] == {"language_model.model.layers.0.surplus"}


# -- merged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_models_say_the_same_and_save_full(name, prompts, tmp_path):
    text_config, targets = DECODERS[name]
    peft = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    text = randomized(AutoModelForCausalLM.from_config(tiny_config(text_config=text_config).text_config))
    model = small(save_backbones(tmp_path, text=text), peft_config=peft, **BOTH_LORA)
    with torch.no_grad():
        expected = model(**prompts).logits
        merged = model.merge_adapters()
        assert merged is model
        torch.testing.assert_close(merged(**prompts).logits, expected, atol=1e-5, rtol=1e-5)
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]
    assert merged.config.peft_config is None and merged.config.text_model_id is None
    merged.save_pretrained(tmp_path / "merged")
    assert any(key.startswith("language_model") for key in keys_of(tmp_path / "merged"))
    assert_same(merged, LambForAudioCaptioning.from_pretrained(tmp_path / "merged"), prompts)


def test_merging_one_backbone_leaves_the_other_named(backbones, prompts, tmp_path):
    model = small(backbones).merge_adapters()
    assert model.config.audio_model_id == backbones[0]
    again = small_again(model, tmp_path)
    assert not any(key.startswith("audio_encoder") for key in keys_of(tmp_path / "small"))
    assert_same(model, again, prompts)


# -- quantised ---------------------------------------------------------------------------------------------------------


def quantization(name):
    if name == "torchao int8":
        module = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(module.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True) if name == "bnb 8 bit" else BitsAndBytesConfig(load_in_4bit=True)


@pytest.fixture
def wide_backbones(tmp_path):
    """An LLM of a width that the 4-bit kernels can pack."""
    config = tiny_text_config(hidden_size=128, intermediate_size=128)
    return save_backbones(tmp_path, text=randomized(AutoModelForCausalLM.from_config(config), 0.05))


QUANTIZED = {
    "torchao int8": ("Linear", "TorchaoLoraLinear", 0.1),
    "bnb 8 bit": ("Linear8bitLt", "Linear8bitLt", 0.1),
    "bnb 4 bit": ("Linear4bit", "Linear4bit", 0.6),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("form", ["small", "full"])
def test_the_llm_may_be_quantised_and_lora_lies_on_top(name, form, wide_backbones, batch, prompts, tmp_path):
    layer, lora_layer, tolerance = QUANTIZED[name]
    model = small(wide_backbones, **BOTH_LORA)
    model.save_pretrained(tmp_path / form, save_backbones=True if form == "full" else None)
    loaded, report = LambForAudioCaptioning.from_pretrained(
        tmp_path / form, quantization_config=quantization(name), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    kinds = {key: type(module).__name__ for key, module in loaded.named_modules()}
    inner = "language_model.model.layers.1"
    assert kinds[f"{inner}.mlp.up_proj"] == layer and kinds[f"{inner}.self_attn.q_proj"] == lora_layer
    spared = [
        key for key, p in loaded.named_parameters() if not p.is_floating_point() or type(p) is not torch.nn.Parameter
    ]
    assert spared and all(key.startswith("language_model.model.layers.") for key in spared)
    own, others = model.state_dict(), loaded.state_dict()
    for key in own:  # all but the quantised layers is as it was
        if "lora_" in key or not key.startswith("language_model.model.layers"):
            assert torch.equal(own[key], others[key]), key
    assert_frozen(loaded)
    validate_quantization_for_training(loaded)  # what the Trainer asks first
    loaded.train()(
        **batch
    ).loss.backward()  # before any inference, for which 4-bit weights are packed for good on a CPU
    learning = {key for key, p in loaded.named_parameters() if p.grad is not None}
    assert learning == {key for key, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        logits, expected = loaded.eval()(**prompts).logits, model(**prompts).logits
    assert 1e-4 < (logits - expected).abs().max() < tolerance
    assert loaded.generate(**prompts, max_new_tokens=3, num_beams=2).shape[0] == 2


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_was_trained_on_a_quantised_llm_is_saved_without_it(name, wide_backbones, prompts, tmp_path):
    config = LambConfig.from_backbones(*wide_backbones, **adapter_settings())
    model = train_a_little(LambForAudioCaptioning.from_backbones(config, quantization_config=quantization(name)))
    model.save_pretrained(tmp_path / "small")
    assert not any(key.startswith("language_model") and "lora_" not in key for key in keys_of(tmp_path / "small"))
    assert "quantization_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    again = LambForAudioCaptioning.from_pretrained(tmp_path / "small", quantization_config=quantization(name))
    with torch.no_grad():
        assert torch.equal(again(**prompts).logits, model(**prompts).logits)
    plain = LambForAudioCaptioning.from_pretrained(tmp_path / "small")
    assert type(plain.language_model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="quantised language_model cannot be saved"):
        model.save_pretrained(tmp_path / "full", save_backbones=True)


def test_lora_of_another_shape_is_no_lora_of_a_quantised_llm(backbones, tmp_path):
    model = small(backbones)
    model.save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    peft = {"r": 4, "target_modules": ["q_proj"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_config": peft}))
    with pytest.raises(ValueError, match=r"LoRA does not fit config.peft_config: there is no place for .*v_proj.lora_"):
        LambForAudioCaptioning.from_pretrained(tmp_path / "small", quantization_config=quantization("torchao int8"))


def test_a_quantisation_that_spares_nothing_is_refused(backbones, tmp_path):
    small(backbones).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="type AqlmConfig cannot leave parts of a model alone"):
        LambForAudioCaptioning.from_pretrained(tmp_path / "small", quantization_config=AqlmConfig())


# -- where and how -----------------------------------------------------------------------------------------------------


def test_construction_on_the_meta_device(config):
    with torch.device("meta"):
        model = LambForAudioCaptioning(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(p.numel() for p in model.parameters()) == LambForAudioCaptioning(config).num_parameters()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
@pytest.mark.parametrize("form", ["small", "full"])
def test_device_maps(device_map, form, backbones, prompts, tmp_path):
    model = small(backbones)
    model.save_pretrained(tmp_path / form, save_backbones=True if form == "full" else None)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path / form, device_map=device_map)
    assert_same(model, loaded, prompts)
    options = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(loaded.generate(**prompts, **options), model.generate(**prompts, **options))


@pytest.mark.parametrize("form", ["small", "full"])
def test_half_precision(form, backbones, batch, prompts, tmp_path):
    model = small(backbones)
    model.save_pretrained(tmp_path / form, save_backbones=True if form == "full" else None)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path / form, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes.pop("token_guide.beta") == torch.float32  # a step of 1e-4 would be lost in bfloat16
    assert set(dtypes.values()) == {torch.bfloat16} and loaded.aligner.text_mean.dtype == torch.float32
    with torch.no_grad():
        output, expected = loaded(**batch), model(**batch)
    assert output.loss.isfinite() and output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert loaded.generate(**prompts, max_new_tokens=3, num_beams=2).shape[0] == 2
    loaded.train()(**batch).loss.backward()
    assert loaded.token_guide.beta.grad.isfinite()


def test_weights_are_read_from_where_one_says(backbones, tmp_path):
    """local_files_only and the like reach the backbones too: an id that is not there fails without the network."""
    small(backbones).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_model_id": "nobody/no-such-model"}))
    with pytest.raises(OSError, match="nobody/no-such-model"):
        LambForAudioCaptioning.from_pretrained(tmp_path / "small", local_files_only=True)


def test_the_config_survives_by_itself(config, tmp_path):
    config.save_pretrained(tmp_path / "1")
    loaded = AutoConfig.from_pretrained(tmp_path / "1")
    assert type(loaded) is LambConfig and loaded.audio_config.hidden_size == 32 and loaded.num_audio_tokens == 4
    loaded.save_pretrained(tmp_path / "2")
    assert (tmp_path / "1/config.json").read_text() == (tmp_path / "2/config.json").read_text()
