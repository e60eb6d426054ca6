"""
Sounds and soundscapes.

    python -m training_lamb.soundscapes fetch
    python -m training_lamb.soundscapes check
    python -m training_lamb.soundscapes build --split test --clips 100 --out FOLDER
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import soundfile

from .containers import SAMPLING_RATE
from .mixing import SoundscapeCorpus
from .sources import fetch, read_classes, read_recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fetch", "check", "build"))
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soundscapes"))
    options = parser.parse_args()
    if options.command == "fetch":
        problems = fetch()
        print(f"{len(problems)} packages are missing: {', '.join(problems) or 'none'}")
    elif options.command == "check":
        _check()
    else:
        _build(options.split, options.clips, options.seed, options.out)


def _check() -> None:
    recordings, classes = read_recordings(), read_classes()
    for name in sorted(classes):
        files = Counter(r.split for r in recordings if r.class_name == name)
        families = Counter(split for split, _ in {(r.split, r.family) for r in recordings if r.class_name == name})
        print(
            name.ljust(14),
            *(f"{split} {files[split]:3d} in {families[split]:2d}" for split in ("train", "validation", "test")),
        )
    print(f"{len(recordings)} recordings, {len(classes)} classes")


def _build(split: str, clips: int, seed: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    corpus = SoundscapeCorpus(split, seed)
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as table:
        for index in range(clips):
            soundscape = corpus.compose(index)
            name = f"{index:06d}.flac"
            soundfile.write(out / name, soundscape.audio, SAMPLING_RATE)
            row = {"file_name": name, "captions": soundscape.captions, "kind": soundscape.kind}
            table.write(json.dumps(row | {"events": [asdict(event) for event in soundscape.events]}) + "\n")
    print(f"{clips} soundscapes are in {out}")


if __name__ == "__main__":
    main()
