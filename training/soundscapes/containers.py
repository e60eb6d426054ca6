"""Recordings inside other files: zip (pk3), Qt resources (.rcc), OpenTTD catalogues (.cat), Clonk groups (.ocg), SoundFonts (.sf2).

A table path is `file` or `container!/inner`. For a SoundFont the inner part is `bank.program.keys.seconds`: one or
more keys joined by hyphens, played one after another in so many seconds. `FluidR3_GM.sf2!/0.125.60.3` is the General
MIDI helicopter held for three seconds, `0.73.72-76-79.2` three notes of a flute. Bank 128 is the percussion.
"""

import io
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16000
SOUNDS = {".wav", ".ogg", ".oga", ".flac", ".mp3", ".aiff"}  # endings of what is read
_RENDER_RATE = 44100


def rcc_members(data: bytes) -> dict[str, bytes]:
    """Inner path -> bytes of a Qt binary resource, format 1 to 3, stored or zlib.

    Raises ValueError when `data` is no Qt resource or a member uses zstd compression.
    """
    if data[:4] != b"qres":
        raise ValueError(f"not a Qt resource: starts with {data[:4]!r}, expected b'qres'")
    version, tree, payload, names = struct.unpack(">4I", data[4:20])
    node_size = 14 if version < 2 else 22  # format 2 added a 64-bit modification time

    def name(offset: int) -> str:
        (length,) = struct.unpack(">H", data[names + offset : names + offset + 2])
        start = names + offset + 6  # two bytes of length, four of hash
        return data[start : start + 2 * length].decode("utf-16-be")

    found: dict[str, bytes] = {}
    pending = [(0, "")]
    while pending:
        index, path = pending.pop()
        node = tree + index * node_size
        name_offset, flags = struct.unpack(">IH", data[node : node + 6])
        path = f"{path}/{name(name_offset)}" if index else ""
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", data[node + 6 : node + 14])
            pending.extend((first + i, path) for i in range(count))
            continue
        (offset,) = struct.unpack(">I", data[node + 10 : node + 14])
        (size,) = struct.unpack(">I", data[payload + offset : payload + offset + 4])
        body = data[payload + offset + 4 : payload + offset + 4 + size]
        if flags & 4:
            raise ValueError(f"{path}: zstd-compressed Qt resource, only stored and zlib ones can be read")
        found[path.lstrip("/")] = zlib.decompress(body[4:]) if flags & 1 else body  # 4 bytes: unpacked size
    return found


def cat_members(data: bytes) -> dict[str, bytes]:
    """`index` (three digits) -> WAV bytes of an OpenTTD sample catalogue.

    The head is pairs of 32-bit little-endian offset and size, the first offset ends it; a sample is a counted name and a
    RIFF file. Raises ValueError when the offsets do not lie inside the file.
    """
    head = struct.unpack("<I", data[:4])[0] & 0x7FFFFFFF
    if not 8 <= head <= len(data) or head % 8:
        raise ValueError(f"not a sample catalogue: its first offset is {head} in a file of {len(data)} bytes")
    members = {}
    for index in range(head // 8):
        offset = struct.unpack("<I", data[index * 8 : index * 8 + 4])[0] & 0x7FFFFFFF
        start = offset + 1 + data[offset]
        if data[start : start + 4] != b"RIFF":
            raise ValueError(f"sample {index} of the catalogue does not start with b'RIFF'")
        members[f"{index:03}"] = data[start : start + 8 + struct.unpack("<I", data[start + 4 : start + 8])[0]]
    return members


def ocg_members(data: bytes) -> dict[str, bytes]:
    """Inner path -> bytes of an OpenClonk group: gzip under a mark of its own, with groups in it as folders.

    The head has 204 bytes, each xored with 237, and of every three the first and the last change places; then comes a record
    of 316 bytes a member, then the members. Raises ValueError when `data` is no such group.
    """
    if data[:2] == b"\x1e\x8c":
        data = zlib.decompress(b"\x1f\x8b" + data[2:], wbits=31)
    head = bytearray(byte ^ 237 for byte in data[:204])
    for i in range(0, len(head) - 2, 3):
        head[i], head[i + 2] = head[i + 2], head[i]
    if not head.startswith(b"RedWolf Design GrpFolder"):
        raise ValueError(f"not a Clonk group: its head says {bytes(head[:24])!r}")
    (count,) = struct.unpack("<i", head[36:40])
    found: dict[str, bytes] = {}
    for start in range(204, 204 + 316 * count, 316):
        name = data[start : start + 260].split(b"\0")[0].decode("latin-1")
        _, is_group, size, _, offset = struct.unpack("<5i", data[start + 260 : start + 280])
        offset += 204 + 316 * count
        body = data[offset : offset + size]
        found |= {f"{name}/{path}": held for path, held in ocg_members(body).items()} if is_group else {name: body}
    return found


def members(path: Path) -> dict[str, bytes]:
    """Inner path -> bytes of the sounds in a zip, Qt resource, sample catalogue or Clonk group; read once while the file is the same."""
    return _members(path, path.stat().st_mtime)


@cache
def _members(path: Path, _stamp: float) -> dict[str, bytes]:
    if path.suffix in (".pk3", ".zip"):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if Path(name).suffix.lower() in SOUNDS}
    return {".rcc": rcc_members, ".cat": cat_members, ".ocg": ocg_members}[path.suffix](path.read_bytes())


@cache
def _synth(path: Path, _stamp: float):
    try:
        import tinysoundfont
    except ImportError as error:
        raise ImportError("SoundFonts need: pip install --no-deps 'tinysoundfont>=0.3.7,<0.4'") from error
    synth = tinysoundfont.Synth(samplerate=_RENDER_RATE)
    return synth, synth.sfload(str(path))


def _render(path: Path, phrase: str) -> np.ndarray:
    """A phrase of a SoundFont, rung out for a second more: (samples,) at 44.1 kHz."""
    bank, program, keys, seconds = phrase.split(".", 3)
    synth, font = _synth(path, path.stat().st_mtime)
    synth.sounds_off()
    synth.program_select(0, font, int(bank), int(program), bank == "128")
    notes = [int(key) for key in keys.split("-")]
    samples = int(float(seconds) / len(notes) * _RENDER_RATE)
    pieces = []
    for key in notes:
        synth.noteon(0, key, 100)
        pieces.append(np.frombuffer(bytes(synth.generate(samples)), np.float32))
        synth.noteoff(0, key)
    pieces.append(np.frombuffer(bytes(synth.generate(_RENDER_RATE)), np.float32))
    return np.concatenate(pieces).reshape(-1, 2).mean(1)


def read_audio(root: Path, path: str) -> np.ndarray:
    """The recording `path` below the folder `root`: (samples,) float32, 16 kHz mono.

    Raises FileNotFoundError when the file or the container's member is missing, ValueError when it holds no audio.
    """
    file, _, inner = path.partition("!/")
    source = root / file
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: fetch its package again")
    if source.suffix == ".sf2":
        audio, rate = _render(source, inner), _RENDER_RATE
    else:
        stream: io.BytesIO | str = str(source)
        if inner:
            held = members(source)
            if inner not in held:
                raise FileNotFoundError(f"{source} holds no {inner}")
            stream = io.BytesIO(held[inner])
        samples, rate = soundfile.read(stream, dtype="float32", always_2d=True)
        audio = samples.mean(1)
    if not len(audio) or not np.isfinite(audio).all():
        raise ValueError(f"{path} holds {'no' if not len(audio) else 'non-finite'} samples")
    return np.asarray(soxr.resample(audio, rate, SAMPLING_RATE), np.float32)
