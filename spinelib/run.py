"""The typed front door to the notebooks: check everything, run what is not done, record what was run.

A run lives in ``reports/<run-id>/``. A notebook counts as done when its executed copy and outputs are
there and its entry in ``run.json`` carries the same key: a hash of the notebook's source, its parameters
and their files, the package's code and weights, and the keys of the notebooks before it. So an
interrupted run continues where it stopped, and a result that any change has made stale is made again.
"""

import argparse
import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinelib.errors import InputError, SpinelibError
from spinelib.execution import execute
from spinelib.parameters import known_profiles, known_sweeps, parse_assignments
from spinelib.plan import Plan, find_profile, list_notebooks, plan_run
from spinelib.record import (
    combined_sha256,
    file_sha256,
    git_state,
    machine,
    now,
    package_sha256,
    project_root,
    read_json,
    write_json_atomic,
    write_text_atomic,
)

_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


@dataclass
class Run:
    """A run folder and its record; `save` after every change."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write ``run.json`` atomically."""
        write_json_atomic(self.folder / "run.json", self.record)

    def entry(self, name: str) -> dict[str, Any]:
        """Return the record of one notebook; {} where it has not run."""
        return self.record["notebooks"].get(name, {})

    def executed(self, name: str) -> Path:
        """Return the path of a notebook's executed copy."""
        return self.folder / "notebooks" / f"{name}.ipynb"


@dataclass(frozen=True)
class Job:
    """One run, checked and not begun: its folder and what every notebook will get."""

    run_id: str
    folder: Path
    profile_file: Path
    plans: list[Plan]
    root: Path

    def is_done(self) -> bool:
        """Return whether the folder holds every result of this job, made with today's code and inputs."""
        record = read_json(self.folder / "run.json", {})
        if record.get("status") != "done":
            return False
        run = Run(self.folder, record | {"package_sha256": package_sha256()})
        return all(_is_done(run, plan, _key(run, plan, self.root)) for plan in self.plans)


def plan_job(
    profile: str = "laptop",
    notebooks: Sequence[str] | None = None,
    parameters: dict[str, Any] | None = None,
    run_id: str | None = None,
    reports_dir: str | Path | None = None,
    notebooks_dir: str | Path | None = None,
) -> Job:
    """Return what `run_notebooks` would do with the same arguments; raises `InputError` as it does."""
    source_dir = Path(notebooks_dir or project_root() / "notebooks").resolve()
    profile_file = find_profile(profile, source_dir)
    run_id = run_id or profile_file.stem
    folder = report_folder(Path(reports_dir or source_dir.parent / "reports").resolve(), run_id)
    plans = plan_run(source_dir, profile_file, notebooks, parameters or {}, shown(folder, project_root()))
    return Job(run_id, folder, profile_file, plans, source_dir.parent)


def run_notebooks(
    profile: str = "laptop",
    notebooks: Sequence[str] | None = None,
    parameters: dict[str, Any] | None = None,
    run_id: str | None = None,
    resume: bool = True,
    reports_dir: str | Path | None = None,
    notebooks_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
    latest: bool = True,
) -> Path:
    """Run notebooks in their order and return the run folder.

    Parameters
    ----------
    profile : str
        'smoke', 'laptop', 'gpu' (files in ``notebooks/params``) or the path of a YAML file: a section
        ``common`` for every notebook that declares the name, and one section per notebook.
    notebooks : sequence of str, optional
        Numbers or names ('03', '03_train_curves'); all by default.
    parameters : dict, optional
        Values that win over the profile, for every selected notebook that declares the name.
    run_id : str, optional
        Name of the folder under `reports_dir`; the profile's name by default, so that the same command
        resumes.
    resume : bool
        False removes the run's folder first.
    reports_dir, notebooks_dir : path, optional
        By default ``reports`` and ``notebooks`` of the project.
    say : callable
        Gets one line of progress per notebook.
    latest : bool
        Point ``latest`` beside the run folder here when all is done.

    Raises
    ------
    InputError
        For an unknown notebook, profile or parameter, a value of the wrong type, or a folder that cannot
        be written. Nothing has run then.
    NotebookFailed
        When a notebook stops with an error; what is done stays done.
    """
    job = plan_job(profile, notebooks, parameters, run_id, reports_dir, notebooks_dir)
    with writing(job.folder):
        run = _open_run(job.folder, resume)
        _describe(run, job)
        _run_all(run, job.plans, job.root, say)
        _publish(run, say)
        if latest:
            point_latest(job.folder)
    return job.folder


def run_command(arguments: argparse.Namespace) -> int:
    """Do ``spinelib run``; returns the exit code."""
    if arguments.list:
        for name, title in list_notebooks():
            print(f"{name:28s} {title}")
        params = project_root() / "notebooks" / "params"
        print("profiles:", ", ".join(known_profiles(params)))
        print("sweeps:  ", ", ".join(known_sweeps(params)))
        return 0
    folder = run_notebooks(
        arguments.profile or "laptop",
        arguments.notebooks or None,
        parse_assignments(arguments.assignments),
        arguments.run_id,
        resume=not arguments.fresh,
    )
    print(f"open {folder / 'index.html'}")
    return 0


def report_folder(reports: Path, run_id: str) -> Path:
    """Return the folder of a run under `reports`; a name that cannot be one raises `InputError`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id) or run_id in ("latest", "reference"):
        message = f"cannot name a run {run_id!r}. "
        message += "Use letters, digits, '.', '_' and '-'; 'latest' and 'reference' are taken."
        raise InputError(message)
    return reports / run_id


def shown(path: Path, root: Path) -> str:
    """Return a path relative to the project where it can be: records then name no home folder."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full or protected disc inside the block into an `InputError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        message = f"cannot write the run in {folder}: {error.strerror}. Free space or move the project."
        raise InputError(message) from error


def point_latest(folder: Path) -> None:
    """Make ``latest`` a link to this run, or a text file with its name where links are not allowed."""
    latest, draft = folder.with_name("latest"), folder.with_name(".latest.part")
    draft.unlink(missing_ok=True)
    try:
        draft.symlink_to(folder.name)
        draft.replace(latest)
    except OSError:
        write_text_atomic(latest, folder.name + "\n")


def _open_run(folder: Path, resume: bool) -> Run:
    if folder.exists() and not (folder / "run.json").is_file() and any(folder.iterdir()):
        message = f"{folder} exists and is not a run (it has no run.json). Pass another --run-id."
        raise InputError(message)
    if "variants" in read_json(folder / "run.json", {}):
        message = f"{folder} holds a sweep. Pass another --run-id."
        raise InputError(message)
    if not resume and folder.exists():
        shutil.rmtree(folder)
    for name in ("notebooks", "figures", "tables", "metrics"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Run(folder, read_json(folder / "run.json", {"notebooks": {}}))


def _describe(run: Run, job: Job) -> None:
    seeds = {plan.parameters["seed"] for plan in job.plans}
    inputs = {shown(job.profile_file.resolve(), job.root): file_sha256(job.profile_file)}
    for plan in job.plans:
        inputs |= {shown(path, job.root): file_sha256(path) for path in _input_files(plan, job.root)}
    run.record |= {
        "run_id": job.run_id,
        "status": "running",
        "started": now(),
        "finished": None,
        "profile": job.profile_file.stem,
        "seed": seeds.pop() if len(seeds) == 1 else sorted(seeds),
        "git": git_state(job.root),
        "machine": machine(),
        "package_sha256": package_sha256(),
        "inputs": inputs,
    }
    run.save()


def _input_files(plan: Plan, root: Path) -> list[Path]:
    """Return the files that parameters name, such as a manifest or weights."""
    texts = [value for value in plan.parameters.values() if isinstance(value, str) and value]
    return [path for path in (root / text for text in texts) if path.is_file()]


def _key(run: Run, plan: Plan, root: Path) -> str:
    earlier = [f"{n}={e.get('key')}" for n, e in sorted(run.record["notebooks"].items()) if n < plan.name]
    files = [file_sha256(path) for path in _input_files(plan, root)]
    return combined_sha256(
        [
            plan.source_sha256,
            repr(sorted(plan.parameters.items())),
            run.record["package_sha256"],
            *files,
            *earlier,
        ]
    )


def _is_done(run: Run, plan: Plan, key: str) -> bool:
    entry = run.entry(plan.name)
    present = all((run.folder / path).is_file() for path in entry.get("outputs", {}))
    return entry.get("status") == "done" and entry["key"] == key and present and run.executed(plan.name).is_file()


def _run_all(run: Run, plans: list[Plan], root: Path, say: Callable[[str], None]) -> None:
    for plan in plans:
        key = _key(run, plan, root)
        if _is_done(run, plan, key):
            say(f"{plan.name:28s} done before ({run.entry(plan.name)['seconds']:.0f} s)")
            continue
        _run_one(run, plan, key, root, say)


def _run_one(run: Run, plan: Plan, key: str, root: Path, say: Callable[[str], None]) -> None:
    for path in run.entry(plan.name).get("outputs", {}):
        (run.folder / path).unlink(missing_ok=True)  # what the last run of this notebook wrote must not linger
    entry = {"status": "running", "key": key, "started": now(), "parameters": plan.parameters}
    entry |= {"source_sha256": plan.source_sha256, "commit": run.record["git"]["commit"]}
    run.record["notebooks"][plan.name] = entry
    run.save()
    before, start = _snapshot(run.folder), time.perf_counter()
    try:
        entry["peak_gb"] = execute(plan.source, run.executed(plan.name), plan.parameters, root)
        entry["status"] = "done"
    except BaseException as error:
        entry["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        run.record |= {"status": entry["status"], "finished": now()}
        raise
    finally:
        entry["seconds"] = round(time.perf_counter() - start, 2)
        if entry["status"] == "done":
            after = _snapshot(run.folder)
            changed = [path for path, stamp in after.items() if before.get(path) != stamp]
            entry["outputs"] = {path: file_sha256(run.folder / path) for path in sorted(changed)}
        run.save()
    say(f"{plan.name:28s} {entry['seconds']:7.1f} s  {entry['peak_gb']:5.2f} GB")


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return {relative path: (time, size)} of files that belong to one notebook, not to the whole run."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    ours = re.compile(r"notebooks/.*|run\.json|metrics\.json|index\.html|.*/captions\.json|headline\.txt")
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items() if not ours.fullmatch(name)}


def _publish(run: Run, say: Callable[[str], None]) -> None:
    """Merge metrics, write the HTML pages and close the record."""
    from spinelib.offline import notebook_html
    from spinelib.report import run_index

    run.record |= {"status": "done", "finished": now()}
    merged = _merged_metrics(run)
    write_json_atomic(run.folder / "metrics.json", merged)
    run.save()
    for name in run.record["notebooks"]:
        page = run.executed(name).with_suffix(".html")
        if run.entry(name)["status"] != "done":
            continue
        if not page.is_file() or page.stat().st_mtime_ns < run.executed(name).stat().st_mtime_ns:
            notebook_html(run.executed(name), page)
    run_index(run.folder)
    say(f"{'total':28s} {merged['seconds.total']:7.1f} s  {merged['peak_gb']:5.2f} GB")


def _merged_metrics(run: Run) -> dict[str, float]:
    done = {name: entry for name, entry in run.record["notebooks"].items() if entry["status"] == "done"}
    merged: dict[str, float] = {}
    for name in sorted(done):
        own = read_json(run.folder / "metrics" / f"{name}.json", {})
        doubled = merged.keys() & own.keys()
        if doubled:
            message = f"{name} writes metrics of an earlier notebook: {', '.join(sorted(doubled))}. Rename them."
            raise SpinelibError(message)
        merged |= own
    merged |= {f"seconds.{name}": entry["seconds"] for name, entry in sorted(done.items())}
    merged["seconds.total"] = round(sum(entry["seconds"] for entry in done.values()), 2)
    merged["peak_gb"] = max((entry["peak_gb"] for entry in done.values()), default=0.0)
    return merged
