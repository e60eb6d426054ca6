"""Readers of the published sets, on files of the shapes that are really published."""

import json

import datasets
import pytest
import soundfile
from conftest import noise, write_table
from processing_lamb import read_audio
from training_lamb.readers import (
    FEATURES,
    HubClips,
    caption_counts,
    read_audiocaps,
    read_coco,
    read_hub,
    read_table,
    read_wavcaps,
    to_dataset,
)


def sounds(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate(names):
        soundfile.write(folder / name, noise(0.3, number), 16000)
    return folder


def test_a_folder_and_its_table_give_clips(tmp_path):
    sounds(tmp_path, "a.wav", "b.flac")
    write_table(tmp_path / "metadata.csv", [("a.wav", "One\ntwo."), ("b.wav", "Three."), ("a.wav", "Four.")])
    clips, report = read_table(tmp_path)
    assert [(clip.id, clip.captions) for clip in clips] == [("a.wav", ["One two.", "Four."]), ("b.wav", ["Three."])]
    assert clips[1].audio.endswith("b.flac")  # joined by name, whatever the format became
    assert report.found == 2 and not report.left_out


def test_clotho_file_names_with_commas_quotes_and_blanks(tmp_path):
    name = 'Birds, "dawn" [field].wav'
    sounds(tmp_path / "audio", name)
    columns = ("file_name", *(f"caption_{number}" for number in range(1, 6)))
    table = write_table(tmp_path / "clotho.csv", [(name, "A.", "B.", "C.", "D.", "E.")], columns)
    (clip,), _ = read_table(table, tmp_path / "audio", "Clotho")
    assert clip.id == name and clip.captions == ["A.", "B.", "C.", "D.", "E."] and clip.source == "Clotho"


def test_audiocaps_groups_the_rows_of_a_clip_by_its_id(tmp_path):
    audio = sounds(tmp_path / "audio", "Yabcdefghijk.wav", "mnopqrstuvw_30.flac", "-_345678901_20000_30000.wav")
    rows = [
        (1, "abcdefghijk", 10, "A."),
        (2, "mnopqrstuvw", 30, "B."),
        (3, "abcdefghijk", 10, "C."),
        (4, "-_345678901", 20, "D."),
        (5, "goneeeeeeee", 0, "E."),
    ]
    table = write_table(tmp_path / "test.csv", rows, ("audiocap_id", "youtube_id", "start_time", "caption"))
    clips, report = read_audiocaps(table, audio)
    assert {clip.id: clip.captions for clip in clips} == {
        "abcdefghijk_10": ["A.", "C."],
        "mnopqrstuvw_30": ["B."],
        "-_345678901_20": ["D."],
    }
    assert report.left_out == {"missing": ["goneeeeeeee_0"]}
    assert "3 clips" in str(report) and "goneeeeeeee_0" in str(report)


def test_wavcaps_leaves_out_what_the_blacklist_and_the_944_clips_name(tmp_path):
    names = ["Yaaaaaaaaaaa", "Ybbbbbbbbbbb", "Y0UJtGcoPYa0"]
    audio = sounds(tmp_path / "audio", *(f"{name}.flac" for name in names))
    items = [{"id": f"{name}.wav", "caption": f"{name}.", "audio": "wav_path", "duration": "10.0"} for name in names]
    table, blacklist = tmp_path / "as_final.json", tmp_path / "blacklist.json"
    table.write_text(json.dumps({"num_captions_per_audio": 1, "data": items}))
    blacklist.write_text(json.dumps({"AudioSet": ["Ybbbbbbbbbbb.wav"], "FreeSound": ["Yaaaaaaaaaaa"]}))
    clips, report = read_wavcaps(table, audio, blacklist)
    assert [(clip.id, clip.seconds) for clip in clips] == [("Yaaaaaaaaaaa", 10.0)]
    assert report.left_out == {"blacklisted": ["Ybbbbbbbbbbb", "Y0UJtGcoPYa0"]}
    assert len(read_wavcaps(table, audio)[0]) == 3


def test_coco_style_test_file(tmp_path):
    audio = sounds(tmp_path / "audio", "abcdefghijk_10000_20000.wav")
    data = {
        "images": [{"id": "abcdefghijk"}],
        "annotations": [{"id": n, "image_id": "abcdefghijk", "caption": f"{n}."} for n in range(5)],
    }
    (tmp_path / "test_coco.json").write_text(json.dumps(data))
    (clip,), _ = read_coco(tmp_path / "test_coco.json", audio)
    assert clip.captions == ["0.", "1.", "2.", "3.", "4."]


def test_a_saved_data_set_with_its_own_column_names(tmp_path):
    audio = sounds(tmp_path / "audio", "a.wav", "b.wav")
    rows = [{"sound": {"path": str(audio / f"{n}.wav"), "bytes": None}, "text": f"{n}.", "key": n} for n in "ab"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    data = read_hub(str(tmp_path / "set"), audio="sound", captions="text", id="key")
    assert data.features == FEATURES
    clips = HubClips(data)
    assert [clip.id for clip in clips] == ["a", "b"] and caption_counts(clips) == [1, 1]
    assert len(read_audio(clips[0].audio, 16000, 16000)) == 4800
    with pytest.raises(ValueError, match=r"columns \['sound', 'text', 'key'\]"):
        read_hub(str(tmp_path / "set"))
    streamed = read_hub(str(tmp_path / "set"), audio="sound", captions="text", streaming=True)
    assert [row["captions"] for row in streamed] == [["a."], ["b."]]


def test_clips_become_one_schema(tmp_path):
    sounds(tmp_path, "a.wav")
    write_table(tmp_path / "metadata.csv", [("a.wav", "A.")])
    data = to_dataset(read_table(tmp_path)[0])
    assert data.features == FEATURES and data[0]["captions"] == ["A."]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("0.wav", "A.")], ("path", "caption"), "file_name is missing"),
        ([("0.wav", "A.")], ("file_name", "title"), "expected one of caption"),
        ([("0.wav", " ")], ("file_name", "caption"), r"without a caption \(0.wav\)"),
        ([("9.wav", "A.")], ("file_name", "caption"), "None of the 1 clips"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, rows, columns, message):
    sounds(tmp_path, "0.wav")
    write_table(tmp_path / "metadata.csv", rows, columns)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no metadata"):
        read_table(tmp_path)
    table = write_table(tmp_path / "metadata.csv", [("0.wav", "A.")])
    with pytest.raises(ValueError, match=r"audio folder .* does not exist"):
        read_table(table, tmp_path / "nowhere")
    (tmp_path / "as_final.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="LFS pointer"):
        read_wavcaps(tmp_path / "as_final.json", tmp_path)
