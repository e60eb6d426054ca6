"""`pipeline("audio-captioning")`: everything that may hold a sound, batches, windows, and sounds that cannot be read."""

import io
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import ENCODERS, noise, randomized, tiny_config
from processing_lamb import read_audio
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_lamb import AudioCaptioningPipeline, LambForAudioCaptioning, LambProcessor

OPTIONS = {"max_new_tokens": 5}


@pytest.fixture
def captioner(model, processor):
    return pipeline("audio-captioning", model=model, processor=processor)


@pytest.fixture
def wave():
    return noise(0.8, 1)


@pytest.fixture
def file(wave, tmp_path):
    soundfile.write(tmp_path / "sound.wav", wave, 16000, subtype="FLOAT")
    return tmp_path / "sound.wav"


@pytest.fixture
def expected(captioner, wave):
    result = captioner(wave, sampling_rate=16000, **OPTIONS)
    assert type(captioner) is AudioCaptioningPipeline
    assert list(result[0]) == ["generated_text"] and len(result[0]["generated_text"]) > 3
    return result


# -- what a sound may come in ------------------------------------------------------------------------------------------


def test_the_caption_is_what_generate_says(captioner, expected, model, processor, wave):
    tokens = model.generate(**processor(audio=wave, sampling_rate=16000), **OPTIONS)
    assert expected == [{"generated_text": processor.batch_decode(tokens, skip_special_tokens=True)[0]}]


def test_sources_of_every_kind(captioner, expected, wave, file):
    sources = [
        str(file),
        file,
        file.read_bytes(),
        {"array": wave, "sampling_rate": 16000},
        {"raw": wave, "sampling_rate": 16000},
        {"array": torch.from_numpy(wave), "sampling_rate": 16000},
        {"path": str(file)},
        {"path": str(file), "bytes": None},
        {"bytes": file.read_bytes(), "path": None},
    ]
    for source in sources:
        assert captioner(source, **OPTIONS) == expected, source
    assert captioner(torch.from_numpy(wave), sampling_rate=16000, **OPTIONS) == expected
    assert captioner(wave.astype(np.float64), sampling_rate=16000, **OPTIONS) == expected
    assert captioner(np.stack([wave, wave]), sampling_rate=16000, **OPTIONS) == expected  # two channels, one clip
    assert captioner(sources, **OPTIONS) == [expected] * len(sources)
    assert captioner((str(file), file), **OPTIONS) == [expected] * 2


@pytest.fixture
def server(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_urls(captioner, expected, file, server, monkeypatch):
    assert captioner(f"{server}/sound.wav", **OPTIONS) == expected
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    with pytest.raises(ValueError, match=r"missing\.wav cannot be fetched .*404"):
        captioner(f"{server}/missing.wav", **OPTIONS)
    missing, found = captioner([f"{server}/missing.wav", f"{server}/sound.wav"], on_error="return", **OPTIONS)
    assert "404" in missing[0]["error"] and found == expected


def test_columns_of_data_sets(captioner, expected, file):
    rows = datasets.Dataset.from_dict({"audio": [str(file)] * 3, "name": list("abc")})
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    assert captioner(rows["audio"], **OPTIONS) == [expected] * 3
    assert list(captioner(KeyDataset(rows, "audio"), **OPTIONS)) == [expected] * 3
    assert list(captioner(KeyDataset(rows, "audio"), batch_size=2, **OPTIONS)) == [expected] * 3
    assert list(captioner((row["audio"] for row in rows), **OPTIONS)) == [expected] * 3


def decoded(data, rate, extension, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate, format=extension, **options)
    return read_audio(buffer.getvalue(), 16000)


@pytest.mark.parametrize(
    ("extension", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.2),
        ("MP3", "MPEG_LAYER_III", 0.5),
    ],
)
def test_formats(extension, subtype, error, wave):
    audio = decoded(wave, 16000, extension, subtype=subtype)
    assert audio.dtype == np.float32 and audio.ndim == 1 and abs(len(audio) - len(wave)) < 2000
    if extension != "MP3":  # whose encoder pads the start
        assert np.abs(audio[: len(wave)] - wave[: len(audio)]).max() <= error


def test_stereo_is_averaged_and_other_rates_resampled(wave):
    left, right = wave, 0.5 * wave[::-1]
    np.testing.assert_allclose(
        decoded(np.stack([left, right], 1), 16000, "FLAC", subtype="PCM_24"), (left + right) / 2, atol=1e-6
    )
    times = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * times)
    result = decoded(np.stack([tone, tone], 1), 44100, "WAV", subtype="PCM_24")
    assert len(result) == 16000
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(result[500:-500], wanted[500:-500], atol=1e-3)
    as_array = read_audio({"array": np.stack([tone, tone]), "sampling_rate": 44100}, 16000)
    np.testing.assert_allclose(as_array[500:-500], wanted[500:-500], atol=1e-3)


# -- batches and generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_say_what_single_clips_say(captioner, batch_size):
    clips = [{"array": noise(seconds, seed), "sampling_rate": 16000} for seed, seconds in enumerate((0.5, 11.0, 1.3))]
    expected = [captioner(clip, **OPTIONS) for clip in clips]
    assert len({result[0]["generated_text"] for result in expected}) > 1
    assert captioner(clips, batch_size=batch_size, **OPTIONS) == expected


class Noises(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError(number)  # without `__iter__`, this ends a loop over it
        return {"array": noise(0.4 + 0.1 * number, number), "sampling_rate": 16000}


def test_generators_and_data_sets_read_by_a_worker_say_the_same(captioner):
    clips = [Noises()[number] for number in range(10)]
    expected = [captioner(clip, **OPTIONS) for clip in clips]
    assert list(captioner((clip for clip in clips), batch_size=4, **OPTIONS)) == expected
    assert list(captioner(Noises(), batch_size=4, num_workers=1, **OPTIONS)) == expected


def test_the_models_settings_are_left_alone(model, processor, wave):
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    several = pipeline("audio-captioning", model=model, processor=processor, num_beams=3, max_new_tokens=4)
    several(wave, sampling_rate=16000, num_return_sequences=2)
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation


def test_several_captions_a_clip(captioner, wave, file):
    result = captioner(str(file), num_return_sequences=3, num_beams=3, **OPTIONS)
    assert len(result) == 3 and len({item["generated_text"] for item in result}) == 3
    both = captioner([str(file)] * 2, batch_size=2, num_return_sequences=3, num_beams=3, **OPTIONS)
    assert both == [result, result]


def test_arguments_for_generate(captioner, expected, file, model, processor, wave):
    def caption(**kwargs):
        return captioner(str(file), **kwargs)

    assert caption(generate_kwargs=OPTIONS) == expected
    assert caption(generate_kwargs=OPTIONS, max_new_tokens=2) == expected  # the dictionary is the more explicit one
    assert caption(**OPTIONS, num_beams=3) == caption(generate_kwargs=OPTIONS | {"num_beams": 3})
    inputs = processor(audio=wave, sampling_rate=16000)
    for weight in (0.0, 3.0):
        tokens = model.generate(**inputs, **OPTIONS, token_guide_weight=weight)
        wanted = [{"generated_text": processor.batch_decode(tokens, skip_special_tokens=True)[0]}]
        assert caption(**OPTIONS, token_guide_weight=weight) == wanted
        assert caption(generate_kwargs=OPTIONS | {"token_guide_weight": weight}) == wanted
    assert caption(**OPTIONS, token_guide_weight=3.0) != expected
    tokens = model.generate(**inputs, **OPTIONS, num_candidates=4)
    wanted = [{"generated_text": processor.batch_decode(tokens, skip_special_tokens=True)[0]}]
    assert caption(**OPTIONS, num_candidates=4) == wanted
    prompted = model.generate(**processor(text="What is it?", audio=wave, sampling_rate=16000), **OPTIONS)
    assert caption(prompt="What is it?", **OPTIONS)[0]["generated_text"] == processor.decode(
        prompted[0], skip_special_tokens=True
    )


def test_a_prompt_outside_the_template_is_not_part_of_the_caption(captioner, file, model, processor, wave):
    inputs = processor(text="<|audio|> Say:", audio=wave, sampling_rate=16000)
    tokens = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
    wanted = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert captioner(str(file), prompt="<|audio|> Say:", **OPTIONS) == [{"generated_text": wanted}]


def test_settings_of_the_pipeline_itself(model, processor, expected, file):
    captioner = pipeline("audio-captioning", model=model, processor=processor, token_guide_weight=3.0, **OPTIONS)
    assert captioner(str(file)) != expected
    assert captioner(str(file), token_guide_weight=None) != expected
    assert captioner(str(file), token_guide_weight=0.1) == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_long_recordings_window_by_window(captioner, processor, batch_size):
    wave = noise(2.7, 3)
    recording = {"array": wave, "sampling_rate": 16000}
    result = captioner(recording, chunk_length_s=1.0, return_timestamps=True, batch_size=batch_size, **OPTIONS)
    assert len(result) == 1
    chunks = result[0]["chunks"]
    assert [chunk["timestamp"] for chunk in chunks] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.7)]
    for chunk in chunks:
        start, stop = (round(16000 * second) for second in chunk["timestamp"])
        alone = captioner(wave[start:stop], sampling_rate=16000, **OPTIONS)
        assert chunk["text"] == alone[0]["generated_text"]
    assert result[0]["generated_text"] == " ".join(chunk["text"] for chunk in chunks)
    plain = captioner(recording, chunk_length_s=1.0, **OPTIONS)
    assert plain == [{"generated_text": result[0]["generated_text"]}]
    two = captioner(
        [recording, recording], chunk_length_s=1.0, return_timestamps=True, batch_size=batch_size, **OPTIONS
    )
    assert two == [result, result]


def test_a_last_window_too_short_to_hear_joins_the_one_before(captioner):
    wave = noise(2.1, 3)
    result = captioner(wave, sampling_rate=16000, chunk_length_s=1.0, return_timestamps=True, **OPTIONS)
    assert [chunk["timestamp"] for chunk in result[0]["chunks"]] == [(0.0, 1.0), (1.0, 2.1)]


def test_timestamps_without_windows_cover_the_clip(captioner, wave):
    result = captioner(wave, sampling_rate=16000, return_timestamps=True, **OPTIONS)
    assert [chunk["timestamp"] for chunk in result[0]["chunks"]] == [(0.0, 0.8)]


def test_another_familys_extractor_captions_by_windows(tokenizer):
    """Whisper's window is fixed (here 1 s): chunk_length_s gives it the whole recording."""
    model = randomized(LambForAudioCaptioning(tiny_config(audio_config=ENCODERS["whisper"][0]))).eval()
    processor = LambProcessor(ENCODERS["whisper"][1](), tokenizer, num_audio_tokens=4)
    captioner = pipeline("audio-captioning", model=model, processor=processor)
    result = captioner(noise(2.5), sampling_rate=16000, chunk_length_s=1.0, return_timestamps=True, **OPTIONS)
    assert len(result[0]["chunks"]) == 3


# -- what cannot be captioned ------------------------------------------------------------------------------------------


@pytest.fixture
def broken(file, wave):
    """Sources that hold no sound, and what the error says of each."""
    folder = file.parent
    (folder / "text.wav").write_text("This is no sound.")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "header.wav").write_bytes(file.read_bytes()[:30])
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16000)

    def array(value):
        bad = wave.copy()
        bad[100] = value
        return {"array": bad, "sampling_rate": 16000}

    return [
        (str(folder / "missing.wav"), r"There is no file .*missing\.wav"),
        (str(folder / "text.wav"), r"text\.wav cannot be decoded"),
        (str(folder / "empty.wav"), r"empty\.wav cannot be decoded"),
        (str(folder / "header.wav"), r"header\.wav cannot be decoded"),
        (str(folder / "no_samples.wav"), "0 samples, expected at least 2400"),
        (str(folder), "There is no file"),
        (b"no sound", "8 bytes cannot be decoded"),
        ({"array": np.zeros(1, dtype=np.float32), "sampling_rate": 16000}, "1 samples, expected at least 2400"),
        ({"array": np.zeros(0, dtype=np.float32), "sampling_rate": 44100}, "0 samples"),
        (array(np.nan), "NaN or infinite"),
        (array(np.inf), "NaN or infinite"),
        ({"array": wave}, "needs its rate"),
        ({"array": wave, "sampling_rate": 0}, "sampling_rate=0"),
        ({"array": np.zeros((16000, 2), dtype=np.float32), "sampling_rate": 16000}, "transpose it"),
        ({"array": np.zeros((1, 2, 16000), dtype=np.float32), "sampling_rate": 16000}, r"shape \(1, 2, 16000\)"),
        ({"array": (wave * 32767).astype(np.int16), "sampling_rate": 16000}, "holds int16"),
        ({"sound": wave}, "needs 'array', 'raw', 'bytes' or 'path'"),
    ]


def test_what_cannot_be_read_is_a_value_error(captioner, broken):
    for source, message in broken:
        with pytest.raises(ValueError, match=message):
            captioner(source, **OPTIONS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_on_error_goes_on_with_the_others(captioner, broken, expected, file, batch_size):
    sources = [source for source, _ in broken]
    results = captioner([str(file), *sources, str(file)], on_error="return", batch_size=batch_size, **OPTIONS)
    assert results[0] == results[-1] == expected
    for result, (_, message) in zip(results[1:-1], broken, strict=True):
        assert result[0]["generated_text"] is None
        assert re.search(message, result[0]["error"])


def test_a_truncated_file_is_captioned_as_far_as_it_goes_or_refused(captioner, file, wave, tmp_path):
    """libsndfile reads what is there, whatever length the header promises."""
    half = tmp_path / "half.wav"
    half.write_bytes(file.read_bytes()[: 44 + 4 * len(wave) // 2])
    audio = read_audio(str(half), 16000)
    assert len(audio) < len(wave) and np.array_equal(audio, wave[: len(audio)])
    assert captioner(str(half), **OPTIONS) == captioner(audio, sampling_rate=16000, **OPTIONS)


def test_silence_is_captioned_without_nan(captioner, model, processor):
    silence = np.zeros(16000, dtype=np.float32)
    assert isinstance(captioner(silence, sampling_rate=16000, **OPTIONS)[0]["generated_text"], str)
    with torch.no_grad():
        assert model(**processor(audio=silence, sampling_rate=16000)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 5}, r"Unknown arguments \['max_new_token'\]"),
        ({"on_error": "ignore"}, "on_error='ignore' must be"),
        ({"chunk_length_s": 0}, "chunk_length_s=0 must be a positive"),
        ({"chunk_length_s": 0.05}, "chunk_length_s=0.05"),
        ({"chunk_length_s": float("nan")}, "chunk_length_s=nan must be a positive"),
        ({"return_timestamps": "word"}, "return_timestamps='word' must be"),
        ({"prompt": ["a", "b"]}, "must be one text"),
        ({"sampling_rate": float("nan")}, "sampling_rate=nan of an array"),
        ({"sampling_rate": 1}, "sampling_rate=1 of an array"),
    ],
)
def test_wrong_arguments(captioner, wave, options, message):
    with pytest.raises(ValueError, match=message):
        captioner(wave, **{"sampling_rate": 16000} | options)


def test_without_its_processor_it_says_what_to_pass(model, tokenizer):
    with pytest.raises(ValueError, match="pass `processor="):
        AudioCaptioningPipeline(model=model, tokenizer=tokenizer)


# -- saved -------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_says_the_same(captioner, expected, file, tmp_path):
    captioner.save_pretrained(tmp_path / "1")
    half = pipeline("audio-captioning", model=tmp_path / "1", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half(str(file), **OPTIONS)[0]["generated_text"]
    again = pipeline("audio-captioning", model=str(tmp_path / "1"))
    assert type(again) is AudioCaptioningPipeline and again(str(file), **OPTIONS) == expected
    again.save_pretrained(tmp_path / "2")
    third = pipeline("audio-captioning", model=str(tmp_path / "2"))
    assert third(str(file), **OPTIONS) == expected
    saved = {path.name for path in (tmp_path / "2").iterdir()}
    assert {"pipeline_audio_captioning.py", "processing_lamb.py", "modeling_lamb.py", "model.safetensors"} <= saved
    assert saved == {path.name for path in (tmp_path / "1").iterdir()}
