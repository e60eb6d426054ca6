import numpy as np
import pytest
import soundfile
import torch
from conftest import ENCODERS, noise, randomized, tiny_config, write_table
from training_lamb import data
from training_lamb.data import (
    CaptionCollator,
    EncodedClips,
    JoinedRows,
    OneRowPerCaption,
    WaveformClips,
    WeightedRows,
    stream_rows,
)
from training_lamb.readers import Clip, read_hub, read_table, to_dataset

from modeling_lamb import LambForAudioCaptioning, LambProcessor


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


def test_hidden_states_are_kept_while_later_layers_train(folder, tokenizer, tmp_path, monkeypatch):
    settings, extractor = ENCODERS["mobilenet"]
    processor = LambProcessor(extractor(), tokenizer, num_audio_tokens=4)
    model = randomized(LambForAudioCaptioning(tiny_config(audio_config=settings, num_trained_audio_layers=2))).eval()
    clips, collate = read_table(folder)[0], CaptionCollator(processor)
    waves = OneRowPerCaption(WaveformClips(clips, 16000), [1] * len(clips))
    encoded = EncodedClips(clips, processor, model, tmp_path, "clips")
    for _ in range(2):
        rows = OneRowPerCaption(encoded, [1] * len(clips))
        with torch.no_grad():
            cached = model(**collate([rows[i] for i in range(3)]))
            heard = model(**collate([waves[i] for i in range(3)]))
        torch.testing.assert_close(cached.audio_embeds, heard.audio_embeds, atol=1e-2, rtol=1e-2)
        with torch.no_grad():  # the last layers learn, and the cache stays good
            model.audio_encoder.layer[-1].convolution.weight *= 0.5
        with monkeypatch.context() as patch:
            patch.setattr(data, "_encode_shard", lambda *args: pytest.fail("encoded again"))
            encoded = EncodedClips(clips, processor, model, tmp_path, "clips")
    with torch.no_grad():
        model.audio_encoder.layer[0].convolution.weight *= 0.5
    assert EncodedClips(clips, processor, model, tmp_path, "clips").folder != encoded.folder


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


def test_long_clips_are_cropped_at_random_in_training_and_alike_in_evaluation(folder):
    clips = read_table(folder)[0]  # 0.5, 1.0 and 1.5 s
    training = WaveformClips(clips, 16000, max_seconds=0.75, random_crop=True)
    evaluation = WaveformClips(clips, 16000, max_seconds=0.75)
    assert [len(training[n]["audio"]) for n in range(3)] == [8000, 12000, 12000]
    assert not np.array_equal(training[2]["audio"], training[2]["audio"])
    assert np.array_equal(evaluation[2]["audio"], WaveformClips(clips, 16000)[2]["audio"][:12000])


def test_cached_tokens_say_how_many_clips_they_cut(folder, model, processor, tmp_path):
    encoded = EncodedClips(read_table(folder)[0], processor, model, tmp_path / "cache", "clips", max_seconds=0.75)
    assert encoded.cut == 2


def test_sources_are_joined_with_clip_numbers_apart(folder):
    parts = [OneRowPerCaption(WaveformClips(read_table(folder)[0], 16000), [1, 1, 1]) for _ in range(2)]
    joined = JoinedRows(parts)
    clips = [joined[n]["clip"] for n in range(6)]
    assert len(set(clips)) == 6
    assert [joined.clip_name(clip) for clip in clips] == [f"{n}.wav" for n in (0, 1, 2, 0, 1, 2)]


def test_a_weight_says_how_often_rows_are_seen(folder):
    rows = OneRowPerCaption(WaveformClips(read_table(folder)[0], 16000), [1, 1, 1])
    seen = [row["id"] for row in WeightedRows(rows, 7 / 3, seed=0)]
    assert len(seen) == 7 and min(seen.count(name) for name in set(seen)) == 2
    assert len(WeightedRows(rows, 1 / 3, seed=0)) == 1


def test_spec_augment_masks_training_clips_alone(folder, processor):
    clips = read_table(folder)[0]
    plain = CaptionCollator(processor)
    masked = CaptionCollator(processor, {"time": 20, "frequency": 8, "count": 2})
    for random_crop in (True, False):
        rows = OneRowPerCaption(WaveformClips(clips, 16000, random_crop=random_crop), [1, 1, 1])
        batch = [rows[n] for n in range(3)]
        same = torch.equal(plain(batch)["input_features"], masked(batch)["input_features"])
        assert same is not random_crop


def stream(folder, name, audio, captions, shards=1):
    """A data set of parquet files, read as it comes."""
    clips = [
        Clip(str(file), [f"{c} {number}." for c in captions], f"{name}{number}") for number, file in enumerate(audio)
    ]
    (folder / name).mkdir()
    for shard in range(shards):
        to_dataset(clips[shard::shards]).to_parquet(folder / name / f"train-{shard}.parquet")
    return read_hub(str(folder / name), streaming=True)


def test_streamed_rows_are_endless_mixed_by_weight_and_without_bad_files(folder, caplog):
    (folder / "broken.wav").write_bytes(b"")
    files = [folder / "0.wav", folder / "broken.wav", folder / "1.wav"]
    streams = [(stream(folder, "a", files, ["one", "two"], 2), 3.0), (stream(folder, "b", files[:1], ["three"]), 1.0)]
    rows = list(stream_rows(streams, 16000, 0.25, shuffle_buffer=8).take(400))
    assert {row["caption"] for row in rows} == {"one 0.", "two 0.", "one 2.", "two 2.", "three 0."}
    assert sum(row["caption"] == "three 0." for row in rows) / 400 == pytest.approx(0.34, abs=0.1)  # 1 of 1 + 3 * 2 / 3
    assert all(len(row["audio"]) == 4000 for row in rows)
    assert len({row["clip"] for row in rows}) == 3 and "a1 is left out" in caplog.text
    again = [row["caption"] for row in stream_rows(streams, 16000, 0.25, shuffle_buffer=8).take(20)]
    assert again == [row["caption"] for row in rows[:20]]
