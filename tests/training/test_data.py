import csv

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from training_lamb import data
from training_lamb.data import CaptionCollator, Clip, EncodedClips, OneRowPerCaption, WaveformClips, read_folder


def write_folder(folder, rows, columns=("file_name", "caption")):
    with open(folder / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([columns, *rows])


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.5 + number / 2, number), 16000)
    write_folder(tmp_path, [(f"{number}.wav", f"A tone, number {number}.") for number in range(3)])
    return tmp_path


def test_a_folder_and_its_table_give_clips(folder):
    clips = read_folder(folder)
    assert [clip.id for clip in clips] == ["0.wav", "1.wav", "2.wav"]
    assert clips[1].captions == ["A tone, number 1."]


def test_several_caption_columns_and_line_breaks(folder):
    write_folder(folder, [("0.wav", "One\ntwo.", "", "Three.")], ("file_name", "caption_1", "caption_2", "caption_3"))
    assert read_folder(folder)[0].captions == ["One two.", "Three."]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("0.wav", "A.")], ("path", "caption"), "file_name"),
        ([("0.wav", " ")], ("file_name", "caption"), "0.wav.*no caption"),
        ([("9.wav", "A.")], ("file_name", "caption"), "None of the 1 files"),
    ],
)
def test_a_bad_table_is_refused(folder, rows, columns, message):
    write_folder(folder, rows, columns)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


def test_missing_files_are_left_out(folder):
    write_folder(folder, [("0.wav", "A."), ("9.wav", "B.")])
    assert [clip.id for clip in read_folder(folder)] == ["0.wav"]


def test_cached_tokens_train_as_the_audio_does(folder, model, processor, tmp_path):
    clips = read_folder(folder)
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
    clips = read_folder(folder)
    encoded = EncodedClips(clips, processor, model, tmp_path / "cache", "clips")
    assert len(encoded) == 2 and set(encoded.skipped) == {"1.wav"}
    monkeypatch.setattr(data, "_encode_shard", lambda *args: pytest.fail("encoded again"))
    again = EncodedClips(clips, processor, model, tmp_path / "cache", "clips")
    assert np.array_equal(again[0]["audio_hidden_states"], encoded[0]["audio_hidden_states"])


def test_several_processes_fill_the_cache_as_one_does(folder, model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedClips, "SHARD", 1)
    clips = read_folder(folder)
    one = EncodedClips(clips, processor, model, tmp_path / "one", "clips")
    two = EncodedClips(clips, processor, model, tmp_path / "two", "clips", num_workers=2)
    for mine, theirs in zip(one, two, strict=True):
        assert mine["id"] == theirs["id"] and mine["captions"] == theirs["captions"]
        torch.testing.assert_close(mine["audio_hidden_states"], theirs["audio_hidden_states"], atol=2e-3, rtol=2e-3)


def test_a_bad_file_is_replaced_and_named(folder):
    clips = [Clip(str(folder / "gone.wav"), ["A."], "gone"), *read_folder(folder)]
    waves = WaveformClips(clips, 16000)
    assert waves[0]["id"] == "0.wav"
    assert set(waves.skipped) == {"gone"}
