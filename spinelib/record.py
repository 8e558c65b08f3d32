"""What a run was made with: commit, machine, package versions, hashes; and atomic writing of its files."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spinelib.errors import InputError

PACKAGE_DIR = Path(__file__).parent


def project_root() -> Path:
    """Return the clone: the working folder, one of its parents, or the folder that the package lies in."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "spinelib" / "__init__.py").is_file():
            return folder
    return PACKAGE_DIR.parent


def run_folder(run_dir: str | Path) -> Path:
    """Return `run_dir` as an absolute path; a relative one is taken from the project root.

    Jupyter starts a kernel in ``notebooks/`` and papermill in the caller's folder: both must write to the
    same place.
    """
    path = Path(run_dir).expanduser()
    return path if path.is_absolute() else project_root() / path


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(parts: Iterable[str]) -> str:
    """Return the SHA-256 of several strings in their order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def package_sha256(folder: Path = PACKAGE_DIR) -> str:
    """Return one hash of everything that can change a result: code, tables and weights under `folder`."""
    wanted = {".py", ".csv", ".json", ".safetensors", ".mplstyle"}
    files = sorted(p for p in folder.rglob("*") if p.suffix in wanted and p.is_file())
    return combined_sha256(f"{p.relative_to(folder).as_posix()}={file_sha256(p)}" for p in files)


def notebook_sha256(path: Path) -> str:
    """Return the hash of a notebook's cells and tags; outputs, counts and ids do not matter."""
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    kept = [[c["cell_type"], "".join(c["source"]), c.get("metadata", {}).get("tags", [])] for c in cells]
    return combined_sha256([json.dumps(kept)])


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf8")
    draft.replace(path)


def written_atomically(path: str | Path, endings: Sequence[str], write: Callable[[str], object]) -> Path:
    """Let `write` make a file beside the target and rename it, so that a broken run never leaves half a file.

    Parameters
    ----------
    path : path
        Its folder is made.
    endings : sequence of str
        Allowed ones, in small letters; the longest first where one ends in another.
    write : callable
        Gets the name of the file to make.

    Raises
    ------
    InputError
        For another ending, or if the file cannot be written.
    """
    path = Path(path)
    ending = next((e for e in endings if path.name.lower().endswith(e)), None)
    if ending is None:
        message = f"expected a name ending in {' or '.join(endings)}, given {path.name}. Fix: change the ending."
        raise InputError(message)
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".writing_", suffix=ending)
        os.close(handle)
        write(draft)
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    except OSError as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        message = f"cannot write {path}: {error.strerror or error}. Fix: choose a folder you may write to."
        raise InputError(message) from error
    return path


def write_json_atomic(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN and infinity are refused because JSON has neither."""
    write_text_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """Return a JSON file's content, or `default` where the file does not exist."""
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else default


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Return python, system, device, CPU cores, memory (GB, 1e9 bytes) and versions of the dependencies."""
    import psutil

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "packages": package_versions(),
    }


def device_name() -> str:
    """Return the name of the GPU that torch would use, or 'cpu'."""
    if shutil.which("nvidia-smi") is None:  # spares a run without a GPU two seconds of importing torch
        return "cpu"
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def package_versions() -> dict[str, str]:
    """Return {name: version} of spinelib's declared dependencies as installed; 'missing' where one is not."""
    names = ["spinelib", *declared_dependencies()]
    return {name: installed_version(name) or "missing" for name in names}


def declared_dependencies() -> list[str]:
    """Return the names of the run-time dependencies that the installed package declares."""
    try:
        requirements = importlib.metadata.requires("spinelib") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requirements if "extra ==" not in line]


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any]:
    """Return {'commit': hash or None, 'dirty': bool or None} of the repository around `folder`."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
