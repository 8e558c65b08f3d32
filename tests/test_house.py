"""The house itself: floors, metadata that agree, commands that the README promises."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import spinelib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", line.strip())[0].lower().replace("_", "-") for line in lines if line.strip()}


def test_imports_only_go_down_the_floors():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_modules_stay_readable():
    long = {p.name: n for p in ROOT.glob("spinelib/**/*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_package_and_citation_carry_the_same_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == spinelib.__version__
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert f"## {spinelib.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    found = {(ref["authors"][0].get("family-names"), ref["year"]) for ref in citation["references"]}
    assert found == {("Bourigault", 2024), ("Bayat", 2020), ("Jian", 2022), ("Serrador", 2024)}
    assert all(ref["title"] and (ref.get("doi") or ref.get("url")) for ref in citation["references"])


def test_environment_installs_pyproject_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (nested,) = [entry for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert f"python{PROJECT['project']['requires-python']}" in plain
    assert set(plain) == {f"python{PROJECT['project']['requires-python']}", "pip"}
    assert nested == {"pip": ["--editable .[test]"]}


def test_every_dependency_has_a_lower_bound_and_stands_in_the_lock():
    extras = PROJECT["project"]["optional-dependencies"]
    declared = PROJECT["project"]["dependencies"] + extras["test"]
    assert [line for line in declared if ">=" not in line] == []
    lock = (ROOT / "requirements.lock").read_text()
    pins = [line for line in lock.splitlines() if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!]+", line)] == []
    assert requirement_names(declared) - requirement_names(pins) == set()


def test_make_help_lists_every_public_target():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert listed == {"help", "reproduce", "test", "lab", "doctor", "clean"}


def test_make_without_a_target_prints_help():
    plain = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "make" not in plain.splitlines()[0]
    assert plain.splitlines()[0].startswith("help")


def test_ci_runs_what_a_person_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    commands = [line.strip() for line in readme.splitlines()]
    assert any(re.fullmatch(r"make reproduce( +#.*)?", line) for line in commands)
    assert any(line.startswith("git clone ") for line in commands)
    assert "not a medical device" in readme


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "xf" + "ail"])
def test_nothing_is_left_unfinished(word):
    files = [*ROOT.glob("spinelib/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    assert [path.name for path in files if word in path.read_text()] == []


def test_committed_text_names_no_registry_and_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    pattern = re.compile(r"(py[p]i|pythonh[o]sted|npm[j]s)\.(org|com)|/[h]ome/\w+/|/[U]sers/\w+/")
    texts = [ROOT / name for name in files if name.endswith((".py", ".md", ".toml", ".yml", ".lock", ".ipynb", ".cff"))]
    found = [p.name for p in texts if p.name != "test_doctor.py" and p.is_file() and pattern.search(p.read_text())]
    assert found == []
