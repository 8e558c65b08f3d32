"""Download of the VerSe data set: six archives, checked against the hashes that the user keeps."""

import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd
import pooch

from spinelib.errors import InputError
from spinelib.record import file_sha256, write_text_atomic


def fetch_verse(root, parts: Sequence[str] | None = None, hashes=None, mirror: str = "") -> Path:
    """Download and unpack VerSe 2019 and 2020 (CC BY-SA 4.0); returns `root`, ready for `ct_cohort.list_series`.

    The SHA-256 of the archives is not published. The first download of a part is checked for completeness (its
    length and the checksums inside the zip), then its SHA-256 goes to the file `hashes`. Keep that file: every later
    download, here or elsewhere, must agree with it. A part that lies unpacked in `root` is left alone. A download
    that breaks off leaves nothing behind and starts anew at the next call.

    Parameters
    ----------
    root : path
        Gets a folder a part and `archives` with the zips, which may be deleted afterwards.
    parts : sequence of str, optional
        Of 'verse19training', 'verse19validation', 'verse19test', and the same for 'verse20'; default all six.
    hashes : path, optional
        Text file as written by sha256sum; default `verse.sha256` in `root`.
    mirror : str
        URL of another folder with the same file names.

    Raises
    ------
    InputError
        Unknown part, no connection, an archive that differs from its hash, is damaged, or would write outside
        its folder.
    """
    root = Path(root).expanduser()
    urls = pd.read_csv(Path(__file__).with_suffix(".csv")).set_index("part")["url"]
    unknown = set(parts or ()) - set(urls.index)
    if unknown:
        message = f"unknown parts {sorted(unknown)}. Expected some of: {', '.join(urls.index)}."
        raise InputError(message)
    hashes = Path(hashes) if hashes else root / "verse.sha256"
    for part in parts or urls.index:
        if not (root / part).is_dir():
            url = urls[part]
            _fetch_part(root, part, f"{mirror.rstrip('/')}/{url.rsplit('/', 1)[1]}" if mirror else url, hashes)
    return root


def _fetch_part(root, part, url, hashes):
    base, name = url.rsplit("/", 1)
    known = _known_hashes(hashes)
    store = pooch.create(
        path=root / "archives", base_url=f"{base}/", registry={name: known.get(name)}, retry_if_failed=1
    )
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=60)
    try:
        archive = Path(store.fetch(name, downloader=downloader))
    except (OSError, ValueError) as error:  # those of requests and of pooch
        if isinstance(error, OSError) or name not in known:
            message = (
                f"cannot download {url} ({error}). Fix: check the connection and the free space in {root} and try "
                f"again, or download it in a browser to {root / 'archives' / name} and call this again."
            )
            raise InputError(message) from error
        message = (
            f"{url}: expected the SHA-256 in {hashes}, given another file ({error}). Fix: try again; if VerSe "
            f"published a new version and you want it, delete the line of {name} in {hashes}."
        )
        raise InputError(message) from error
    _unpack(archive, root / part)
    if name not in known:
        lines = [f"{digest}  {file}" for file, digest in (known | {name: file_sha256(archive)}).items()]
        write_text_atomic(hashes, "\n".join(lines) + "\n")


def _known_hashes(path):
    if not path.is_file():
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    bad = [line for line in lines if len(line) != 2 or not re.fullmatch(r"[0-9a-f]{64}", line[0])]
    if bad:
        message = f"{path}: expected lines 'SHA-256  FILE' as sha256sum writes, given {' '.join(bad[0])!r}."
        raise InputError(message)
    return {name.lstrip("*"): digest for digest, name in lines}


def _unpack(archive, folder):
    """Unpack beside `folder` and rename, so that the folder is whole wherever it is there."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                _check_member(member, archive)
            content.extractall(draft)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        message = f"cannot unpack {archive} ({error}). Fix: delete it and fetch again, with enough free space."
        raise InputError(message) from error
    draft.replace(folder)


def _check_member(member, archive):
    """Refuse links and names that lead out of the folder."""
    name = member.filename
    leads_out = ".." in PureWindowsPath(name).parts or PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute()
    if leads_out or stat.S_ISLNK(member.external_attr >> 16):
        message = (
            f"{archive} holds {name!r}, which would write outside its folder. It is not an archive of VerSe. "
            "Fix: delete it and its line in the file of hashes, and check the address."
        )
        raise InputError(message)
