"""The soundscapes' table and composer, on tiny recordings made in code."""

import subprocess
import zipfile

import numpy as np
import pytest
import soundfile
from training_lamb.event_scores import named_classes
from training_lamb.soundscape_scoring import trained_split
from training_lamb.soundscapes import sources
from training_lamb.soundscapes.mixing import SoundscapeCorpus
from training_lamb.soundscapes.sources import Recording, fetch, read_classes

from modeling_lamb import default_checkpoint

CLASSES = ("dog", "bell", "rain", "door", "piano")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def recordings(cache):
    folder = cache / "soundscapes" / "toy"
    folder.mkdir(parents=True)
    rows = []
    for number, name in enumerate(CLASSES):
        for split in ("train", "test"):
            time = np.arange(8000 + 1000 * number) / 16000
            path = f"{name}-{split}-{cache.name}.wav"
            soundfile.write(folder / path, np.sin(2 * np.pi * (300 + 200 * number) * time), 16000)
            rows.append(Recording(name, split, len(rows), "toy", path))
    return rows


def test_several_splits_train_together(recordings):
    corpus = SoundscapeCorpus("train+test", recordings=recordings)
    assert all(len(families) == 2 for families in corpus.families.values())
    with pytest.raises(ValueError, match="There is no split valid: choose train"):
        SoundscapeCorpus("train+valid", recordings=recordings)
    assert (
        len(corpus.compose(0).captions) == 1
        and len(SoundscapeCorpus("test", recordings=recordings).compose(0).captions) == 5
    )


def test_controls_know_the_recordings_that_the_model_was_trained_on(tmp_path):
    assert trained_split(default_checkpoint()) == "train+validation"
    assert trained_split(tmp_path) == "train"  # a model of which no recipe tells


def test_table_keeps_the_splits_apart_and_says_every_class():
    classes = read_classes()
    rows = sources._table("recordings")
    assert {row["class"] for row in rows} <= set(classes)
    places: dict[tuple[str, str], str] = {}
    for row in rows:
        for pattern in row["files"].split():
            place = (row["package"], pattern)
            assert places.setdefault(place, row["split"]) == row["split"], place
    tested = {row["class"] for row in rows if row["split"] == "test"}
    assert len(tested) >= 50
    assert tested <= {row["class"] for row in rows if row["split"] == "train"}
    assert {row["package"] for row in rows} <= {row["package"] for row in sources._table("packages")}


def test_every_phrase_names_its_class():
    classes = read_classes()
    for name, sound in classes.items():
        for phrase in (*sound.clauses, *sound.nouns):
            assert named_classes(phrase, {name: sound.keywords}) == [name], phrase


def test_clips_are_a_function_of_seed_and_index(recordings):
    one, two = (SoundscapeCorpus("train", 3, recordings) for _ in range(2))
    other = SoundscapeCorpus("train", 4, recordings)
    for index in (0, 7, 19):
        assert np.array_equal(one.compose(index).audio, two.compose(index).audio)
        assert one.compose(index).captions == two.compose(index).captions
    assert any(one.compose(i).captions != other.compose(i).captions for i in range(10))


def test_captions_name_what_sounds_in_its_order(recordings):
    corpus = SoundscapeCorpus("test", 0, recordings)
    keywords = {name: sound.keywords for name, sound in corpus.classes.items() if name in CLASSES}
    for index in range(40):
        clip = corpus.compose(index)
        assert 4 * 16000 <= len(clip.audio) <= 10 * 16000 and clip.audio.dtype == np.float32
        assert np.isfinite(clip.audio).all() and np.abs(clip.audio).max() <= 1
        assert len(clip.captions) == 5
        truth = [event.class_name for event in clip.events]
        for caption in clip.captions:
            named = named_classes(caption, keywords)
            assert set(named) == set(truth)
            if clip.kind in ("sequence", "three"):
                assert named == truth


def test_silence_and_noise_are_said_to_be_that(recordings):
    corpus = SoundscapeCorpus("train", 0, recordings)
    silence, noise = corpus.compose(0, "silence"), corpus.compose(1, "noise")
    assert not silence.events and not noise.events
    assert np.abs(silence.audio).std() < 0.01 < np.abs(noise.audio).std() * 10
    assert silence.captions != noise.captions


def test_a_package_that_cannot_be_had_is_named_and_left_out(cache, monkeypatch):
    def no_network(command, **kwargs):
        raise subprocess.CalledProcessError(100, command, stderr="E: Unable to fetch some archives")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert fetch(["scratch"]) == {"scratch": "E: Unable to fetch some archives"}
    assert not sources.package_folder("scratch").exists()
    with pytest.raises(FileNotFoundError, match="soundscapes fetch"):
        sources.read_recordings()


def test_recordings_inside_a_zip_are_found_and_read(cache):
    from training_lamb.soundscapes.containers import read_audio

    base = next(row["base"] for row in sources._table("packages") if row["package"] == "ufoai-sound")
    archive = sources.package_folder("ufoai-sound") / base.partition("!")[0]
    archive.parent.mkdir(parents=True)
    soundfile.write(cache / "fire.ogg", np.sin(np.arange(44100) / 50), 44100)
    with zipfile.ZipFile(archive, "w") as stream:
        stream.write(cache / "fire.ogg", "sound/ambience/smallfire.ogg")
    found = sources.read_recordings()
    assert [(r.class_name, r.split) for r in found] == [("fire", "train")]
    assert len(read_audio(sources.package_folder("ufoai-sound"), found[0].path)) == 16000
