"""CED, Whisper, AST and MobileNetV1 behind one door: the grid of tokens, its mask, training and captions."""

import pytest
import torch
from conftest import ENCODERS, noise, randomized, tiny_config
from transformers import ASTModel, AutoConfig, WhisperModel

from modeling_lamb import LambForAudioCaptioning, LambProcessor
from modeling_lamb.audio_encoders import build_audio_encoder, encode_audio, encode_frozen_part, encode_rest, last_layers


def clips_of(name):
    """Three lengths, within the windows of the encoders that have a fixed one."""
    lengths = (0.9, 0.4, 0.63) if name in ("whisper", "ast") else (2.2, 0.4, 1.3)
    return [noise(seconds, seed) for seed, seconds in enumerate(lengths)]


@pytest.fixture(params=ENCODERS)
def encoder_name(request):
    return request.param


def config_of(name):
    settings = dict(ENCODERS[name][0])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def encoder_of(name):
    # MobileNetV1's running statistics are those of nothing, so that small weights would fade away
    return randomized(build_audio_encoder(config_of(name)), 0.5 if name == "mobilenet" else 0.1).eval()


def features_of(name, clips):
    processor = LambProcessor.__new__(LambProcessor)  # how it calls another family's extractor, without a tokenizer
    processor.feature_extractor, processor.audio_token, processor.num_audio_tokens = ENCODERS[name][1](), "", 1
    options = {} if name == "ast" else {"return_attention_mask": True}
    data, _ = processor._process_audio(clips, sampling_rate=16000, return_tensors="pt", **options)
    return data["input_features"], data["input_features_mask"]


@torch.no_grad()
def test_batches_are_their_clips_alone(encoder_name):
    encoder, clips = encoder_of(encoder_name), clips_of(encoder_name)
    tokens, mask, _ = encode_audio(encoder, *features_of(encoder_name, clips))
    config = tiny_config(audio_config=config_of(encoder_name))
    assert tokens.shape[:2] == mask.shape and tokens.shape[3] == config.audio_hidden_size
    assert (mask[:, :-1] >= mask[:, 1:]).all() and mask.any(1).all()  # real steps come first
    for row, clip in enumerate(clips):
        alone, own, _ = encode_audio(encoder, *features_of(encoder_name, [clip]))
        torch.testing.assert_close(alone[0][own[0]], tokens[row][mask[row]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "bands"),
    [("ced", [13, 2, 8], 4), ("whisper", [45, 20, 32], 1), ("ast", [8, 3, 5], 12), ("mobilenet", [4, 1, 2], 6)],
)
@torch.no_grad()
def test_the_mask_covers_what_is_heard(name, steps, bands):
    tokens, mask, _ = encode_audio(encoder_of(name), *features_of(name, clips_of(name)))
    assert mask.sum(1).tolist() == steps and tokens.shape[2] == bands


@torch.no_grad()
def test_without_a_mask_everything_is_heard(encoder_name):
    features, _ = features_of(encoder_name, clips_of(encoder_name)[:1])
    _, mask, _ = encode_audio(encoder_of(encoder_name), features, None)
    assert mask.all()


@torch.no_grad()
def test_whisper_tokens_are_whispers():
    encoder, (features, mask) = encoder_of("whisper"), features_of("whisper", clips_of("whisper"))
    whole = WhisperModel(config_of("whisper")).eval()
    whole.encoder.load_state_dict(encoder.state_dict())
    tokens, *_ = encode_audio(encoder, features, mask)
    torch.testing.assert_close(tokens[:, :, 0], whole.encoder(features).last_hidden_state)


@torch.no_grad()
def test_ast_tokens_are_put_into_time_order():
    encoder, (features, mask) = encoder_of("ast"), features_of("ast", clips_of("ast")[:1])
    assert type(encoder) is ASTModel
    flat = encoder(features).last_hidden_state
    tokens, *_ = encode_audio(encoder, features, mask)
    assert tokens.shape[1:3] == (9, 12)  # (100 - 16) // 10 + 1 steps, (128 - 16) // 10 + 1 bands
    for step in range(9):
        for band in range(12):
            assert torch.equal(tokens[0, step, band], flat[0, 2 + band * 9 + step])


@torch.no_grad()
def test_mobilenet_reads_patches_of_96_frames():
    encoder = encoder_of("mobilenet")
    features = torch.randn(2, 64, 96 + 2 * 48)
    tokens, mask, _ = encode_audio(encoder, features, torch.arange(192) < torch.tensor([[192], [97]]))
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    for step in range(3):
        image = features[:, None, :, 48 * step : 48 * step + 96].mT  # (batch, 1, 96 frames, 64 mel)
        expected = encoder(image).last_hidden_state.flatten(2).mT
        torch.testing.assert_close(tokens[:, step], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained_layers", [0, 1, 2, 5])
@torch.no_grad()
def test_mobilenet_goes_on_from_what_its_frozen_layers_gave(trained_layers):
    encoder, features = encoder_of("mobilenet"), features_of("mobilenet", clips_of("mobilenet"))
    expected, mask, _ = encode_audio(encoder, *features)
    hidden_states, its_mask = encode_frozen_part(encoder, *features, trained_layers)
    assert torch.equal(its_mask, mask)
    tokens = encode_rest(encoder, hidden_states, mask, trained_layers)
    torch.testing.assert_close(tokens[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ced", "whisper", "ast"])
def test_hidden_states_that_depend_on_later_steps_are_not_kept(name):
    with pytest.raises(ValueError, match="set it to 0, or set cache_encoder_tokens to false"):
        encode_frozen_part(encoder_of(name), *features_of(name, clips_of(name)), 1)
    with pytest.raises(ValueError, match="set it to 0, or set cache_encoder_tokens to false"):
        encode_rest(encoder_of(name), torch.zeros(1, 2, 4, 32), torch.ones(1, 2, dtype=torch.bool), 1)


def test_more_layers_than_there_are(encoder_name):
    for count in (99, -1):
        with pytest.raises(ValueError, match=f"num_trained_audio_layers={count} must be from 0 to the encoder's"):
            last_layers(encoder_of(encoder_name), count)


def test_an_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="model_type 'bert'; LAMB reads the tokens of ced, whisper"):
        build_audio_encoder(AutoConfig.for_model("bert"))


# -- inside the model --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(encoder_name, tokenizer):
    config = tiny_config(audio_config=ENCODERS[encoder_name][0])
    processor = LambProcessor(ENCODERS[encoder_name][1](), tokenizer, num_audio_tokens=4)
    model = randomized(LambForAudioCaptioning(config)).eval()
    model.audio_encoder.load_state_dict(encoder_of(encoder_name).state_dict())
    return model, processor


@torch.no_grad()
def test_captions_of_a_batch_are_those_of_its_clips(pair, encoder_name):
    model, processor = pair
    clips = clips_of(encoder_name)
    batch = processor(audio=clips, sampling_rate=16000)
    logits = model(**batch).logits[:, -1]
    captions = model.generate(**batch, max_new_tokens=6, min_new_tokens=6)
    for row, clip in enumerate(clips):
        single = processor(audio=clip, sampling_rate=16000)
        torch.testing.assert_close(model(**single).logits[0, -1], logits[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(**single, max_new_tokens=6, min_new_tokens=6)[0], captions[row])
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)  # the clips are told apart


@pytest.mark.parametrize("frozen", [True, False])
def test_training_reaches_the_encoder_only_when_it_is_not_frozen(pair, encoder_name, frozen):
    model, processor = pair
    model.config.freeze_audio_encoder = frozen
    model.freeze_backbones()
    model.train()
    clips = clips_of(encoder_name)
    inputs = processor(audio=clips, sampling_rate=16000, captions=["A dog barks.", "Rain falls.", "A door slams."])
    statistics = {name: value.clone() for name, value in model.audio_encoder.named_buffers()}
    output = model(**inputs)
    output.loss.backward()
    assert output.loss.isfinite()
    with_gradient = [name for name, p in model.audio_encoder.named_parameters() if p.grad is not None and p.grad.any()]
    if frozen:
        assert not with_gradient and not any(module.training for module in model.audio_encoder.modules())
        assert all(torch.equal(value, statistics[name]) for name, value in model.audio_encoder.named_buffers())
    else:
        assert with_gradient and model.audio_encoder.training


def test_the_last_layers_of_a_frozen_encoder_may_train(pair, encoder_name):
    model, processor = pair
    model.config.num_trained_audio_layers = 1
    model.freeze_backbones()
    model.train()
    statistics = {name: value.clone() for name, value in model.audio_encoder.named_buffers()}
    captions = ["A dog barks.", "Rain falls.", "A door slams."]
    model(**processor(audio=clips_of(encoder_name), sampling_rate=16000, captions=captions)).loss.backward()
    trained = {p for p in model.audio_encoder.parameters() if p.grad is not None}
    assert trained == {p for layer in last_layers(model.audio_encoder, 1) for p in layer.parameters()}
    assert any(p.grad.any() for p in trained)
    assert all(torch.equal(value, statistics[name]) for name, value in model.audio_encoder.named_buffers())
