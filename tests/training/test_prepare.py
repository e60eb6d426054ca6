import pytest
import soundfile
from conftest import noise, write_table
from processing_lamb import read_audio
from training_lamb import prepare as module
from training_lamb.prepare import prepare
from training_lamb.readers import HubClips, read_hub


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 2)
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.5, number), 44100)
    (tmp_path / "zero.wav").write_bytes(b"")
    soundfile.write(tmp_path / "short.wav", noise(0.01), 16000)
    rows = [(f"{n}.wav", f"Sound {n}.") for n in (0, 1, 2, 3, "zero", "short", "gone")]
    return write_table(tmp_path / "metadata.csv", rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_hold_every_clip_that_can_be_used_and_the_report_the_others(table, tmp_path, workers):
    report = prepare(tmp_path / "out", "table", workers, table=table)
    assert report["found"] == 4
    assert report["left_out"] == {"missing": ["gone.wav"], "corrupt": ["zero.wav"], "too short": ["short.wav"]}
    clips = HubClips(read_hub(str(tmp_path / "out")))
    assert sorted(clip.id for clip in clips) == [f"{n}.wav" for n in range(4)]
    clip = next(clip for clip in clips if clip.id == "2.wav")
    expected = read_audio(str(tmp_path / "2.wav"), 16000, 16000)
    assert clip.captions == ["Sound 2."] and clip.seconds == pytest.approx(len(expected) / 16000)
    assert read_audio(clip.audio, 16000, 16000) == pytest.approx(expected, abs=1e-4)


def test_an_interrupted_run_goes_on(table, tmp_path, monkeypatch):
    written = []
    write = module._write_shard

    def interrupted(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write(file, *rest)

    monkeypatch.setattr(module, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", "table", table=table)
    monkeypatch.setattr(module, "_write_shard", lambda file, *rest: written.append(file) or write(file, *rest))
    assert prepare(tmp_path / "out", "table", table=table)["found"] == 4
    assert len(written) == len(set(written)) == 3


def test_a_folder_of_other_clips_is_not_mixed_up(table, tmp_path):
    prepare(tmp_path / "out", "table", table=table)
    other = write_table(tmp_path / "other.csv", [("0.wav", "Sound.")])
    with pytest.raises(ValueError, match="other clips"):
        prepare(tmp_path / "out", "table", table=other)
