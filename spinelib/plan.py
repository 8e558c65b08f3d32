"""What a run will do: which notebooks, with which parameters; all checked before anything runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinelib.errors import InputError
from spinelib.parameters import (
    Parameter,
    checked,
    declared_parameters,
    did_you_mean,
    is_sweep,
    known_profiles,
    known_sweeps,
    read_profile,
)
from spinelib.record import notebook_sha256, project_root, read_json

REQUIRED_PARAMETERS = ("run_dir", "data_dir", "seed")


@dataclass(frozen=True)
class Plan:
    """One notebook of a run: its source and every parameter it will get."""

    source: Path
    parameters: dict[str, Any]
    source_sha256: str

    @property
    def name(self) -> str:
        """Name without the suffix, such as '03_train_curves'."""
        return self.source.stem


def list_notebooks(notebooks_dir: str | Path | None = None) -> list[tuple[str, str]]:
    """Return (name, title) of every notebook in reading order; the title is its first heading."""
    folder = Path(notebooks_dir or project_root() / "notebooks")
    return [(source.stem, _title(source)) for source in _sources(folder)]


def find_profile(profile: str, notebooks_dir: Path) -> Path:
    """Return the file of a profile: a name in ``notebooks/params``, or the path of a YAML file.

    Raises
    ------
    InputError
        If there is no such file; the message names those that are there.
    """
    path = _find_yaml("profile", profile, notebooks_dir / "params", known_profiles)
    if is_sweep(path):
        message = f"{path} is a sweep, not a profile. Run it with: spinelib run --sweep {profile}"
        raise InputError(message)
    return path


def find_sweep(sweep: str, notebooks_dir: Path) -> Path:
    """Return the file of a sweep: a name in ``notebooks/params``, or the path of a YAML file.

    Raises
    ------
    InputError
        If there is no such file, or it is a profile; the message names the sweeps that are there.
    """
    path = _find_yaml("sweep", sweep, notebooks_dir / "params", known_sweeps)
    if not is_sweep(path):
        message = f"{path} is not a sweep: it lists no 'variants:'. Run a profile with: spinelib run --profile {sweep}"
        raise InputError(message)
    return path


def plan_run(
    notebooks_dir: Path,
    profile_file: Path,
    wanted: Sequence[str] | None,
    overrides: Mapping[str, Any],
    run_dir: str,
) -> list[Plan]:
    """Return the selected notebooks in reading order, each with all its parameters in their declared types.

    Parameters
    ----------
    notebooks_dir, profile_file : Path
        Sources and YAML profile; the whole profile is checked, also for notebooks that are not selected.
    wanted : sequence of str or None
        Numbers or names; None selects all.
    overrides : mapping
        Values that win over the profile for every selected notebook that declares the name.
    run_dir : str
        Goes to every notebook.

    Raises
    ------
    InputError
        For anything unknown or of the wrong type.
    """
    sources = _sources(notebooks_dir)
    selected = _selected(sources, wanted)
    declared = {source.stem: declared_parameters(source) for source in sources}
    sections = read_profile(profile_file)
    _check_sections(sections, declared)
    _check_known("parameters", overrides, [declared[source.stem] for source in selected])
    plans = []
    for source in sources:
        known = declared[source.stem]
        extra = overrides if source in selected else {}
        given = {**sections.get("common", {}), **extra}
        given = {name: value for name, value in given.items() if name in known}
        own = {name: value for name, value in sections.get(source.stem, {}).items() if name not in extra}
        values = checked({**given, **own, "run_dir": run_dir}, known, source.stem)
        full = {name: parameter.default for name, parameter in known.items()} | values
        plans.append(Plan(source, full, notebook_sha256(source)))
    return [plan for plan in plans if plan.source in selected]


def _find_yaml(kind: str, word: str, folder: Path, known_in: Callable[[Path], list[str]]) -> Path:
    is_path = word.endswith((".yml", ".yaml"))
    path = Path(word) if is_path else folder / f"{word}.yml"
    if not path.is_file():
        known = [] if is_path else known_in(folder)
        hint = did_you_mean(word, known) if known else ""
        message = f"no {kind} {word!r}. {hint} Or pass the path of a .yml file."
        raise InputError(message)
    return path


def _sources(folder: Path) -> list[Path]:
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        message = f"no notebooks in {folder}. Run this command in a clone of the project."
        raise InputError(message)
    return found


def _title(source: Path) -> str:
    for cell in read_json(source)["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if cell["cell_type"] == "markdown" and line.startswith("# "):
                return line[2:].strip()
    return ""


def _selected(sources: list[Path], wanted: Sequence[str] | None) -> list[Path]:
    by_name = {name: source for source in sources for name in (source.stem, source.stem[:2], source.name)}
    for word in wanted or ():
        if word not in by_name:
            message = f"no notebook {word!r}. {did_you_mean(word, [source.stem for source in sources])}"
            raise InputError(message)
    chosen = {by_name[word] for word in wanted} if wanted else set(sources)
    return [source for source in sources if source in chosen]


def _check_sections(sections: Mapping[str, Mapping], declared: Mapping[str, Mapping[str, Parameter]]) -> None:
    for section in sections:
        if section not in ("common", *declared):
            message = f"profile: no notebook {section!r}. {did_you_mean(section, ['common', *declared])}"
            raise InputError(message)
    _check_known("profile, common", sections.get("common", {}), declared.values())
    for notebook, known in declared.items():
        absent = [name for name in REQUIRED_PARAMETERS if name not in known]
        if absent:
            message = f"{notebook}: its parameters cell lacks {', '.join(absent)}. "
            message += "Expected run_dir: str, data_dir: str and seed: int in every notebook."
            raise InputError(message)


def _check_known(where: str, given: Iterable[str], declared: Iterable[Mapping[str, Parameter]]) -> None:
    known = sorted({name for parameters in declared for name in parameters} - {"run_dir"})
    for name in given:
        if name not in known:
            message = f"{where}: no notebook has a parameter {name!r}. {did_you_mean(name, known)}"
            raise InputError(message)
