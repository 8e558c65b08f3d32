"""``spinelib doctor``: is everything here that a run needs, and if not, which command brings it."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spinelib.record import (
    PACKAGE_DIR,
    declared_dependencies,
    file_sha256,
    installed_version,
    project_root,
    read_json,
)

FREE_DISK_GB = 5.0
"""A laptop run and its reports fit into this."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list.

    Attributes
    ----------
    name, detail : str
        What was looked at and what was found.
    ok : bool
    fix : str
        What to do about it; '' where nothing is wrong.
    needed : bool
        False: a run goes on without it, only with less (then shown as [NOTE]).
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True

    def __str__(self) -> str:
        mark = "[OK]  " if self.ok else "[FAIL]" if self.needed else "[NOTE]"
        hint = f"\n{'':7s}{'':12s}-> {self.fix}" if self.fix and not self.ok else ""
        return f"{mark} {self.name:12s}{self.detail}{hint}"


def examine(data_dir: str | Path | None = None) -> Iterator[Finding]:
    """Yield the findings one by one; a check that itself fails is a finding too.

    Parameters
    ----------
    data_dir : path, optional
        Folder of images; ``data`` of the project by default.
    """
    folder = Path(data_dir) if data_dir else project_root() / "data"
    checks: list[Callable[[], Finding]] = [
        python_version,
        packages,
        torch_device,
        jupyter_kernel,
        browser,
        lambda: writable("data", folder),
        lambda: writable("reports", project_root() / "reports"),
        lambda: free_disk(project_root()),
        weights,
        real_data,
    ]
    for check in checks:
        try:
            yield check()
        except Exception as error:  # noqa: BLE001 - a broken installation must not break its diagnosis
            yield Finding(getattr(check, "__name__", "check"), False, f"{type(error).__name__}: {error}")


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print the findings; return 0, or 1 if anything needed is missing."""
    findings = []
    for finding in examine(arguments.data_dir):
        print(finding, flush=True)
        findings.append(finding)
    return int(any(not finding.ok and finding.needed for finding in findings))


def python_version() -> Finding:
    """Is Python 3.11 or newer."""
    shown = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), shown, "install Python 3.11 or newer, then: make reproduce")


def packages() -> Finding:
    """Are all declared dependencies installed."""
    names = declared_dependencies()
    missing = [name for name in names if installed_version(name) is None]
    found = f"missing: {', '.join(missing)}" if missing else f"{len(names)} installed"
    return Finding("packages", bool(names) and not missing, found, "pip install -e .")


def torch_device() -> Finding:
    """Import torch and name what it computes on."""
    import torch

    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads; the laptop profile fits"
    return Finding("torch", True, f"{torch.__version__} on {where}")


def jupyter_kernel() -> Finding:
    """Is there a kernel 'python3' that starts this interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager

    start = KernelSpecManager().get_kernel_spec("python3").argv[0]
    ours = start in ("python", "python3") or Path(start).resolve() == Path(sys.executable).resolve()
    fix = f"{Path(sys.executable).name} -m ipykernel install --sys-prefix"
    return Finding("kernel", ours, f"python3 -> {'this interpreter' if ours else start}", fix)


def browser() -> Finding:
    """Is a Chromium there, which turns interactive figures into PNG."""
    from spinelib.report import find_browser

    path = find_browser()
    fix = "apt-get install chromium fonts-dejavu-core, or: plotly_get_chrome"
    return Finding("chromium", path is not None, path or "absent: no PNG of 3D figures", fix, needed=False)


def writable(name: str, folder: Path) -> Finding:
    """Can files be written into `folder`, or into the nearest folder above it that exists."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    fix = f"choose another folder, or: chmod u+w {nearest}"
    return Finding(name, nearest.is_dir() and os.access(nearest, os.W_OK), f"{folder} is writable", fix)


def free_disk(folder: Path) -> Finding:
    """Are `FREE_DISK_GB` free."""
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", free >= FREE_DISK_GB, f"{free:.0f} GB free", f"free {FREE_DISK_GB:.0f} GB, or: make clean")


def weights(folder: Path = PACKAGE_DIR / "weights") -> Finding:
    """Are the weights of `spinelib predict` there, and has every weights file the SHA-256 that its card states."""
    from spinelib.models.predictor import SHIPPED_WEIGHTS

    files = sorted(folder.glob("*.safetensors"))
    cards = {path: read_json(path.with_suffix(".json"), {}) for path in files}
    wrong = [path.name for path in files if cards[path].get("sha256") != file_sha256(path)]
    fix = "git checkout -- spinelib/weights"
    if not wrong and folder / SHIPPED_WEIGHTS not in files:
        absent = f"no {SHIPPED_WEIGHTS}: notebooks train their own"
        return Finding("weights", False, absent, fix, needed=False)
    return Finding("weights", not wrong, f"{len(files)} files" + (f", wrong: {wrong}" if wrong else " match"), fix)


def real_data() -> Finding:
    """Are the small public CT/MR samples there, on which some tests and benchmarks run."""
    folder = Path(os.environ.get("SPINELIB_REALDATA", project_root().parent / "shared" / "realdata"))
    fix = "set SPINELIB_REALDATA to their folder; runs do without"
    return Finding("real data", folder.is_dir(), "present" if folder.is_dir() else "absent", fix, needed=False)
