"""Sweeps: reruns of notebooks with other parameters, one row each, from one YAML file.

A sweep lives in ``reports/<run-id>/``; each variant is a normal run in ``reports/<run-id>/<variant>/`` (with
seeds ``<variant>-seed<n>/``), recorded and resumed like any other. The file says::

    notebooks: ["03"]            # what every variant runs
    profile: laptop              # where parameters start; laptop if this line is absent
    common: {paper_seconds: 0.0} # for all variants
    base: full                   # the variant that differences are taken from
    collect: [training.*.validation_mm]  # names in metrics.json, '*' for any text; the first one is drawn
    seeds: [0, 1]                # each variant once per seed; absent: once, with the profile's seed
    variants:
      full: {}
      no_shortcut: {shortcut: false}

From weak to strong: profile, common, ``-p``, variant, seeds; so a row is always what its name says.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from spinelib.errors import InputError
from spinelib.execution import NotebookFailed
from spinelib.figures import use_house_style
from spinelib.parameters import did_you_mean, parse_assignments, read_yaml
from spinelib.plan import find_sweep
from spinelib.record import (
    file_sha256,
    git_state,
    machine,
    now,
    package_sha256,
    project_root,
    read_json,
    write_json_atomic,
)
from spinelib.report import Notebook, run_index
from spinelib.run import Job, plan_job, point_latest, report_folder, run_notebooks, shown, writing
from spinelib.sweep_results import by_seed, comparison_table, parameter_line, variant_dots

_LINES = {
    "notebooks": (list, 'a list such as ["03"]'),
    "base": (str, "the name of a variant"),
    "collect": (list, "a list of names in metrics.json"),
    "variants": (dict, "lines such as no_shortcut: {shortcut: false}"),
    "profile": (str, "the name of a profile"),
    "common": (dict, "name: value pairs"),
    "seeds": (list, "a list of whole numbers"),
}
_REQUIRED = ("notebooks", "base", "collect", "variants")
_OWN_FOLDERS = ("figures", "tables")
_FEWEST_POINTS = 3  # of a line


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file; the module's text tells what the lines mean."""

    notebooks: list[str]
    base: str
    collect: list[str]
    variants: dict[str, dict[str, Any]]
    profile: str = "laptop"
    common: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


@dataclass
class Member:
    """One run of a sweep: a variant with a seed, and what is known of its result."""

    variant: str
    seed: int | None
    job: Job
    arguments: dict[str, Any]  # of run_notebooks
    status: str = "not run"
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.job.run_id


def read_sweep(path: Path) -> Sweep:
    """Return a sweep file's content.

    Raises
    ------
    InputError
        For a line that is unknown, absent or of the wrong type, a `base` that is no variant, or a variant whose
        name cannot be that of a folder.
    """
    content = read_yaml(path)
    for line in content:
        if line not in _LINES:
            message = f"{path.name}: unknown line {line!r}. {did_you_mean(str(line), _LINES)}"
            raise InputError(message)
    for line, (kind, expected) in _LINES.items():
        given = content.get(line)
        if (line in content or line in _REQUIRED) and (not isinstance(given, kind) or not given):
            message = f"{path.name}: {line}: expected {expected}, got {given!r}."
            raise InputError(message)
    _check_variants(path, content["variants"], content["base"])
    _check_lists(path, content)
    return Sweep(**content | {"variants": {name: changes or {} for name, changes in content["variants"].items()}})


def run_sweep(
    sweep: str,
    only: Sequence[str] | None = None,
    profile: str | None = None,
    parameters: dict[str, Any] | None = None,
    run_id: str | None = None,
    resume: bool = True,
    reports_dir: str | Path | None = None,
    notebooks_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run every variant of a sweep that is not done, compare them, and return the sweep's folder.

    The folder gets ``tables/sweep.csv``, ``figures/sweep.png``, ``metrics.json`` (means over seeds, named
    ``<variant>.<metric>``), ``run.json`` and ``index.html``, written anew after each variant. A variant that
    fails is set aside with its reason, and the others go on.

    Parameters
    ----------
    sweep : str
        A name in ``notebooks/params`` or the path of a YAML file.
    only : sequence of str, optional
        Variants to run now; the table has all, with what earlier calls left.
    profile : str, optional
        Start from this profile instead of the file's.
    parameters : dict, optional
        Values for all variants; they win over ``common``, not over what a variant changes.
    run_id : str, optional
        By default the file's name, with '-<profile>' after it where `profile` is given.
    resume : bool
        False makes the chosen variants forget what they have done.
    reports_dir, notebooks_dir, say
        As in `run_notebooks`.

    Raises
    ------
    InputError
        For anything unknown or of the wrong type in the file, before the first notebook starts. At the end, with
        everything written, for a name under ``collect`` that no variant measured.
    NotebookFailed
        At the end, if a variant failed.
    """
    source_dir = Path(notebooks_dir or project_root() / "notebooks").resolve()
    path = find_sweep(sweep, source_dir)
    content = read_sweep(path)
    run_id = run_id or (f"{path.stem}-{Path(profile).stem}" if profile else path.stem)
    folder = report_folder(Path(reports_dir or source_dir.parent / "reports").resolve(), run_id)
    start = {"profile": profile or content.profile, "notebooks": content.notebooks}
    start |= {"reports_dir": folder, "notebooks_dir": source_dir}
    members = _members(content, start, parameters or {}, path.name)
    chosen = _chosen(content, members, only)
    with writing(folder):
        _recall(folder, members)
        record = _description(run_id, path, members)
        _run_all(chosen, resume, say, publish=lambda: _publish(folder, record, content, members))
        point_latest(folder)
    failed = [member.name for member in chosen if member.status == "failed"]
    if failed:
        message = f"{len(failed)} of {len(chosen)} runs failed: {', '.join(failed)}. See {folder / 'index.html'}"
        raise NotebookFailed(message)
    _check_collected(content, members, path.name)
    return folder


def sweep_command(arguments: argparse.Namespace) -> int:
    """Do ``spinelib run --sweep``; returns the exit code."""
    if not arguments.sweep:
        message = "--only chooses variants of a sweep. Pass --sweep FILE, too."
        raise InputError(message)
    if arguments.notebooks:
        message = f"the sweep names its notebooks itself. Leave out {' '.join(arguments.notebooks)}."
        raise InputError(message)
    folder = run_sweep(
        arguments.sweep,
        arguments.only,
        arguments.profile,
        parse_assignments(arguments.assignments),
        arguments.run_id,
        resume=not arguments.fresh,
    )
    print(f"open {folder / 'index.html'}")
    return 0


def _check_variants(path: Path, variants: dict[Any, Any], base: str) -> None:
    for name, changes in variants.items():
        fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        if not fits or name in _OWN_FOLDERS:
            message = f"{path.name}: cannot name a variant {name!r}. Use letters, digits, '.', '_' and '-' (in quotes "
            message += f"if YAML takes it for a number or yes/no); {' and '.join(map(repr, _OWN_FOLDERS))} are taken."
            raise InputError(message)
        if not isinstance(changes, dict | None):
            message = f"{path.name}, variant {name}: expected {{parameter: value}}, got {changes!r}."
            raise InputError(message)
    if base not in variants:
        message = f"{path.name}: base {base!r} is not a variant. {did_you_mean(base, variants)}"
        raise InputError(message)


def _check_lists(path: Path, content: dict[str, Any]) -> None:
    for line in ("notebooks", "collect"):
        if not all(isinstance(item, str) for item in content[line]):
            message = f'{path.name}: {line}: expected text in quotes, such as "03", got {content[line]!r}.'
            raise InputError(message)
    seeds = content.get("seeds", [])
    if any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        message = f"{path.name}: seeds: expected different whole numbers from 0, got {seeds!r}."
        raise InputError(message)


def _members(sweep: Sweep, start: dict[str, Any], parameters: dict[str, Any], file: str) -> list[Member]:
    """Plan and so check every run; two equal ones are refused, since a change without effect looks like a result."""
    members, names = [], {}
    for variant, changes in sweep.variants.items():
        for seed in sweep.seeds or [None]:
            name = variant if seed is None else f"{variant}-seed{seed}"
            values = {**sweep.common, **parameters, **changes} | ({} if seed is None else {"seed": seed})
            try:
                job = plan_job(**start, parameters=values, run_id=name)
            except InputError as error:
                message = f"{file}, variant {variant}: {error}"
                raise InputError(message) from None
            all_values = repr([plan.parameters | {"run_dir": ""} for plan in job.plans])
            twin = names.setdefault(all_values, name)
            if twin != name:
                message = f"{file}: variants {twin} and {name} have the same parameters. Leave one out."
                raise InputError(message)
            members.append(Member(variant, seed, job, {**start, "parameters": values, "run_id": name}))
    return members


def _chosen(sweep: Sweep, members: list[Member], only: Sequence[str] | None) -> list[Member]:
    for name in only or ():
        if name not in sweep.variants:
            message = f"no variant {name!r}. {did_you_mean(name, sweep.variants)}"
            raise InputError(message)
    return [member for member in members if not only or member.variant in only]


def _recall(folder: Path, members: list[Member]) -> None:
    """Set the members to what earlier calls left; a folder that holds something else is refused."""
    record = read_json(folder / "run.json", {})
    if "variants" not in record and folder.exists() and any(folder.iterdir()):
        message = f"{folder} exists and is not a sweep. Pass another --run-id."
        raise InputError(message)
    for member in members:
        member.reason = record.get("variants", {}).get(member.name, {}).get("reason", "")
        _look(member)


def _look(member: Member) -> None:
    """Set a member's status and metrics from its folder; numbers made with other code or values do not count."""
    folder = member.job.folder
    if member.job.is_done():
        member.status, member.metrics = "done", read_json(folder / "metrics.json")
    else:
        status = read_json(folder / "run.json", {}).get("status", "not run")
        member.status, member.metrics = {"running": "interrupted", "done": "stale"}.get(status, status), {}
    if member.status != "failed":
        member.reason = ""


def _run_all(chosen: list[Member], resume: bool, say: Callable[[str], None], publish: Callable[[], None]) -> None:
    publish()
    for place, member in enumerate(chosen, 1):
        say(f"variant {member.name} ({place} of {len(chosen)})")
        try:
            folder = run_notebooks(**member.arguments, resume=resume, say=say, latest=False)
            member.status, member.reason, member.metrics = "done", "", read_json(folder / "metrics.json")
        except NotebookFailed as error:
            say(f"{error}\n{member.name} is set aside")
            member.reason = str(error).partition("See ")[0].strip().splitlines()[-1]
            _look(member)
        except BaseException:
            _look(member)
            raise
        finally:
            publish()
    stale = [member.name for member in chosen if member.status == "done" and not member.job.is_done()]
    if stale:
        say(f"code or inputs changed while this ran; the same command makes these again: {', '.join(stale)}")


def _description(run_id: str, path: Path, members: list[Member]) -> dict[str, Any]:
    job = members[0].job
    return {
        "run_id": run_id,
        "started": now(),
        "profile": job.profile_file.stem,
        "seed": sorted({plan.parameters["seed"] for member in members for plan in member.job.plans}),
        "git": git_state(job.root),
        "machine": machine(),
        "package_sha256": package_sha256(),
        "inputs": {shown(file.resolve(), job.root): file_sha256(file) for file in (path, job.profile_file)},
        "notebooks": {},
    }


def _publish(folder: Path, record: dict[str, Any], sweep: Sweep, members: list[Member]) -> None:
    """Write record, table, figure and page from what the members have now."""
    done = [member for member in members if member.status == "done"]
    record |= {"status": "done" if len(done) == len(members) else "unfinished", "finished": now()}
    record["variants"] = {member.name: _entry(sweep, member) for member in members}
    write_json_atomic(folder / "run.json", record)
    results, names = _results(members), _collected(sweep.collect, members)
    table = comparison_table(results, names, sweep.base)
    metrics = {f"{variant}.{name}": table.loc[variant, name] for name in names for variant in table.index}
    metrics = {name: value for name, value in metrics.items() if pd.notna(value)}
    metrics["seconds.total"] = round(sum(member.metrics["seconds.total"] for member in done), 2)
    metrics["peak_gb"] = max((member.metrics["peak_gb"] for member in done), default=0.0)
    write_json_atomic(folder / "metrics.json", metrics)
    seeds = f" Means over seeds {', '.join(map(str, sweep.seeds))}." if sweep.seeds else ""
    pen = Notebook(folder, "sweep")
    caption = f"Variants of notebook {', '.join(sweep.notebooks)}; differences from {sweep.base}.{seeds}"
    pen.table(_first_columns(sweep, members, results).join(table), "sweep", caption)
    if names:
        use_house_style()
        pen.figure(_figure(sweep, members, results, names[0]), "sweep", f"{names[0]} of each variant.{seeds}")
    run_index(folder)


def _entry(sweep: Sweep, member: Member) -> dict[str, Any]:
    return {
        "parameters": sweep.variants[member.variant],
        "seed": member.seed,
        "status": member.status,
        "reason": member.reason,
        "seconds": member.metrics.get("seconds.total"),
    }


def _results(members: list[Member]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples([(m.variant, m.seed or 0) for m in members], names=["variant", "seed"])
    return pd.DataFrame([{"seconds.total": None, **m.metrics} for m in members], index=index, dtype=float)


def _collected(patterns: Sequence[str], members: list[Member]) -> list[str]:
    measured = dict.fromkeys(name for member in members for name in member.metrics)
    return list(dict.fromkeys(name for pattern in patterns for name in measured if fnmatchcase(name, pattern)))


def _check_collected(sweep: Sweep, members: list[Member], file: str) -> None:
    measured = {name for member in members for name in member.metrics}
    for pattern in sweep.collect:
        if not _collected([pattern], members):
            message = f"{file}: collect: no variant measured {pattern!r}. {did_you_mean(pattern, measured)}"
            raise InputError(message)


def _first_columns(sweep: Sweep, members: list[Member], results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for variant, changes in sweep.variants.items():
        own = [member for member in members if member.variant == variant]
        states = dict.fromkeys(f"{m.status}: {m.reason}" if m.reason else m.status for m in own)
        changed = ", ".join(f"{name}={value}" for name, value in changes.items())
        rows.append({"variant": variant, "changed": changed, "state": "; ".join(states)})
    seconds = by_seed(results, "seconds.total").mean(axis=1)
    return pd.DataFrame(rows).set_index("variant").assign(seconds=seconds)


def _figure(sweep: Sweep, members: list[Member], results: pd.DataFrame, metric: str) -> Figure:
    """Return a line where the sweep is over one positive number, dots otherwise."""
    values, name = by_seed(results, metric), _swept(sweep)
    if name is not None:
        plans = {member.variant: member.job.plans for member in members}
        at = {variant: next(p.parameters[name] for p in plans[variant] if name in p.parameters) for variant in plans}
        parameter = pd.Series(at, name=name)
        if (parameter > 0).sum() >= _FEWEST_POINTS:
            return parameter_line(values, parameter, sweep.base, metric)
    return variant_dots(values, sweep.base, metric)


def _swept(sweep: Sweep) -> str | None:
    """Return the one numeric parameter that all changes are of, or None."""
    changes = [change for variant in sweep.variants.values() for change in variant.items()]
    names = {name for name, _ in changes}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for _, value in changes)
    return names.pop() if len(names) == 1 and numbers else None
