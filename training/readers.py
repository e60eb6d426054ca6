"""
Readers of the published caption sets: clips joined to their audio by id, never by row, and a report of what is missing.

| reader | table | audio |
|---|---|---|
| `audiocaps` | the official csv (`audiocap_id,youtube_id,start_time,caption`) | `Y<id>.wav`, `<id>.wav`, `<id>_<start>...` |
| `table` | csv, jsonl or parquet with `file_name` and `caption`, `captions` or `caption_1`... (Clotho, WavCaps' AudioCaps) | by name |
| `wavcaps` | one of WavCaps' json files, with its blacklist | `<id>.flac` |
| `coco` | `images` and `annotations` (AVCap's and LAVCap's 944 AudioCaps test clips) | as `audiocaps` |
| `hub` | any data set of the Hub, or saved by `datasets`, with the names of its columns | in the data set |
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

# One clip in every data set of this package. Audio is decoded by soundfile (`read_audio`), never by `datasets` itself.
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")},
        "captions": datasets.List(datasets.Value("string")),
        "source": datasets.Value("string"),
        "seconds": datasets.Value("float32"),
    }
)
SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".au"}
# Clips of the 944 AudioCaps test clips that WavCaps' blacklist, made for another choice of 957, does not hold.
ALSO_BLACKLISTED = {
    "Y0UJtGcoPYa0",
    "Y1oOYqBroWoA",
    "Y2j8pxiFvElM",
    "Y40cuHrYfaqA",
    "Y4lv9aLXtud0",
    "Y7D7xgd4WJ50",
    "YXP1L5k-Zxro",
    "YkOYg4ZtKcAs",
    "YsCzRVvu9XeY",
}


@dataclass
class Clip:
    """
    One clip.

    Args:
        audio: path, bytes, `{"path", "bytes"}`, or float32 samples at the extractor's rate.
        captions: all that were written for it.
        id: its name, unique within its source.
        source: the data set it comes from.
        seconds: its length, where the table says it.
    """

    audio: Any
    captions: list[str]
    id: str
    source: str = ""
    seconds: float | None = None


@dataclass
class DataReport:
    """How many clips of a table are used, and the ids of those that are not, by reason."""

    source: str
    found: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, clip: str) -> None:
        self.left_out.setdefault(reason, []).append(clip)

    def __str__(self) -> str:
        parts = [
            f"{len(ids)} {reason} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
            for reason, ids in self.left_out.items()
        ]
        return f"{self.source}: {self.found} clips" + "".join(f"; {part}" for part in parts)


def read_table(
    table: str | Path, audio: str | Path | None = None, source: str | None = None
) -> tuple[list[Clip], DataReport]:
    """
    A csv, jsonl or parquet table with `file_name` and its captions: Clotho, WavCaps' AudioCaps, or one's own.

    Args:
        table: its path; a folder stands for the `metadata.csv`, `metadata.jsonl` or `metadata.parquet` in it.
        audio: the folder of the files, searched with its subfolders; None takes the table's.
        source: the name of the set; None takes the folder's.

    Raises:
        ValueError: when the table, a column or every clip is missing; it names it.
    """
    table = _find_table(Path(table))
    rows = _rows(table, "file_name")
    folder = Path(audio) if audio is not None else table.parent
    entries: dict[str, _Entry] = {}
    for row in rows:
        name = str(row["file_name"])
        entry = entries.setdefault(name, _Entry([name, Path(name).stem]))
        entry.captions += row_captions(row)
    return _join(entries, folder, source or folder.resolve().name)


def read_audiocaps(table: str | Path, audio: str | Path, source: str = "AudioCaps") -> tuple[list[Clip], DataReport]:
    """The official csv: a row a caption; clips are told apart by `youtube_id` and `start_time`."""
    entries: dict[str, _Entry] = {}
    for row in _rows(Path(table), "youtube_id", "start_time", "caption"):
        start = int(float(row["start_time"]))
        entry = entries.setdefault(f"{row['youtube_id']}_{start}", _Entry(_youtube_names(row["youtube_id"], start)))
        entry.captions += row_captions(row)
    return _join(entries, Path(audio), source)


def read_coco(table: str | Path, audio: str | Path, source: str = "AudioCaps") -> tuple[list[Clip], DataReport]:
    """`{"images": [{"id", ...}], "annotations": [{"image_id", "caption"}]}`, as the peers keep the 944 test clips."""
    data = _json(Path(table), "images", "annotations")
    entries = {}
    for image in data["images"]:
        own = [Path(image["audio_path"]).name, Path(image["audio_path"]).stem] if image.get("audio_path") else []
        entries[str(image["id"])] = _Entry([*own, f"Y{image['id']}", str(image["id"]), f"{image['id']}_*"])
    for annotation in data["annotations"]:
        if str(annotation["image_id"]) not in entries:
            raise ValueError(
                f"{table}: annotation {annotation.get('id')} is of image {annotation['image_id']}, which is not listed."
            )
        entries[str(annotation["image_id"])].captions += row_captions(annotation)
    return _join(entries, Path(audio), source)


def read_wavcaps(
    table: str | Path, audio: str | Path, blacklist: str | Path | None = None, source: str | None = None
) -> tuple[list[Clip], DataReport]:
    """
    One json file of WavCaps (`as_final`, `bbc_final`, `fsd_final`, `sb_final`).

    Args:
        table: the json file.
        audio: the folder of its `<id>.flac` files.
        blacklist: one of the files that WavCaps publishes, `{"AudioSet": [ids], "FreeSound": [ids]}`. With one, nine
            more AudioSet clips are left out that only the 944-clip test set of AudioCaps holds.
        source: None takes the json file's name.
    """
    table = Path(table)
    unwanted: set[str] = set()
    if blacklist is not None:
        lists = _json(Path(blacklist), "AudioSet", "FreeSound")
        kind = "FreeSound" if re.search(r"fsd|freesound", str(table), re.IGNORECASE) else "AudioSet"
        if re.search(r"bbc|sb_final|soundbible", str(table), re.IGNORECASE):
            kind = ""
        unwanted = {_stem(str(name)) for name in lists.get(kind, [])} | (
            ALSO_BLACKLISTED if kind == "AudioSet" else set()
        )
    entries: dict[str, _Entry] = {}
    report = DataReport(source or table.stem)
    for item in _json(table, "data")["data"]:
        name = _stem(str(item["id"]))
        if name in unwanted:
            report.leave_out("blacklisted", name)
            continue
        entry = entries.setdefault(
            name, _Entry([name], seconds=float(item["duration"]) if item.get("duration") else None)
        )
        entry.captions += row_captions(item)
    return _join(entries, Path(audio), report.source, report)


def read_hub(
    path: str,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    audio: str = "audio",
    captions: str | Sequence[str] | None = None,
    id: str | None = None,
    streaming: bool = False,
    source: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Any data set of the Hub, or a folder of parquet, in this package's columns.

    Args:
        path, split, name, revision, streaming: as of `datasets.load_dataset`.
        audio, captions, id: its columns. `captions` may be one column (text, or lists of text) or several; None takes
            `captions` or `caption`. Without `id`, the column of that name or else the row's number.
        source: None takes `path`.

    Raises:
        ValueError: when a column is missing; it lists those that there are.
    """
    data = datasets.load_dataset(path, name=name, split=split, revision=revision, streaming=streaming)
    there = data.column_names or list(next(iter(data)))
    captions = captions or ("captions" if "captions" in there else "caption")
    columns = [captions] if isinstance(captions, str) else list(captions)
    id = id or ("id" if "id" in there else None)
    if missing := [column for column in (audio, *columns, *([id] if id else [])) if column not in there]:
        raise ValueError(f"{path} has the columns {there}, not {missing}: name them by audio, captions and id.")
    if isinstance((data.features or {}).get(audio), datasets.Audio):
        data = data.cast_column(audio, datasets.Audio(decode=False))

    def row(item: dict[str, Any], number: int) -> dict[str, Any]:
        texts = [
            text
            for column in columns
            for text in ([item[column]] if isinstance(item[column], str) else item[column] or [])
        ]
        return {
            "id": str(item[id]) if id else f"{number:08d}",
            "audio": {"path": item[audio].get("path"), "bytes": item[audio].get("bytes")},
            "captions": [" ".join(text.split()) for text in texts if text and text.strip()],
            "source": source or item.get("source") or path,
            "seconds": item.get("seconds"),
        }

    return data.map(row, with_indices=True, remove_columns=there, features=FEATURES)


READERS: dict[str, Callable[..., Any]] = {
    "audiocaps": read_audiocaps,
    "coco": read_coco,
    "table": read_table,
    "wavcaps": read_wavcaps,
}


class HubClips(Sequence[Clip]):
    """Rows of a `datasets.Dataset` with the columns of `FEATURES`, as clips."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data, self.fingerprint = data, data._fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number):  # type: ignore[override]
        row = self.data[number]
        audio = row["audio"]["bytes"] if row["audio"]["bytes"] is not None else row["audio"]["path"]
        return Clip(audio, row["captions"], row["id"], row["source"], row["seconds"])


def caption_counts(clips: Sequence[Clip]) -> list[int]:
    """Captions of every clip; of a `datasets.Dataset` without reading its audio."""
    captions = clips.data["captions"] if isinstance(clips, HubClips) else (clip.captions for clip in clips)
    return [len(texts) for texts in captions]


def to_dataset(clips: Iterable[Clip]) -> datasets.Dataset:
    """Clips of files or bytes as a `datasets.Dataset` with the columns of `FEATURES`."""
    rows = []
    for clip in clips:
        is_file = isinstance(clip.audio, (str, Path))
        audio = {"path": str(clip.audio), "bytes": None} if is_file else {"path": None, "bytes": clip.audio}
        rows.append(
            {"id": clip.id, "audio": audio, "captions": clip.captions, "source": clip.source, "seconds": clip.seconds}
        )
    return datasets.Dataset.from_list(rows, features=FEATURES)


@dataclass
class _Entry:
    names: list[str]
    captions: list[str] = field(default_factory=list)
    seconds: float | None = None


def _join(
    entries: dict[str, _Entry], folder: Path, source: str, report: DataReport | None = None
) -> tuple[list[Clip], DataReport]:
    report = report or DataReport(source)
    if not folder.is_dir():
        raise ValueError(f"The audio folder {folder} does not exist: give the folder that holds the files of {source}.")
    files: dict[str, str] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path, stem = os.path.join(parent, name), Path(name).stem
            keys = [os.path.relpath(path, folder), name]
            if Path(name).suffix.lower() in SUFFIXES:
                timed = re.fullmatch(r"Y?([\w-]{11})(_\d+){1,2}", stem)  # <YouTube id>_<start>_<end>
                keys += [stem, f"{timed[1]}_*"] if timed else [stem]
            for key in keys:
                files.setdefault(key, path)
    clips = []
    for clip, entry in entries.items():
        found = next((files[name] for name in entry.names if name in files), None)
        if not entry.captions:
            report.leave_out("without a caption", clip)
        elif found is None:
            report.leave_out("missing", clip)
        else:
            clips.append(Clip(found, entry.captions, clip, source, entry.seconds))
    report.found = len(clips)
    if not clips:
        raise ValueError(f"None of the {len(entries)} clips of {source} can be used from {folder}. {report}")
    return clips, report


def row_captions(row: dict[str, Any]) -> list[str]:
    """The captions of a table's row (`captions`, `caption`, `caption_1`...), each on one line, without empty ones."""
    numbered = sorted(name for name in row if re.fullmatch(r"caption_\d+", name))
    values = row.get("captions")
    if values is None:
        values = [row.get("caption"), *(row[name] for name in numbered)]
    return [
        " ".join(value.split())
        for value in ([values] if isinstance(values, str) else values)
        if value and value.strip()
    ]


def _find_table(path: Path) -> Path:
    if not path.is_dir():
        return path
    tables = [
        path / f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet") if (path / f"metadata.{suffix}").is_file()
    ]
    if not tables:
        raise ValueError(f"{path} holds no metadata.csv, .jsonl or .parquet with the columns file_name and caption.")
    return tables[0]


def _rows(table: Path, *columns: str) -> list[dict[str, Any]]:
    if not table.is_file():
        raise ValueError(f"There is no table {table}.")
    if table.suffix == ".parquet":
        rows = datasets.Dataset.from_parquet(str(table)).to_list()
    else:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            rows = (
                [json.loads(line) for line in stream if line.strip()]
                if table.suffix == ".jsonl"
                else list(csv.DictReader(stream))
            )
    there = [name for name in (rows[0] if rows else {}) if name]
    if missing := [column for column in columns if column not in there]:
        raise ValueError(
            f"{table} has the columns {there}, expected {', '.join(columns)}: {', '.join(missing)} is missing."
        )
    if not any(name.startswith("caption") for name in there):
        raise ValueError(
            f"{table} has the columns {there}, expected one of caption, captions or caption_1, caption_2, ..."
        )
    return rows


def _json(file: Path, *keys: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON (an LFS pointer, or a broken download?): {error}") from error
    if missing := [key for key in keys if key not in data]:
        raise ValueError(f"{file} lacks {', '.join(missing)}; it has {', '.join(data)}.")
    return data


def _stem(name: str) -> str:
    """An id without the extension that WavCaps gives some of them (`Y<id>.wav`); ids may hold dots themselves."""
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name


def _youtube_names(youtube_id: str, start: int) -> list[str]:
    """How the peers name the file of a clip that begins at second `start`."""
    timed = [
        f"{youtube_id}_{start}",
        f"{youtube_id}_{1000 * start}_{1000 * start + 10000}",
        f"{youtube_id}_{start}_{start + 10}",
    ]
    return [name for plain in [*timed, youtube_id] for name in (f"Y{plain}", plain)]
