"""The front end against float64 numpy, YAMNet's recipe as a configuration of it, padding, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import ENCODERS, noise
from transformers import AutoFeatureExtractor

from modeling_lamb import LambFeatureExtractor


@pytest.fixture
def extractor():
    return LambFeatureExtractor()


def hz_to_mel(hz):
    return 2595 * np.log10(1 + np.asarray(hz) / 700)  # HTK


def power_frames(wave, window):
    """Power spectra of frames of 512 samples every 160, centred, the ends mirrored; float64."""
    padded = np.pad(wave.astype(np.float64), 256, mode="reflect")
    frames = np.stack([padded[start : start + 512] for start in range(0, len(padded) - 511, 160)])
    return np.abs(np.fft.rfft(frames * window)) ** 2


def oracle(wave):
    """torchaudio's MelSpectrogram and AmplitudeToDB(top_db=120) of one clip, in float64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)  # periodic Hann
    edges = 700 * (10 ** (np.linspace(0, hz_to_mel(8000), 66) / 2595) - 1)
    bins = np.arange(257) * 16000 / 512
    filters = np.zeros((257, 64))
    for m in range(64):
        low, centre, high = edges[m : m + 3]
        filters[:, m] = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    decibel = 10 * np.log10(np.maximum(power_frames(wave, window) @ filters, 1e-10)).T
    return np.maximum(decibel, decibel.max() - 120)


def quiet_and_loud():
    """A full-scale tone that stops, so that the floor is reached, and a faint hiss at its end."""
    wave = np.zeros(32000, dtype=np.float32)
    wave[:12000] = np.sin(2 * np.pi * 1000 * np.arange(12000) / 16000)
    wave[24000:] = 1e-5 * np.random.default_rng(0).standard_normal(8000)
    return wave


@pytest.mark.parametrize(
    "wave",
    [noise(2.0, 1), 0.9 * np.sign(noise(1.0, 2)), quiet_and_loud(), 1e-3 * noise(0.5), noise(0.15)],
    ids=["noise", "square", "quiet and loud", "faint", "shortest"],
)
def test_log_mel_is_the_float64_oracle(extractor, wave):
    wave = wave.astype(np.float32)
    features = extractor(wave, sampling_rate=16000, return_tensors="np")["input_features"]
    expected = oracle(wave)
    assert features.dtype == np.float32 and features.shape == (1, 64, len(wave) // 160 + 1)
    error, audible = np.abs(features[0] - expected), expected > expected.max() - 80
    assert error[audible].max() < 1e-2
    assert error.max() < 0.2


def test_silence_is_minus_100_db(extractor):
    features = extractor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.equal(features, torch.full((1, 64, 101), -100.0))


def test_the_floor_is_the_clips_own(extractor):
    loud, silent = quiet_and_loud(), np.zeros(32000, dtype=np.float32)
    both = extractor([loud, silent], sampling_rate=16000, return_tensors="np")["input_features"]
    assert both[0].min() == pytest.approx(both[0].max() - 120, abs=1e-3) and both[0].min() > -100
    assert (both[1] == -100).all()


@pytest.mark.parametrize("name", ["ced", "mobilenet"])
def test_a_clips_features_do_not_depend_on_its_batch(name):
    extractor = ENCODERS[name][1]()
    clips = [noise(seconds, seed) for seed, seconds in enumerate((1.0, 0.3, 2.5, 0.96))]
    batch = extractor(clips, sampling_rate=16000, return_tensors="pt")
    for row, clip in enumerate(clips):
        alone = extractor(clip, sampling_rate=16000, return_tensors="pt")
        real = int(alone["input_features_mask"].sum())
        assert real == int(batch["input_features_mask"][row].sum()) == extractor.count_frames(len(clip))
        assert torch.equal(batch["input_features"][row, :, :real], alone["input_features"][0, :, :real])
        rest = batch["input_features"][row, :, alone["input_features"].shape[2] :]
        assert torch.equal(rest, torch.full_like(rest, extractor.silence))


# -- YAMNet's recipe ---------------------------------------------------------------------------------------------------


def yamnet_patches(wave):
    """25 ms Hann frames every 10 ms, magnitude, 64 triangles over mel of 125-7500 Hz, ln(x + 0.001), 96 frames every 48."""
    wave = np.pad(wave.astype(np.float64), (0, max(0, 15600 - len(wave))))
    patches = int(np.ceil(max(0, len(wave) - 15600) / 7680)) + 1
    wave = np.pad(wave, (0, max(0, 15600 + 7680 * (patches - 1) - len(wave))))
    frames = np.stack([wave[start : start + 400] for start in range(0, len(wave) - 399, 160)])
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400))
    magnitude = np.abs(np.fft.rfft(frames, 512))
    edges, bins = np.linspace(*hz_to_mel([125, 7500]), 66), hz_to_mel(np.arange(257) * 16000 / 512)
    filters = np.zeros((257, 64))
    for m in range(64):
        low, centre, high = edges[m : m + 3]
        filters[:, m] = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    log_mel = np.log(magnitude @ filters + 1e-3)
    return np.stack([log_mel[48 * i : 48 * i + 96] for i in range(patches)])


@pytest.mark.parametrize("seconds", [0.5, 0.975, 1.0, 3.0])
def test_yamnets_front_end_is_a_configuration(seconds):
    extractor, wave = ENCODERS["mobilenet"][1](), noise(seconds)
    output = extractor(wave, sampling_rate=16000, return_tensors="pt")
    patches = output["input_features"].unfold(2, 96, 48)[0].permute(1, 2, 0)  # (patches, frames, mel)
    expected = yamnet_patches(wave)
    assert patches.shape == expected.shape
    assert np.abs(patches.numpy() - expected).max() < 1e-3
    assert int(output["input_features_mask"].sum()) == max(0, len(wave) - 400) // 160 + 1


# -- arguments as the library's extractors have them -------------------------------------------------------------------


def test_inputs_and_outputs_of_every_kind(extractor):
    wave = noise(1.0)
    expected = extractor(wave, sampling_rate=16000, return_tensors="pt")
    assert expected["input_features"].dtype == torch.float32 and expected["input_features_mask"].dtype == torch.int64
    for clip in (torch.from_numpy(wave), wave.astype(np.float64), wave.tolist(), [wave], wave[None]):
        result = extractor(clip, sampling_rate=16000, return_tensors="pt")
        assert torch.equal(result["input_features"], expected["input_features"])
    arrays = extractor(wave, sampling_rate=16000, return_tensors="np")
    assert isinstance(arrays["input_features"], np.ndarray)
    np.testing.assert_array_equal(arrays["input_features"], expected["input_features"].numpy())
    lists = extractor([wave, wave[:8000]], sampling_rate=16000, padding=False)
    assert [features.shape for features in lists["input_features"]] == [(64, 101), (64, 51)]
    np.testing.assert_array_equal(lists["input_features"][0], arrays["input_features"][0])


def test_padding_truncation_and_multiples(extractor):
    clips = [noise(1.0), noise(0.5, 1)]

    def shapes(**kwargs):
        output = extractor(clips, sampling_rate=16000, return_tensors="pt", **kwargs)
        return tuple(output["input_features"].shape), output["input_features_mask"].sum(1).tolist()

    assert shapes() == shapes(padding="longest") == ((2, 64, 101), [101, 51])
    assert shapes(padding="max_length", max_length=32000) == ((2, 64, 201), [101, 51])
    assert shapes(padding=True, pad_to_multiple_of=20000) == ((2, 64, 126), [101, 51])
    assert shapes(truncation=True, max_length=12000, padding="max_length") == ((2, 64, 76), [76, 51])
    assert shapes(truncation=True, max_length=8000) == ((2, 64, 51), [51, 51])
    with pytest.raises(ValueError, match="make no tensor: use padding=True"):
        shapes(padding=False)


def test_padding_on_the_left_is_not_heard(extractor):
    left = type(extractor)(padding_side="left")
    clips = [noise(1.0), noise(0.3, 1)]
    for mine, theirs in zip(left(clips, 16000).values(), extractor(clips, 16000).values(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_bfloat16_is_read_as_what_it_rounds_to(extractor):
    wave = torch.from_numpy(noise(0.5)).bfloat16()
    features = [extractor(clip, 16000)["input_features"][0] for clip in (wave, wave.float())]
    assert np.array_equal(*features)


def test_a_truncated_clip_is_the_cut_clip(extractor):
    wave = noise(1.0)
    cut = extractor(wave, sampling_rate=16000, truncation=True, max_length=8000, return_tensors="pt")
    expected = extractor(wave[:8000], sampling_rate=16000, return_tensors="pt")
    assert torch.equal(cut["input_features"], expected["input_features"])


def test_the_mask_can_be_left_out(extractor):
    output = extractor(noise(0.5), sampling_rate=16000, return_attention_mask=False, return_tensors="pt")
    assert set(output) == {"input_features"}


@pytest.mark.parametrize("name", ["ced", "mobilenet"])
def test_settings_travel(name, tmp_path):
    extractor = ENCODERS[name][1]()
    extractor.save_pretrained(tmp_path)
    assert "mel_filters" not in (tmp_path / "preprocessor_config.json").read_text()
    loaded = LambFeatureExtractor.from_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is LambFeatureExtractor
    expected = extractor(noise(1.0), sampling_rate=16000, return_tensors="pt")
    for other in (loaded, again):
        result = other(noise(1.0), sampling_rate=16000, return_tensors="pt")
        assert torch.equal(result["input_features"], expected["input_features"])
    loaded.save_pretrained(tmp_path / "2")
    assert (tmp_path / "2/preprocessor_config.json").read_text() == (tmp_path / "preprocessor_config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_scale": "log2"}, "log_scale='log2' must be"),
        ({"win_length": 600}, "win_length=600 must not exceed n_fft=512"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LambFeatureExtractor(**settings)


# -- what is refused ---------------------------------------------------------------------------------------------------


def broken(value):
    wave = noise(1.0)
    wave[500] = value
    return wave


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(0, dtype=np.float32), "Clip 0 has 0 samples, expected at least 2400"),
        ([], "Clip 0 has 0 samples"),
        (np.zeros(1, dtype=np.float32), r"Clip 0 has 1 samples, expected at least 2400 \(0.150 s at 16000 Hz\)"),
        ([noise(1.0), noise(0.1)], "Clip 1 has 1600 samples"),
        (broken(np.nan), "Clip 0 holds NaN or infinite"),
        ([noise(1.0), broken(-np.inf)], "Clip 1 holds NaN or infinite"),
        (noise(1.0) * np.float32(1e20), "Clip 0 has samples as large as"),
        (noise(1.0).astype(np.float64) * 1e40, "Clip 0 has samples as large as"),
        ((noise(1.0) * 32767).astype(np.int16), "Clip 0 holds int16, expected floats"),
        (np.zeros((1, 2, 16000), dtype=np.float32), r"Clip 0 has the shape \(2, 16000\), expected mono"),
        ([noise(1.0), np.zeros((2, 16000), dtype=np.float32)], "Clip 1 has the shape"),
    ],
    ids=[
        "empty",
        "empty list",
        "one sample",
        "short",
        "nan",
        "inf",
        "loud",
        "louder",
        "integers",
        "stereo",
        "stereo in a list",
    ],
)
def test_bad_audio_is_refused_by_number(extractor, clip, message):
    with pytest.raises(ValueError, match=message):
        extractor(clip, sampling_rate=16000)


def test_other_refusals(extractor):
    with pytest.raises(ValueError, match=r"sampling_rate=44100 Hz, expected 16000 Hz: resample it first"):
        extractor(noise(1.0), sampling_rate=44100)
    with pytest.raises(ValueError, match=r"max_length=64 samples would cut the clips below the 2400"):
        extractor(noise(1.0), sampling_rate=16000, truncation=True, max_length=64)
    with pytest.raises(ValueError, match=r"Unknown arguments \['paddding'\]"):
        extractor(noise(1.0), sampling_rate=16000, paddding=True)


def test_the_rate_is_asked_for(extractor, caplog):
    type(extractor).__call__.__globals__["logger"].warning_once.cache_clear()
    extractor(noise(0.5))
    assert "sampling_rate was not given" in caplog.text
