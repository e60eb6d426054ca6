"""Where recordings come from: containers made in code, phrases that no other class claims, packages half fetched."""

import gzip
import io
import struct
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
from training_lamb.event_scores import named_classes
from training_lamb.recipe import Source
from training_lamb.soundscapes import sources
from training_lamb.soundscapes.containers import cat_members, ocg_members, rcc_members, read_audio
from training_lamb.soundscapes.sources import fetch, package_folder, read_classes


def _wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.sin(np.arange(4000) / 9), 8000, format="WAV")
    return stream.getvalue()


def _rcc(name: str, body: bytes, packed: bool, version: int = 2) -> bytes:
    """A Qt resource with one folder `a` and one file in it."""
    stored = struct.pack(">I", len(body)) + zlib.compress(body) if packed else body
    payload = struct.pack(">I", len(stored)) + stored
    names, offsets = b"", []
    for text in ("a", name):
        offsets.append(len(names))
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
    stamp = b"" if version < 2 else bytes(8)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + stamp
    tree += struct.pack(">IHII", offsets[0], 2, 1, 2) + stamp
    tree += struct.pack(">IHHHI", offsets[1], int(packed), 0, 0, 0) + stamp
    head = 20
    places = (version, head, head + len(tree), head + len(tree) + len(payload))
    return b"qres" + struct.pack(">4I", *places) + tree + payload + names


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_qt_resource(packed, version):
    assert rcc_members(_rcc("bark.wav", b"sound" * 9, packed, version)) == {"a/bark.wav": b"sound" * 9}


def _ocg(members: dict[str, bytes | dict]) -> bytes:
    """A Clonk group, those in it not packed."""
    head = bytearray(b"RedWolf Design GrpFolder".ljust(36, b"\0") + struct.pack("<i", len(members)) + bytes(164))
    for i in range(0, 202, 3):
        head[i], head[i + 2] = head[i + 2], head[i]
    records, bodies = b"", b""
    for name, held in members.items():
        body = _ocg(held) if isinstance(held, dict) else held
        record = name.encode().ljust(260, b"\0") + struct.pack(
            "<5i", 0, isinstance(held, dict), len(body), 0, len(bodies)
        )
        records, bodies = records + record.ljust(316, b"\0"), bodies + body
    return bytes(byte ^ 237 for byte in head) + records + bodies


@pytest.mark.parametrize("packed", [False, True])
def test_clonk_group_is_read(packed, tmp_path):
    group = _ocg({"licence.txt": b"CC0", "Tree.ocg": {"Chop1.wav": _wav(), "Chop2.wav": _wav()[:60]}})
    (tmp_path / "Sound.ocg").write_bytes(b"\x1e\x8c" + gzip.compress(group)[2:] if packed else group)
    assert ocg_members(group)["Tree.ocg/Chop2.wav"] == _wav()[:60]
    assert len(read_audio(tmp_path, "Sound.ocg!/Tree.ocg/Chop1.wav")) == 8000


def test_what_is_no_container_is_refused():
    with pytest.raises(ValueError, match="not a Clonk group"):
        ocg_members(bytes(400))
    with pytest.raises(ValueError, match="not a Qt resource"):
        rcc_members(b"RIFF" + bytes(40))
    with pytest.raises(ValueError, match="not a sample catalogue"):
        cat_members(bytes(64))


def test_sample_catalogue_is_read(tmp_path):
    wav = _wav()
    samples = [bytes([len(name)]) + name + wav for name in (b"whistle\0", b"cow\0")]
    head = 8 * len(samples)
    offsets = np.cumsum([head] + [len(sample) for sample in samples])
    pairs = b"".join(struct.pack("<II", int(at), len(s)) for at, s in zip(offsets[:-1], samples, strict=True))
    (tmp_path / "tiny.cat").write_bytes(pairs + b"".join(samples))
    assert list(cat_members((tmp_path / "tiny.cat").read_bytes())) == ["000", "001"]
    assert len(read_audio(tmp_path, "tiny.cat!/001")) == 8000
    with pytest.raises(FileNotFoundError, match="holds no 007"):
        read_audio(tmp_path, "tiny.cat!/007")


def test_no_phrase_names_another_class():
    classes = read_classes()
    keywords = {name: sound.keywords for name, sound in classes.items()}
    for name, sound in classes.items():
        for phrase in (*sound.clauses, *sound.nouns):
            assert named_classes(phrase, keywords) == [name], phrase


def test_families_lie_in_one_split():
    takes: dict[str, str] = {}
    for row in sources._table("recordings"):
        for pattern in row["files"].split():
            assert takes.setdefault(f"{row['package']}/{pattern}", row["split"]) == row["split"]


def test_a_package_broken_half_way_is_fetched_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMB_CACHE", str(tmp_path))
    whole = io.BytesIO()
    game = io.BytesIO()
    with zipfile.ZipFile(game, "w") as members:
        members.writestr("map.png", b"a picture")
        members.writestr("bark.wav", _wav())
    with tarfile.open(fileobj=whole, mode="w") as files:
        for name, content in (("Animal/Dog1.wav", _wav()), ("game.zip", game.getvalue())):
            entry = tarfile.TarInfo(f"./usr/share/scratch/Media/Sounds/{name}")
            entry.size = len(content)
            files.addfile(entry, io.BytesIO(content))
    served = [whole.getvalue()[:700], whole.getvalue()]

    def download(command, cwd, **kwargs):
        (tmp_path / "soundscapes" / cwd.split("/")[-1] / "scratch_1_all.deb").write_bytes(b"")

    class Unpacking:
        returncode = 0

        def __init__(self, command, stdout):
            self.stdout = io.BytesIO(served.pop(0))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(subprocess, "Popen", Unpacking)
    assert "scratch" in fetch(["scratch"])
    assert not package_folder("scratch").exists()
    assert fetch(["scratch"]) == {}
    found = sources.read_recordings()
    assert [(r.class_name, r.split, r.path[-8:]) for r in found] == [("dog", "train", "Dog1.wav")]
    (kept,) = package_folder("scratch").rglob("game.zip")
    assert zipfile.ZipFile(kept).namelist() == ["bark.wav"]  # its sounds alone


def test_a_recipe_may_take_some_packages_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMB_CACHE", str(tmp_path))
    for package, sound in (("scratch", "usr/share/scratch/Media/Sounds/Animal/Dog1.wav"), ("freecol", "unused.wav")):
        (package_folder(package) / sound).parent.mkdir(parents=True)
        (package_folder(package) / sound).write_bytes(_wav())
    chosen = {"split": "train", "clips": 2, "packages": ["scratch"]}
    clips, name = Source(soundscapes=chosen).read()
    assert len(clips) == 2 and clips.corpus.names == ["dog"]
    assert (
        name.startswith("soundscapes-2-train-")
        and name != Source(soundscapes=chosen | {"packages": ["scratch", "freecol"]}).read()[1]
    )
