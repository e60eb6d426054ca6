"""Placeholders, prompts, labels and padding; other extractors in place of ours; captions out; what is refused."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import CAPTIONS, ENCODERS, VOCAB_SIZE, noise
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast

from modeling_lamb import LambFeatureExtractor, LambProcessor

QUESTION = "USER: Describe the audio you hear.\nASSISTANT:"


def clips(count=2):
    return [noise(0.5 + 0.3 * i, i) for i in range(count)]


@pytest.fixture
def bos_processor(trained_tokenizer):
    """A tokenizer that puts BOS in front of every text, as Llama's does."""
    tokenizer = Tokenizer.from_str(trained_tokenizer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return LambProcessor(LambFeatureExtractor(), fast, num_audio_tokens=4)


def text_of(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_the_default_prompt_has_its_placeholders_first(processor):
    inputs = processor(audio=clips(1)[0], sampling_rate=16000)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    assert processor.audio_token_id == VOCAB_SIZE
    assert inputs["input_ids"][0, :4].tolist() == [VOCAB_SIZE] * 4
    assert text_of(processor, inputs["input_ids"][0, 4:]) == QUESTION
    assert inputs["input_features"].shape == (1, 64, 51) and inputs["input_features_mask"].all()


def test_bos_stands_before_the_audio_once(bos_processor):
    for captions in (None, "A dog barks."):
        inputs = bos_processor(audio=clips(1), sampling_rate=16000, captions=captions)
        assert inputs["input_ids"][0, :5].tolist() == [0] + [VOCAB_SIZE] * 4
        assert (inputs["input_ids"] == 0).sum() == 1


@pytest.mark.parametrize("kind", ["list", "tensor", "path", "paths"])
def test_audio_of_every_kind(processor, kind, tmp_path, caplog):
    wave, file = clips(1)[0], tmp_path / "clip.wav"
    soundfile.write(file, wave, 16000, subtype="FLOAT")
    expected = processor(audio=wave, sampling_rate=16000)
    given = {"list": [wave], "tensor": torch.from_numpy(wave), "path": str(file), "paths": [file]}[kind]
    result = processor(audio=given, **({} if "path" in kind else {"sampling_rate": 16000}))
    assert not caplog.text
    assert torch.equal(result["input_features"], expected["input_features"])
    assert torch.equal(result["input_ids"], expected["input_ids"])


def test_a_text_goes_into_the_template_unless_it_has_a_placeholder(processor):
    inputs = processor(text="What is it?", audio=clips(1), sampling_rate=16000)
    assert text_of(processor, inputs["input_ids"][0, 4:]) == "USER: What is it?\nASSISTANT:"
    inputs = processor(text="Hear <|audio|> and <|audio|>, then say:", audio=clips(2), sampling_rate=16000)
    assert inputs["input_ids"].shape[0] == 1 and inputs["input_features"].shape[0] == 2
    where = (inputs["input_ids"][0] == VOCAB_SIZE).nonzero()[:, 0]
    assert len(where) == 8 and where[0] > 0 and where[4] - where[3] > 1


def test_template_and_prompt_are_settings(tokenizer, tmp_path):
    template = "Listen: {audio}\n{prompt} Answer:"
    processor = LambProcessor(
        LambFeatureExtractor(top_db=80.0), tokenizer, num_audio_tokens=2, prompt_template=template, prompt="What?"
    )
    assert text_of(processor, processor(audio=clips(1), sampling_rate=16000)["input_ids"][0]) == (
        "Listen: <|audio|><|audio|>\nWhat? Answer:"
    )
    processor.save_pretrained(tmp_path / "1")
    loaded = AutoProcessor.from_pretrained(tmp_path / "1")
    loaded.save_pretrained(tmp_path / "2")
    third = LambProcessor.from_pretrained(tmp_path / "2")
    for other in (loaded, third):
        assert type(other) is LambProcessor and other.num_audio_tokens == 2 and other.prompt == "What?"
        assert other.prompt_template == template and other.feature_extractor.top_db == 80
        assert other.audio_token_id == processor.audio_token_id
        expected = processor(audio=clips(2), sampling_rate=16000, captions=CAPTIONS[:2])
        result = other(audio=clips(2), sampling_rate=16000, captions=CAPTIONS[:2])
        assert expected.keys() == result.keys() and all(torch.equal(expected[k], result[k]) for k in expected)
    with pytest.raises(ValueError, match=r"must contain \{prompt\} exactly once"):
        LambProcessor(LambFeatureExtractor(), tokenizer, prompt_template="{audio}")


def test_padding_sides(processor):
    texts = ["What?", "Say at some length what it is that you hear."]
    inputs = processor(text=texts, audio=clips(2), sampling_rate=16000)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    inputs = processor(text=texts, audio=clips(2), sampling_rate=16000, captions=CAPTIONS[:2])
    assert inputs["attention_mask"][:, 0].all() and inputs["attention_mask"][0, -1] == 0
    inputs = processor(text=texts)
    assert inputs["attention_mask"][0, 0] == 0 and "input_features" not in inputs
    longer = processor(text=texts, padding="max_length", max_length=60)
    assert longer["input_ids"].shape == (2, 60)


@pytest.mark.parametrize("captions", [None, CAPTIONS[:2]])
def test_padding_may_be_said_in_every_way_of_the_library(processor, captions):
    given = {"audio": clips(2), "sampling_rate": 16000, "captions": captions}
    expected = processor(**given)
    for options in ({"padding": True}, {"text_kwargs": {"padding": "longest"}}, {"return_tensors": "pt"}):
        result = processor(**given, **options)
        assert all(torch.equal(result[name], expected[name]) for name in expected)
    result = processor(**given, text_kwargs={"padding": "max_length", "max_length": 70})
    assert result["input_ids"].shape == (2, 70) and torch.equal(result["input_features"], expected["input_features"])
    result = processor(**given, padding_side="left")
    assert result["attention_mask"][:, -1].all()


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["processor", "bos_processor"])
def test_labels_are_the_caption_and_its_end(kind, request):
    processor = request.getfixturevalue(kind)
    inputs = processor(audio=clips(4), sampling_rate=16000, captions=CAPTIONS)
    prompt = processor(audio=clips(1), sampling_rate=16000)["input_ids"][0]
    for row, caption in enumerate(CAPTIONS):
        ids, labels, mask = (inputs[name][row] for name in ("input_ids", "labels", "attention_mask"))
        learnt = labels != -100
        assert torch.equal(labels[learnt], ids[learnt])
        assert labels[learnt][-1] == processor.tokenizer.eos_token_id and (labels == 1).sum() == 1
        assert text_of(processor, labels[learnt]) == f" {caption}</s>"
        assert torch.equal(ids[: len(prompt)], prompt)  # what generation will see
        assert not learnt[: len(prompt)].any() and learnt[len(prompt) : int(mask.sum())].all()
        assert not learnt[int(mask.sum()) :].any()


def test_eos_is_learnt_although_it_pads(trained_tokenizer):
    """LLaMA and SmolLM2 have no padding token of their own: eos serves, and only the mask tells the two apart."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer), bos_token="<s>", eos_token="</s>"
    )
    processor = LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=4)
    assert tokenizer.pad_token == "</s>"
    inputs = processor(audio=clips(2), sampling_rate=16000, captions=["A dog.", "Rain falls on a tin roof."])
    assert ((inputs["labels"] == 1).sum(1) == 1).all()
    assert (inputs["input_ids"][0] == 1).sum() > 1


def test_labels_of_text_alone_are_the_same(processor):
    inputs = processor(audio=clips(2), sampling_rate=16000, captions=CAPTIONS[:2])
    labelled = processor.label_texts(CAPTIONS[:2])
    assert set(labelled) == {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(labelled[name], inputs[name]) for name in labelled)


def test_spaces_around_a_caption_are_not_learnt(processor):
    plain = processor(audio=clips(1), sampling_rate=16000, captions="A dog barks.")
    spaced = processor(audio=clips(1), sampling_rate=16000, captions="  A dog barks. \n")
    assert torch.equal(plain["labels"], spaced["labels"])


# -- captions out ------------------------------------------------------------------------------------------------------


def test_decoding_gives_the_caption_alone(processor):
    prompt = processor(audio=clips(2), sampling_rate=16000)["input_ids"]
    tails = processor.tokenizer([" A dog barks.</s>", " Rain: USER: falls.</s>"], padding=True, return_tensors="pt")
    generated = torch.cat([prompt, tails["input_ids"]], dim=1)
    expected = ["A dog barks.", "Rain: USER: falls."]
    assert processor.batch_decode(generated, skip_special_tokens=True) == expected
    assert processor.decode(generated, skip_special_tokens=True) == expected
    assert processor.batch_decode(generated.numpy(), skip_special_tokens=True) == expected
    assert processor.decode(generated[0], skip_special_tokens=True) == expected[0]
    assert processor.decode(generated[0].tolist(), skip_special_tokens=True) == expected[0]
    assert processor.decode(generated[0]).startswith("<|audio|><|audio|>")  # all of it when specials are kept
    assert processor.decode(tails["input_ids"][0], skip_special_tokens=True).strip() == expected[0]


def test_a_caption_that_repeats_the_marker_is_kept_whole(processor):
    prompt = processor(audio=clips(1), sampling_rate=16000)["input_ids"]
    tail = processor.tokenizer(" One.\nASSISTANT: two.", return_tensors="pt")["input_ids"]
    assert processor.decode(torch.cat([prompt, tail], dim=1)[0], skip_special_tokens=True) == "One.\nASSISTANT: two."


# -- other extractors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "frames"), [("whisper", [50, 80]), ("ast", [50, 80])])
def test_other_families_extractors_stand_in(name, frames, tokenizer, tmp_path):
    processor = LambProcessor(ENCODERS[name][1](), tokenizer, num_audio_tokens=4)
    inputs = processor(audio=clips(2), sampling_rate=16000)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    assert inputs["input_features_mask"].sum(1).tolist() == frames
    expected = ENCODERS[name][1]()(clips(2), sampling_rate=16000, return_tensors="pt")
    features = expected["input_features" if name == "whisper" else "input_values"]
    torch.testing.assert_close(inputs["input_features"], features)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded.feature_extractor) is type(processor.feature_extractor)
    again = loaded(audio=clips(2), sampling_rate=16000)
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)


@pytest.mark.parametrize("name", ["whisper", "ast"])
def test_audio_beyond_a_fixed_window_is_warned_of(name, tokenizer, caplog):
    processor = LambProcessor(ENCODERS[name][1](), tokenizer, num_audio_tokens=4)
    processor(audio=[noise(0.5), noise(1.5)], sampling_rate=16000)
    assert "Clip 1 has 24000 samples" in caplog.text and "reads only the first 16000" in caplog.text
    assert "Clip 0" not in caplog.text


@pytest.mark.parametrize("name", ["whisper", "ast"])
@pytest.mark.parametrize(("samples", "value"), [(0, 0), (1, 0.5), (8000, np.nan)], ids=["empty", "one sample", "NaN"])
def test_nothing_to_hear_is_refused_whatever_the_extractor(name, samples, value, tokenizer):
    processor = LambProcessor(ENCODERS[name][1](), tokenizer, num_audio_tokens=4)
    with pytest.raises(ValueError, match="Clip 1 h"):
        processor(audio=[noise(0.5), np.full(samples, value, dtype=np.float32)], sampling_rate=16000)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_mask_is_that_of_the_frames_or_none(name, tokenizer):
    processor = LambProcessor(ENCODERS[name][1](), tokenizer, num_audio_tokens=4)
    given = {"audio": [noise(0.4), noise(0.8, 1)], "sampling_rate": 16000}
    expected = processor(**given)
    frames = expected["input_features_mask"].shape[-1]
    assert frames in expected["input_features"].shape
    for kind in ("np", None):
        masks = processor(**given, return_tensors=kind)["input_features_mask"]
        assert np.array_equal(np.stack(list(masks)), expected["input_features_mask"].numpy())
    assert "input_features_mask" not in processor(**given, return_attention_mask=False)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"audio": None, "captions": "A dog."}, "captions were given without audio"),
        ({"captions": ["A dog."]}, "Got 1 captions for 2 prompts"),
        ({"captions": ["A dog.", "An <|audio|>."]}, r"Caption 1 contains the audio placeholder <\|audio\|>"),
        ({"captions": ["A dog.", " \n"]}, "Caption 1 is empty"),
        ({"captions": ["A dog.", None]}, "Caption 1 is None, expected a text"),
        ({"text": ["What?"]}, "Got 1 texts for 2 clips"),
        ({"text": ["What?", ["Who?"]]}, "must be a text, or a list of texts"),
        ({"caption": ["A dog.", "Rain."]}, r"Unknown arguments \['caption'\]"),
        ({"sampling_rate": 44100}, "sampling_rate=44100 Hz, expected 16000"),
        ({"audio": [np.zeros(16000, dtype=np.float32), np.full(16000, np.nan, dtype=np.float32)]}, "Clip 1 holds NaN"),
        ({"audio": [np.zeros((2, 16000), dtype=np.float32)] * 2}, "Clip 0 has the shape"),
        ({"audio": np.zeros((2, 16000), dtype=np.float32)}, r"Clip 0 has the shape \(2, 16000\)"),
        ({"audio": [np.zeros(0, dtype=np.float32)] * 2}, "Clip 0 has 0 samples"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(processor, arguments, message):
    settings = {"audio": clips(2), "sampling_rate": 16000} | arguments
    if settings["audio"] is None:
        del settings["audio"], settings["sampling_rate"]
    with pytest.raises(ValueError, match=message):
        processor(**settings)


def test_counts_of_placeholders_and_clips_must_match(processor):
    with pytest.raises(ValueError):
        processor(text="<|audio|> and <|audio|>?", audio=clips(1), sampling_rate=16000)
    with pytest.raises(ValueError):
        processor(text="<|audio|>?", audio=clips(2), sampling_rate=16000)


def test_a_prompt_that_merges_into_the_caption_is_refused():
    """Its last token would be another one in training than in generation."""
    vocabulary = {"</s>": 0, ":": 1, " ": 2, ": ": 3, "a": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")])), eos_token="</s>"
    )
    processor = LambProcessor(LambFeatureExtractor(), tokenizer, num_audio_tokens=1, prompt_template="{audio}{prompt}:")
    with pytest.raises(ValueError, match="ends within a token once a caption follows"):
        processor(text="a", audio=clips(1), sampling_rate=16000, captions="a")


@pytest.mark.parametrize("content", [None, b"This is text.", b""])
def test_files_without_sound_are_named(processor, content, tmp_path):
    file = tmp_path / "file.wav"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.wav.*give"):
        processor(audio=str(file))
