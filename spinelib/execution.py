"""Execute one notebook in a kernel of this interpreter and measure the memory that it takes."""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spinelib.errors import SpinelibError

KERNEL_ENVIRONMENT = {
    "PLOTLY_RENDERER": "plotly_mimetype",  # figures stay data; the HTML exporter adds plotly.js once
    "JUPYTER_PREFER_ENV_PATH": "1",  # 'python3' is this environment's kernel, not one from the home folder
}


class NotebookFailed(SpinelibError):
    """A notebook stopped with an error of its own; the command line exits with code 1."""

    exit_code = 1


def execute(source: Path, target: Path, parameters: dict[str, Any], working_dir: Path) -> float:
    """Run `source`, write the executed copy to `target` and return the peak memory in GB (1e9 bytes).

    The copy is saved after every cell, so that a failed run shows how far it came. Memory is the largest
    sum over the kernel and its children (a browser that draws figures included), sampled five times a
    second. The kernel is reached through a file socket, since others of a machine could listen to a port.

    Raises
    ------
    NotebookFailed
        With the error's last lines, when a cell raises or the kernel dies.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    try:
        # What papermill warns of (names that its line reader misses) was checked better before.
        logging.getLogger("papermill").setLevel(logging.ERROR)
        with _environment(KERNEL_ENVIRONMENT), PeakMemory() as memory:
            papermill.execute_notebook(
                source,
                target,
                parameters,
                kernel_name="python3",
                cwd=working_dir,
                progress_bar=sys.stderr.isatty(),
                config=Config({"KernelManager": {"transport": "ipc" if os.name == "posix" else "tcp"}}),
            )
    except papermill.PapermillExecutionError as error:
        message = f"{source.stem} failed in cell {error.exec_count}:\n{_last_lines(error)}\nSee {target}"
        raise NotebookFailed(message) from None
    except DeadKernelError:
        message = f"{source.stem}: the kernel died, most often for want of memory. See {target}"
        raise NotebookFailed(message) from None
    return memory.peak_gb


class PeakMemory:
    """Largest summed memory of this process's children while a ``with`` block runs, in `peak_gb`.

    Asking the kernel for shared memory walks all pages and holds up the process that is asked: five times a second
    it cost workers half of their time, every few seconds it does not show. The end of the block is looked at, too.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.peak_gb = 0.0
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        ended, pause = False, min(0.25, self._seconds)
        while not ended:
            ended = self._stop.wait(pause)
            pause = min(1.5 * pause, self._seconds)  # a short notebook must be seen before it ends
            self.peak_gb = max(self.peak_gb, round(_children_bytes() / 1e9, 3))


def _children_bytes() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # ended between the listing and the question
            continue
        # Shared pages count once (pss) where the system tells: a browser's processes share most of theirs.
        total += getattr(memory, "pss", memory.rss)
    return total


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the kernel that is started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _last_lines(error: Any, count: int = 12) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()
    return "\n".join([*plain[-count:-1], f"{error.ename}: {error.evalue}"])
