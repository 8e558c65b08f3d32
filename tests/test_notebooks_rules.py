"""What every committed notebook obeys: parameters, nothing defined, nothing stored, prose that keeps pace with code."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from spinelib.parameters import declared_parameters, known_sweeps
from spinelib.plan import REQUIRED_PARAMETERS
from spinelib.run import plan_job
from spinelib.sweep import read_sweep

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    content = json.loads(path.read_text(encoding="utf8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks_in_reading_order():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert numbers, "no notebooks"
    assert numbers == sorted(set(numbers))
    assert all(path.stem[2] == "_" for path in NOTEBOOKS)


@every_notebook
def test_parameters_are_declared_with_types(path):
    known = declared_parameters(path)
    assert {name: known[name].type_name for name in REQUIRED_PARAMETERS} == {
        "run_dir": "str",
        "data_dir": "str",
        "seed": "int",
    }
    assert known["run_dir"].default == "reports/smoke"


@every_notebook
def test_nothing_is_defined(path):
    tree = ast.parse("\n".join(cells(path, "code")))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert [node.name for node in ast.walk(tree) if isinstance(node, kinds)] == []


@every_notebook
def test_nothing_is_stored(path):
    content = json.loads(path.read_text(encoding="utf8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert [cell for cell in content["cells"] if cell.get("attachments")] == []


@every_notebook
def test_any_python3_kernel_will_do(path):
    assert json.loads(path.read_text(encoding="utf8"))["metadata"]["kernelspec"]["name"] == "python3"


@every_notebook
def test_cells_are_few_and_short(path):
    code = cells(path, "code")
    assert len(code) <= 25
    listings = ("from ", "import ", "run_dir: str")  # imports and parameters: lists to read, not code to follow
    steps = [text for text in code if not text.startswith(listings)]
    assert max(len(text.splitlines()) for text in steps) <= 16


@every_notebook
def test_prose_keeps_pace_with_code(path):
    prose, code = (sum(len(text.split()) for text in cells(path, kind)) for kind in ("markdown", "code"))
    assert prose >= 0.7 * code


@every_notebook
def test_first_cell_is_the_card(path):
    content = json.loads(path.read_text(encoding="utf8"))
    first = content["cells"][0]
    card = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert card.startswith("# ")
    for word in ("**Question.**", "| needs |", "| produces |", "| time, hardware |", "| next |"):
        assert word in card, f"the card lacks {word!r}"


@every_notebook
def test_smoke_profile_says_nothing_but_the_defaults(path):
    sections = yaml.safe_load((FOLDER / "params" / "smoke.yml").read_text()) or {}
    known = declared_parameters(path)
    stated = {**(sections.get("common") or {}), **(sections.get(path.stem) or {})}
    differing = {name: value for name, value in stated.items() if name in known and known[name].default != value}
    assert differing == {}


def test_profiles_state_command_hardware_and_time_first():
    for name in ("smoke", "laptop", "gpu"):
        lines = (FOLDER / "params" / f"{name}.yml").read_text().splitlines()
        header = "\n".join(line for line in lines[:12] if line.startswith("#")).lower()
        assert "spinelib run" in header or "make reproduce" in header, name
        assert any(word in header for word in ("cpu", "gpu", "core")), name
        assert any(word in header for word in ("second", "minute", "hour")), name


@pytest.mark.parametrize("name", known_sweeps(FOLDER / "params"))
def test_sweeps_fit_the_notebooks(name):
    sweep = read_sweep(FOLDER / "params" / f"{name}.yml")
    assert sweep.base in sweep.variants
    for variant, changes in sweep.variants.items():
        job = plan_job(sweep.profile, sweep.notebooks, {**sweep.common, **changes}, f"{name}-{variant}")
        assert all(changes.items() <= plan.parameters.items() for plan in job.plans)
