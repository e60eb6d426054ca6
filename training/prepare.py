"""
Resample a data set once: 16 kHz mono flac in parquet shards, made in parallel, with a report of what was left out.

    python -m training_lamb.prepare OUT --data audiocaps --table train.csv --audio AUDIO_FOLDER --num_workers 8

Run it again after an interruption and it goes on where it stopped. A recipe reads OUT by `hub: {path: OUT}`;
`OUT/.prepare/report.json` lists by id what was missing, blacklisted, without a caption, corrupt or too short.
"""

import argparse
import io
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import soundfile
from processing_lamb import read_audio
from tqdm.auto import tqdm

from .readers import READERS, Clip, to_dataset

SAMPLING_RATE = 16000
SHARD = 500  # clips


def prepare(
    out: str | Path,
    reader: str,
    num_workers: int = 1,
    min_seconds: float = 0.1,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Args:
        out: the folder to fill.
        reader: one of `READERS`, called with `arguments` (`table`, `audio`, `blacklist`, `source`).
        num_workers: processes.
        min_seconds: shorter clips are left out.

    Returns:
        The report: `source`, `found` and `left_out`, ids by reason.

    Raises:
        ValueError: from the reader; or when `out` was made of other clips.
    """
    clips, report = READERS[reader](**{name: value for name, value in arguments.items() if value is not None})
    out = Path(out)
    notes = out / ".prepare"  # hidden, because `datasets` reads every file that it sees
    notes.mkdir(parents=True, exist_ok=True)
    made_of = json.dumps([len(clips), clips[0].id, clips[-1].id, min_seconds])
    mark = notes / "made_of.json"
    if mark.is_file() and mark.read_text(encoding="utf-8") != made_of:
        raise ValueError(f"{out} was prepared from other clips or settings: choose an empty folder.")
    mark.write_text(made_of, encoding="utf-8")
    shards = {
        out / f"train-{start // SHARD:05d}.parquet": clips[start : start + SHARD]
        for start in range(0, len(clips), SHARD)
    }
    missing = [(file, part) for file, part in shards.items() if not _note(file).is_file()]
    with tqdm(total=len(missing), desc=f"preparing {report.source}", unit="shard", disable=None) as bar:
        if num_workers > 1 and len(missing) > 1:
            with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
                for done in as_completed([pool.submit(_write_shard, *shard, min_seconds) for shard in missing]):
                    done.result()
                    bar.update()
        else:
            for shard in missing:
                _write_shard(*shard, min_seconds)
                bar.update()
    for file in shards:
        for reason, ids in json.loads(_note(file).read_text(encoding="utf-8")).items():
            for name in ids:
                report.leave_out(reason, name)
                report.found -= 1
    if not report.found:
        raise ValueError(f"No clip was left. {report}")
    result = {"source": report.source, "found": report.found, "left_out": report.left_out}
    (notes / "report.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(report)
    return result


def _note(file: Path) -> Path:
    """Where a shard says what it left out; it is there when the shard is whole."""
    return file.parent / ".prepare" / f"{file.stem}.json"


def _write_shard(file: Path, clips: list[Clip], min_seconds: float) -> None:
    kept: list[Clip] = []
    left_out: dict[str, list[str]] = {}
    for clip in clips:
        try:
            audio = read_audio(clip.audio, SAMPLING_RATE, SAMPLING_RATE)
        except ValueError:
            left_out.setdefault("corrupt", []).append(clip.id)
            continue
        if len(audio) < min_seconds * SAMPLING_RATE:
            left_out.setdefault("too short", []).append(clip.id)
            continue
        buffer = io.BytesIO()
        soundfile.write(buffer, audio.clip(-1, 1), SAMPLING_RATE, format="flac")
        kept.append(Clip(buffer.getvalue(), clip.captions, clip.id, clip.source, len(audio) / SAMPLING_RATE))
    if kept:
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        to_dataset(kept).to_parquet(str(temporary))
        os.replace(temporary, file)
    _note(file).write_text(json.dumps(left_out), encoding="utf-8")  # the shard counts as done only now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--data", choices=sorted(READERS), default="table")
    parser.add_argument("--table", required=True)
    parser.add_argument("--audio")
    parser.add_argument("--blacklist")
    parser.add_argument("--source")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--min_seconds", type=float, default=0.1)
    options = vars(parser.parse_args())
    prepare(options.pop("out"), options.pop("data"), **options)


if __name__ == "__main__":
    main()
