"""Debian packages with recordings: fetched and unpacked into the user's cache, without root."""

import csv
import fnmatch
import os
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from transformers.utils import logging

from modeling_lamb.packaged_backbone import cache_folder

from .containers import SOUNDS, members

logger = logging.get_logger(__name__)
FOLDER = Path(__file__).parent
KEPT = SOUNDS | {".zip", ".pk3", ".rcc", ".cat", ".ocg", ".sf2"}


@dataclass(frozen=True)
class Recording:
    """A file of the table: its class, the split and family that it belongs to, its package and its path there."""

    class_name: str
    split: str
    family: int
    package: str
    path: str


@dataclass(frozen=True)
class SoundClass:
    """How a class is said: clauses ("a dog barks"), nouns ("a dog barking"), and the words that name it."""

    name: str
    repeats: int
    clauses: tuple[str, ...]
    nouns: tuple[str, ...]
    keywords: tuple[str, ...]


def _table(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_classes() -> dict[str, SoundClass]:
    """The hand-written classes by name."""
    classes = {}
    for row in _table("classes"):
        said = [tuple(row[column].split("|")) for column in ("clauses", "nouns", "keywords")]
        classes[row["class"]] = SoundClass(row["class"], int(row["repeats"]), *said)
    return classes


def package_folder(package: str) -> Path:
    """Where a package is unpacked: `soundscapes/<package>` in the cache."""
    return cache_folder() / "soundscapes" / package


def fetch(packages: list[str] | None = None) -> dict[str, str]:
    """
    Downloads and unpacks the packages of the table that are not there yet.

    One that cannot be had is left out, with a warning; the others are used. An interrupted unpacking starts anew, and
    two processes may run at once.

    Returns:
        What went wrong, by package; empty when all is well.
    """
    problems = {}
    for package in packages or [row["package"] for row in _table("packages")]:
        folder = package_folder(package)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                continue
            try:
                _unpack(package, folder)
            except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
                detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
                problems[package] = " ".join(detail)
                logger.warning(
                    f"The package {package} cannot be had ({problems[package]}); going on without its recordings. It needs "
                    "apt-get and dpkg-deb, and the network to a Debian mirror (`apt-get update` first); run again to retry."
                )
    return problems


def _unpack(package: str, folder: Path) -> None:
    """Downloads a package and keeps what can hold sound, and its copyright file; `folder` appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        quiet = {"check": True, "capture_output": True, "text": True, "cwd": work}
        subprocess.run(["apt-get", "download", package], **quiet)  # type: ignore[call-overload]
        archive = next(Path(work).glob("*.deb"))
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacking,
            tarfile.open(fileobj=unpacking.stdout, mode="r|") as files,
        ):
            for file in files:
                wanted = Path(file.name).suffix.lower() in KEPT or Path(file.name).name == "copyright"
                if wanted and (file.isfile() or file.issym()):
                    files.extract(file, Path(work) / "unpacked", filter="data")
        if unpacking.returncode:
            raise OSError(f"dpkg-deb stopped with {unpacking.returncode} on {archive.name}")
        for archive in (Path(work) / "unpacked").rglob("*.zip"):
            _keep_sounds(archive)
        os.replace(Path(work) / "unpacked", folder)


def _keep_sounds(archive: Path) -> None:
    """Leaves nothing else in a zip: a game's pictures and maps may be gigabytes."""
    smaller = archive.with_suffix(".smaller")
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(smaller, "w") as kept:
        for member in whole.infolist():
            if Path(member.filename).suffix.lower() in SOUNDS:
                kept.writestr(member, whole.read(member))
    os.replace(smaller, archive)


def read_recordings() -> list[Recording]:
    """
    The recordings of the table that are in the cache, each with its family: a row of the table, takes of one source.

    Raises:
        FileNotFoundError: when none is; it says how to fetch them.
    """
    bases = {row["package"]: row["base"] for row in _table("packages")}
    recordings = []
    for family, row in enumerate(_table("recordings")):
        package = row["package"]
        if not package_folder(package).is_dir():
            continue
        for pattern in row["files"].split():
            joined = f"{bases[package]}{'' if bases[package].endswith('!') else '/'}{pattern}"
            for path in _matches(package_folder(package), joined.replace("!", "!/").replace("!//", "!/")):
                recordings.append(Recording(row["class"], row["split"], family, package, path))
    if not recordings:
        raise FileNotFoundError("No recordings are in the cache: run `python -m training_lamb.soundscapes fetch`.")
    return recordings


def _matches(root: Path, pattern: str) -> list[str]:
    file, _, inner = pattern.partition("!/")
    if not inner:
        return sorted(str(path.relative_to(root)) for path in root.glob(file))
    if file.endswith(".sf2"):  # a note, not a file
        return [pattern] if (root / file).is_file() else []
    if not (root / file).is_file():
        return []
    return sorted(f"{file}!/{member}" for member in members(root / file) if fnmatch.fnmatch(member, inner))
