"""Soundscapes composed of real recordings, Scaper's way: events with onsets in a room over noise, and what was put in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import soxr
from scipy.signal import fftconvolve
from transformers.utils import logging

from ..data import Clip
from .containers import SAMPLING_RATE, read_audio
from .sources import Recording, SoundClass, package_folder, read_classes, read_recordings

logger = logging.get_logger(__name__)

# how often each kind of clip is drawn
KINDS = {
    "single": 0.38,
    "sequence": 0.26,
    "overlap": 0.12,
    "background": 0.12,
    "three": 0.07,
    "silence": 0.025,
    "noise": 0.025,
}
SILENCE = ("There is silence.", "Nothing can be heard.", "It is silent.", "No sound is heard.", "Complete silence.")
NOISE = (
    "Steady noise hisses.",
    "White noise is heard.",
    "There is nothing but noise.",
    "A constant hiss.",
    "Static noise.",
)
MIN_SECONDS, MAX_SECONDS = 4.0, 10.0  # of a clip
MAX_EVENT = {1: 5.0, 2: 4.0, 3: 2.8}  # seconds that an event may last, by the number of events


@dataclass(frozen=True)
class Event:
    """A sound of a clip: its class, onset and offset in seconds, and level in dB below full scale."""

    class_name: str
    onset: float
    offset: float
    level: float


@dataclass
class Soundscape:
    """A composed clip: float32 samples at 16 kHz, its captions, its events by onset, and its kind (see `KINDS`)."""

    audio: np.ndarray
    captions: list[str]
    kind: str
    events: list[Event] = field(default_factory=list)


class SoundscapeCorpus:
    """
    The recordings of one split, from which soundscapes are composed; `compose(index)` is a function of seed and index.

    Classes are drawn evenly, then families within a class, then takes within a family.

    Args:
        split: `train`, `validation` or `test`, or several as `train+validation`; no recording is in two of them.
        seed: of everything that is drawn.
        recordings: instead of the table's, for tests.
        classes: likewise.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        recordings: Sequence[Recording] | None = None,
        classes: dict[str, SoundClass] | None = None,
    ) -> None:
        splits = split.split("+")
        if unknown := set(splits) - {"train", "validation", "test"}:
            raise ValueError(
                f"There is no split {', '.join(unknown)}: choose train, validation or test, or several with +."
            )
        self.split, self.seed = split, seed
        self.classes = classes or read_classes()
        self.families: dict[str, dict[int, list[Recording]]] = {}
        for recording in recordings or read_recordings():
            if recording.split in splits:
                families = self.families.setdefault(recording.class_name, {})
                families.setdefault(recording.family, []).append(recording)
        if not self.families:
            raise ValueError(f"No recording of the packages is in the split {split!r}.")
        self.names = sorted(self.families)
        self._captions_per_clip = 1 if "train" in splits else 5

    def compose(self, index: int, kind: str | None = None, names: Sequence[str] | None = None) -> Soundscape:
        """
        Clip number `index`.

        Args:
            index: of the clip.
            kind: instead of a drawn one.
            names: its classes instead of drawn ones.
        """
        draw = np.random.default_rng([self.seed, index, len(self.split)])
        kind = kind or str(draw.choice(list(KINDS), p=list(KINDS.values())))
        if kind in ("silence", "noise"):
            seconds = float(draw.uniform(MIN_SECONDS, MAX_SECONDS))
            level = draw.uniform(-90, -65) if kind == "silence" else draw.uniform(-45, -20)
            audio = _noise(draw, round(seconds * SAMPLING_RATE)) * 10 ** (level / 20)
            captions = [str(text) for text in draw.permutation(SILENCE if kind == "silence" else NOISE)]
            return Soundscape(audio.astype(np.float32), captions[: self._captions_per_clip], kind)
        count = {"single": 1, "three": 3}.get(kind, 2)
        chosen = list(names) if names else [str(name) for name in draw.choice(self.names, count, replace=False)]
        sounds = [self._sound(draw, name, MAX_EVENT[count]) for name in chosen]
        onsets, seconds = _onsets(draw, kind, [len(sound) / SAMPLING_RATE for sound in sounds])
        audio = np.zeros(round(seconds * SAMPLING_RATE), np.float32)
        events, loudness = [], float(draw.uniform(-29, -21))
        for position, (name, sound, onset) in enumerate(zip(chosen, sounds, onsets, strict=True)):
            level = loudness + float(draw.uniform(-3, 3))  # far below another event nobody would hear it
            if kind == "background" and position:
                level -= float(draw.uniform(4, 8))
            start = round(onset * SAMPLING_RATE)
            sound = sound[: len(audio) - start] * 10 ** (level / 20)
            audio[start : start + len(sound)] += sound
            events.append(Event(name, onset, onset + len(sound) / SAMPLING_RATE, level))
        if draw.random() < 0.4:
            audio = _room(draw, audio)
        audio = audio + _noise(draw, len(audio)) * 10 ** (draw.uniform(-75, -50) / 20)
        peak = float(np.abs(audio).max())
        audio = (audio * min(1.0, 0.95 / peak)).astype(np.float32)
        said = [self.classes[name] for name in chosen]
        captions = []
        for _ in range(20 * self._captions_per_clip):  # references should differ where the phrases allow it
            text = _caption(draw, kind, said)
            if len(captions) < self._captions_per_clip and text not in captions:
                captions.append(text)
        captions += captions[: self._captions_per_clip - len(captions)]
        return Soundscape(audio, captions, kind, sorted(events, key=lambda event: event.onset))

    def _sound(self, draw: np.random.Generator, name: str, seconds: float) -> np.ndarray:
        """An event at unit level: takes of one family, repeated where that is how the class sounds, in `seconds`."""
        longest = round(seconds * SAMPLING_RATE)
        families = self.families[name]
        takes = families[int(draw.choice(sorted(families)))]
        rate = float(draw.uniform(0.94, 1.06))
        repeats = int(draw.integers(max(1, self.classes[name].repeats // 2), self.classes[name].repeats + 1))
        pieces: list[np.ndarray] = []
        for _ in range(repeats):
            take = takes[int(draw.integers(len(takes)))]
            samples = _recording(take.package, take.path)
            if len(samples) > longest:
                start = int(draw.integers(len(samples) - longest))
                peak = int(np.abs(samples).argmax())
                if np.abs(samples[start : start + longest]).max() < 0.1 * np.abs(samples[peak]):  # between two sounds
                    start = int(np.clip(peak - longest // 2, 0, len(samples) - longest))
                samples = samples[start : start + longest]
            if pieces and sum(map(len, pieces)) + len(samples) > longest:
                break
            gap = draw.uniform(0.05, 0.2) if self.classes[name].repeats > 4 else draw.uniform(0.1, 0.5)
            if pieces:
                pieces.append(np.zeros(int(gap * SAMPLING_RATE), np.float32))
            pieces.append(soxr.resample(samples, SAMPLING_RATE, SAMPLING_RATE / rate, quality="LQ"))
        sound = np.concatenate(pieces)[:longest]
        fade = min(len(sound) // 4, SAMPLING_RATE // 50)
        if fade:
            ramp = np.linspace(0, 1, fade, dtype=np.float32)
            sound[:fade] *= ramp
            sound[-fade:] *= ramp[::-1]
        active = sound[np.abs(sound) > 0.05 * np.abs(sound).max()]
        return sound / (np.sqrt(np.mean(active**2)) + 1e-9)


def _onsets(draw: np.random.Generator, kind: str, lengths: list[float]) -> tuple[list[float], float]:
    """Onset of each event, and the length of the clip, in seconds: the quiet that is left lies around the events."""
    in_turn = kind in ("sequence", "three")
    sounding = sum(lengths) if in_turn else max(lengths)
    seconds = float(np.clip(sounding + draw.uniform(0.3, 4.0), MIN_SECONDS, MAX_SECONDS))
    if not in_turn:
        start = draw.uniform(0, max(0.0, seconds - sounding))
        return [float(start + draw.uniform(0, sounding - length + 1e-6)) for length in lengths], seconds
    gaps = draw.dirichlet(np.ones(len(lengths) + 1)) * max(0.0, seconds - sounding)
    onsets = np.cumsum(gaps[:-1]) + np.cumsum([0.0, *lengths[:-1]])
    return [float(onset) for onset in onsets], seconds


def _noise(draw: np.random.Generator, samples: int) -> np.ndarray:
    """Unit-level noise whose spectrum falls by a drawn power of the frequency: white to brown."""
    spectrum = np.fft.rfft(draw.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** draw.uniform(0, 1)
    noise = np.fft.irfft(spectrum, samples)
    return noise / (noise.std() + 1e-12)


def _room(draw: np.random.Generator, audio: np.ndarray) -> np.ndarray:
    """A light room: exponentially decaying noise after the direct sound."""
    seconds = draw.uniform(0.1, 0.5)
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    response = draw.standard_normal(len(time)) * np.exp(-6.9 * time / seconds) * draw.uniform(0.02, 0.08)
    response[0] = 1
    return fftconvolve(audio, response)[: len(audio)]


@cache
def _recording(package: str, path: str) -> np.ndarray:
    """A decoded recording, without the silence at its ends."""
    samples = read_audio(package_folder(package), path)[: SAMPLING_RATE * 60]
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def _caption(draw: np.random.Generator, kind: str, classes: list[SoundClass]) -> str:
    clause, noun = ([str(draw.choice(getattr(sound, form))) for sound in classes] for form in ("clauses", "nouns"))
    if kind == "single":
        text = str(draw.choice([clause[0], noun[0], f"{clause[0]} and nothing else is heard"], p=[0.7, 0.25, 0.05]))
    elif kind == "sequence":
        text = str(
            draw.choice(
                [
                    f"{clause[0]}, followed by {noun[1]}",
                    f"{clause[0]}, then {clause[1]}",
                    f"{clause[0]} and then {clause[1]}",
                ]
            )
        )
    elif kind == "overlap":
        text = str(draw.choice([f"{clause[0]} while {clause[1]}", f"{clause[0]} and {clause[1]} at the same time"]))
    elif kind == "background":
        text = f"{clause[0]} with {noun[1]} in the background"
    else:
        text = str(
            draw.choice(
                [
                    f"{clause[0]}, then {clause[1]}, then {clause[2]}",
                    f"{clause[0]}, followed by {noun[1]} and {noun[2]}",
                ]
            )
        )
    return f"{text[0].upper()}{text[1:]}."


class SoundscapeClips(Sequence[Clip]):
    """The first `clips` soundscapes of a split, composed when they are asked for, of the recordings of `packages` if given."""

    def __init__(self, split: str, clips: int, seed: int = 0, packages: Sequence[str] | None = None) -> None:
        recordings = [row for row in read_recordings() if packages is None or row.package in packages]
        self.corpus, self.clips = SoundscapeCorpus(split, seed, recordings), clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index):  # type: ignore[override]
        soundscape = self.corpus.compose(index)
        return Clip(soundscape.audio, soundscape.captions, f"{index:06d}")
