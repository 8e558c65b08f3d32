"""``spinelib check``: is a manifest sound; is a folder free of participant data before it is shared.

The scan finds what usually leaks from imaging studies: identifier columns, participant numbers in file
names or text, DICOM files, notebook outputs, paths of a home folder. It cannot recognise a face in a
picture: look at images yourself.
"""

import argparse
import csv
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spinelib.errors import InputError

IDENTIFIER_COLUMNS = frozenset(
    "eid f_eid ident last_name first_name surname patient_name patientname patient_id patientid dob "
    "date_of_birth birth_date patientbirthdate nhs_number mrn medical_record_number postcode email".split()
)
"""Columns and JSON keys that name a person, in lower case, blanks and hyphens as '_'."""

_PARTICIPANT_FILE = re.compile(r"(?<!\d)\d{7}_\d{5}(_\d+_\d+)?(?!\d)")
_HOME = re.compile(r"(/home/[^/\s\"'<>]+/|/Users/[^/\s\"'<>]+/|/root/|[A-Za-z]:\\+Users\\+)")
_TABLES = {".csv": ",", ".tsv": "\t"}
_TEXTS = {
    ".csv",
    ".tsv",
    ".json",
    ".md",
    ".txt",
    ".html",
    ".ipynb",
    ".yml",
    ".yaml",
    ".py",
    ".log",
    ".toml",
    ".cff",
}
_PRIVATE_FOLDERS = {".git", ".venv", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class Leak:
    """Something in a folder that should not be shared."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def scan_before_sharing(paths: Iterable[str | Path]) -> list[Leak]:
    """Return everything under `paths` that looks like participant data, sorted by path.

    Raises
    ------
    InputError
        If a path does not exist.
    """
    leaks = []
    for path in map(Path, paths):
        if not path.exists():
            message = f"nothing at {path}. Expected a file or folder to scan."
            raise InputError(message)
        for file in _files(path):
            leaks += [Leak(file, reason) for reason in dict.fromkeys(_reasons(file))]
    return sorted(leaks, key=lambda leak: (str(leak.path), leak.reason))


def check_command(arguments: argparse.Namespace) -> int:
    """Do ``spinelib check``; returns 0, or 2 if anything was found."""
    if arguments.before_sharing:
        leaks = scan_before_sharing(arguments.before_sharing)
        for leak in leaks:
            print(leak)
        print(f"{len(leaks)} findings: do not share this yet." if leaks else "nothing found; look at the images too.")
        return 2 if leaks else 0
    if not arguments.manifest:
        message = "nothing to check. Expected MANIFEST.csv, or --before-sharing PATH."
        raise InputError(message)
    return _check_manifest(arguments.manifest)


def _check_manifest(path: str) -> int:
    from spinelib.data import check_manifest

    problems = check_manifest(path)
    for row in problems.itertuples():
        print(f"{row.subject_key} {row.modality}: {row.reason}")
    print(f"{path}: {len(problems)} problems" if len(problems) else f"{path}: sound")
    return 2 if len(problems) else 0


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.name not in _PRIVATE_FOLDERS:
        for child in sorted(path.iterdir()):
            yield from _files(child)


def _reasons(file: Path) -> Iterator[str]:
    if _PARTICIPANT_FILE.search(file.name):
        yield "the file name holds a participant number"
    if _is_dicom(file):
        yield "DICOM file: its header names a person"
    if file.suffix == ".zip" and zipfile.is_zipfile(file):
        yield from _zip_reasons(file)
    if file.suffix.lower() in _TEXTS:
        text = file.read_text(encoding="utf8", errors="replace")
        yield from _text_reasons(text)
        yield from _structured_reasons(file, text)


def _is_dicom(file: Path) -> bool:
    if file.suffix.lower() in (".dcm", ".dicom") or file.name == "DICOMDIR":
        return True
    with file.open("rb") as stream:
        stream.seek(128)
        return stream.read(4) == b"DICM"


def _zip_reasons(file: Path) -> Iterator[str]:
    for name in zipfile.ZipFile(file).namelist():
        if _PARTICIPANT_FILE.search(name) or name.lower().endswith(".dcm"):
            yield f"the archive holds {name}"


def _text_reasons(text: str) -> Iterator[str]:
    if _PARTICIPANT_FILE.search(text):
        yield "the text holds a participant number"
    home = _HOME.search(text)
    if home:
        yield f"a path of somebody's home folder: {home[0]}"


def _structured_reasons(file: Path, text: str) -> Iterator[str]:
    if file.suffix in _TABLES:
        header = next(csv.reader(text.splitlines()[:1], delimiter=_TABLES[file.suffix]), [])
        yield from (f"column {name!r} identifies a person" for name in header if _identifies(name))
    elif file.suffix in (".json", ".ipynb"):
        try:
            content = json.loads(text)
        except ValueError:
            return
        if file.suffix == ".ipynb":
            yield from _notebook_reasons(content)
        else:
            yield from (f"key {key!r} identifies a person" for key in _keys(content) if _identifies(key))


def _notebook_reasons(content: dict) -> Iterator[str]:
    if any(cell.get("outputs") for cell in content.get("cells", [])):
        yield "stored notebook outputs: strip them (nbstripout) or share the HTML page after looking at it"


def _keys(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _keys(value)
    elif isinstance(content, list):
        for value in content:
            yield from _keys(value)


def _identifies(name: str) -> bool:
    return re.sub(r"[\s-]+", "_", name.strip().lower()) in IDENTIFIER_COLUMNS
