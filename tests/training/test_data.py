import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, write_table
from training_lamb import data
from training_lamb.data import CaptionCollator, EncodedClips, OneRowPerCaption, WaveformClips
from training_lamb.readers import Clip, read_table


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.5 + number / 2, number), 16000)
    write_table(tmp_path / "metadata.csv", [(f"{number}.wav", f"A tone, number {number}.") for number in range(3)])
    return tmp_path


def test_cached_tokens_train_as_the_audio_does(folder, model, processor, tmp_path):
    clips = read_table(folder)[0]
    encoded = EncodedClips(clips, processor, model, tmp_path / "cache", "clips")
    rows = OneRowPerCaption(encoded, [1] * len(clips))
    waves = OneRowPerCaption(WaveformClips(clips, 16000), [1] * len(clips))
    collate = CaptionCollator(processor)
    with torch.no_grad():
        cached = model(**collate([rows[i] for i in range(3)]))
        heard = model(**collate([waves[i] for i in range(3)]))
    assert cached.loss.item() == pytest.approx(heard.loss.item(), rel=2e-3)  # the cache is in half precision


def test_the_cache_is_filled_once_and_leaves_out_what_cannot_be_read(folder, model, processor, tmp_path, monkeypatch):
    (folder / "1.wav").write_bytes(b"")
    clips = read_table(folder)[0]
    encoded = EncodedClips(clips, processor, model, tmp_path / "cache", "clips")
    assert len(encoded) == 2 and set(encoded.skipped) == {"1.wav"}
    monkeypatch.setattr(data, "_encode_shard", lambda *args: pytest.fail("encoded again"))
    again = EncodedClips(clips, processor, model, tmp_path / "cache", "clips")
    assert np.array_equal(again[0]["audio_hidden_states"], encoded[0]["audio_hidden_states"])


def test_several_processes_fill_the_cache_as_one_does(folder, model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedClips, "SHARD", 1)
    clips = read_table(folder)[0]
    one = EncodedClips(clips, processor, model, tmp_path / "one", "clips")
    two = EncodedClips(clips, processor, model, tmp_path / "two", "clips", num_workers=2)
    for mine, theirs in zip(one, two, strict=True):
        assert mine["id"] == theirs["id"] and mine["captions"] == theirs["captions"]
        torch.testing.assert_close(mine["audio_hidden_states"], theirs["audio_hidden_states"], atol=2e-3, rtol=2e-3)


def test_a_bad_file_is_replaced_and_named(folder):
    clips = [Clip(str(folder / "gone.wav"), ["A."], "gone"), *read_table(folder)[0]]
    waves = WaveformClips(clips, 16000)
    assert waves[0]["id"] == "0.wav"
    assert set(waves.skipped) == {"gone"}
