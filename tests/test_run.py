"""The typed front door: what it refuses, what it runs again, what it records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from spinelib import execution
from spinelib.cli import main
from spinelib.errors import InputError
from spinelib.execution import NotebookFailed
from spinelib.parameters import (
    Parameter,
    RawText,
    checked,
    declared_parameters,
    parse_assignments,
    read_profile,
)
from spinelib.plan import plan_run
from spinelib.record import file_sha256
from spinelib.run import run_notebooks

PARAMETERS = """run_dir: str = "reports/smoke"
data_dir: str = ""
seed: int = 0
epochs: int = 2  # passes over the data; 0 = none
rate: float = 0.1
augment: bool = True
levels: list[str] = ["T1", "L5"]"""

WRITE = """import os
import pandas as pd
from spinelib.report import Notebook
page = Notebook(run_dir, NAME)
page.table(pd.DataFrame({"seed": [seed], "third": [1 / 3]}), f"table_{NAME[:2]}", "A table.")
page.metrics({f"number_{NAME[:2]}": seed + 0.5})
page.finish()"""

STOP = """import pathlib
if not pathlib.Path(run_dir, "go").exists():
    raise RuntimeError("the disc is too flat")"""


def make_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    book.cells = [nbformat.v4.new_markdown_cell(f"# {path.stem} title")]
    if parameters:
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(text.replace("NAME", repr(path.stem))) for text in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


@pytest.fixture
def house(tmp_path):
    """A project with two small notebooks and one profile."""
    folder = tmp_path / "notebooks"
    make_notebook(folder / "00_first.ipynb", WRITE)
    make_notebook(folder / "01_second.ipynb", WRITE)
    (folder / "params").mkdir()
    (folder / "params" / "smoke.yml").write_text("common:\n  seed: 0\n01_second:\n  rate: 1\n")
    return folder


def declared(**kinds) -> dict[str, Parameter]:
    return {name: Parameter(name, kind, None) for name, kind in kinds.items()}


def test_parameters_cell_is_read_with_types_and_defaults(tmp_path):
    found = declared_parameters(make_notebook(tmp_path / "00_a.ipynb"))
    assert found["epochs"] == Parameter("epochs", "int", 2)
    assert found["levels"] == Parameter("levels", "list[str]", ["T1", "L5"])
    assert list(found) == ["run_dir", "data_dir", "seed", "epochs", "rate", "augment", "levels"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x: dict = {}", "'x' is declared dict. Expected int, float"),
        ("x: int | None = 3", "declared int | None"),
        ("x: int = 2 * y", "not a literal"),
        ("x: int", "expected name: type = value"),
        ("print(3)", "expected name: type = value"),
        ("x: int =", "cannot be read"),
    ],
)
def test_parameters_cells_that_could_mislead_are_refused(tmp_path, line, words):
    with pytest.raises(InputError) as error:
        declared_parameters(make_notebook(tmp_path / "00_a.ipynb", parameters=line))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epoch": 3}, "no parameter 'epoch'. Did you mean 'epochs'?"),
        ({"augment": "false"}, "augment='false' is a str; the notebook declares bool"),
        ({"epochs": 5.0}, "epochs=5.0 is a float; the notebook declares int"),
        ({"epochs": True}, "epochs=True is a bool; the notebook declares int"),
        ({"augment": 1}, "augment=1 is a int; the notebook declares bool"),
        ({"rate": "1e-3"}, "In YAML write it with a point, such as 1.0e-3."),
        ({"levels": "T1"}, "levels='T1' is a str; the notebook declares list[str]"),
        ({"levels": ["T1", 5]}, "declares list[str]"),
    ],
)
def test_wrong_names_and_types_are_refused(given, words):
    known = declared(epochs="int", augment="bool", rate="float", levels="list[str]")
    with pytest.raises(InputError) as error:
        checked(given, known, "03_train_curves")
    assert words in str(error.value)
    assert str(error.value).startswith("03_train_curves: ")


def test_a_parameter_without_a_type_takes_that_of_its_default(tmp_path):
    found = declared_parameters(make_notebook(tmp_path / "00_a.ipynb", parameters="rate = 0.5\nname = 'a=b'"))
    assert [(p.type_name, p.default) for p in found.values()] == [("float", 0.5), ("str", "a=b")]


def test_command_line_text_takes_the_declared_type():
    known = declared(name="str", rate="float", epochs="int", augment="bool", levels="list[str]")
    typed = {"name": "03", "rate": "1e-3", "epochs": "4", "augment": "false", "levels": "[T1, L5]"}
    values = checked({key: RawText(text) for key, text in typed.items()}, known, "nb")
    assert values == {"name": "03", "rate": 0.001, "epochs": 4, "augment": False, "levels": ["T1", "L5"]}
    assert type(checked({"rate": 2}, known, "nb")["rate"]) is float
    with pytest.raises(InputError, match=r"epochs=4.5 is a float"):
        checked({"epochs": RawText("4.5")}, known, "nb")


def test_assignments_without_a_name_or_value_are_refused():
    assert parse_assignments(["seed=3", "note=a=b"]) == {"seed": "3", "note": "a=b"}
    for text in ("seed", "=3", "a b=3"):
        with pytest.raises(InputError, match="Expected name=value"):
            parse_assignments([text])


def test_profile_wins_over_defaults_and_overrides_win_over_the_profile(house):
    profile = house / "params" / "smoke.yml"
    first, second = plan_run(house, profile, None, {}, "r")
    assert (first.parameters["rate"], second.parameters["rate"]) == (0.1, 1.0)
    assert first.parameters["run_dir"] == "r"
    (only,) = plan_run(house, profile, ["01"], {"rate": 3, "seed": 7}, "r")
    assert (only.name, only.parameters["rate"], only.parameters["seed"]) == ("01_second", 3.0, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("01_secnd:\n  rate: 1\n", "no notebook '01_secnd'. Did you mean '01_second'?"),
        ("common:\n  sed: 1\n", "no notebook has a parameter 'sed'. Did you mean 'seed'?"),
        ("01_second:\n  rat: 1\n", "01_second: no parameter 'rat'. Did you mean 'rate'?"),
        ("common: 3\n", "expected sections"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_faulty_profiles_are_refused_before_anything_runs(house, tmp_path, text, words):
    (house / "params" / "odd.yml").write_text(text)
    with pytest.raises(InputError) as error:
        run_notebooks("odd", ["00"], notebooks_dir=house)
    assert words in str(error.value)
    assert not (tmp_path / "reports").exists()


def test_unknown_notebook_profile_and_run_id_are_refused(house):
    with pytest.raises(InputError, match="Did you mean '00_first'"):
        run_notebooks("smoke", ["00_frst"], notebooks_dir=house)
    with pytest.raises(InputError, match="no profile 'smok'. Did you mean 'smoke'"):
        run_notebooks("smok", notebooks_dir=house)
    for name in ("../x", "latest", "", "a/b"):
        with pytest.raises(InputError, match="cannot name a run" if name else "no profile"):
            run_notebooks("smoke" if name else "none", run_id=name, notebooks_dir=house)
    with pytest.raises(InputError, match="no profile"):
        read_profile(house / "params" / "absent.yml")


def test_a_notebook_must_take_run_dir_data_dir_and_seed(house):
    make_notebook(house / "02_bare.ipynb", parameters="epochs: int = 1")
    with pytest.raises(InputError, match="02_bare: its parameters cell lacks run_dir, data_dir, seed"):
        run_notebooks("smoke", notebooks_dir=house)
    make_notebook(house / "02_bare.ipynb", parameters="")
    with pytest.raises(InputError, match="02_bare.ipynb has no parameters"):
        run_notebooks("smoke", notebooks_dir=house)


def test_a_folder_that_is_no_run_is_left_alone(house, tmp_path):
    keep = tmp_path / "reports" / "mine" / "thesis.txt"
    keep.parent.mkdir(parents=True)
    keep.write_text("years of work")
    for resume in (True, False):
        with pytest.raises(InputError, match="is not a run"):
            run_notebooks("smoke", run_id="mine", resume=resume, notebooks_dir=house)
    assert keep.read_text() == "years of work"


def test_a_reports_folder_that_cannot_be_written_is_an_input_error(house, tmp_path):
    (tmp_path / "full").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="cannot write the run"):
        run_notebooks("smoke", notebooks_dir=house, reports_dir=tmp_path / "full")


def fake_execute(calls: list[str], fail: str = "", error: type[BaseException] = KeyboardInterrupt):
    """Stand in for the kernel: writes a table and metrics, or stops."""

    def execute(source, target, parameters, working_dir):
        calls.append(source.stem)
        run_dir = Path(parameters["run_dir"])
        if source.stem == fail:
            raise error("stopped")
        (run_dir / "tables" / f"{source.stem}.csv").write_text(f"seed\n{parameters['seed']}\n")
        (run_dir / "metrics" / f"{source.stem}.json").write_text(json.dumps({f"m_{source.stem}": 1}))
        target.write_text(source.read_text())
        return 0.25

    return execute


def test_interrupted_run_resumes_at_the_first_unfinished(house, tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr("spinelib.run.execute", fake_execute(calls, fail="01_second"))
    with pytest.raises(KeyboardInterrupt):
        run_notebooks("smoke", notebooks_dir=house)
    record = json.loads((tmp_path / "reports/smoke/run.json").read_text())
    assert record["status"] == record["notebooks"]["01_second"]["status"] == "interrupted"
    assert record["notebooks"]["00_first"]["status"] == "done"
    assert not (tmp_path / "reports/latest").exists()

    monkeypatch.setattr("spinelib.run.execute", fake_execute(calls))
    run_notebooks("smoke", notebooks_dir=house)
    assert calls == ["00_first", "01_second", "01_second"]
    assert (tmp_path / "reports/latest/index.html").is_file()


def test_only_what_changed_and_what_follows_it_runs_again(house, tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr("spinelib.run.execute", fake_execute(calls))

    def again(**more) -> list[str]:
        calls.clear()
        run_notebooks("smoke", notebooks_dir=house, **more)
        return list(calls)

    both = ["00_first", "01_second"]
    assert again() == both
    assert again() == []
    assert again(notebooks=["01"], parameters={"epochs": 9}) == ["01_second"]
    assert again() == ["01_second"], "the profile's value is back: made with another one before"
    make_notebook(house / "01_second.ipynb", WRITE, "1 + 1")
    assert again() == ["01_second"]
    make_notebook(house / "00_first.ipynb", WRITE, "1 + 1")
    assert again() == both, "a changed notebook makes the later ones stale"
    (tmp_path / "reports/smoke/tables/01_second.csv").unlink()
    assert again() == ["01_second"], "a lost output is made again"
    monkeypatch.setattr("spinelib.run.package_sha256", lambda: "other code")
    assert again() == both, "changed package code makes everything stale"
    assert again(resume=False) == both


def test_a_changed_input_file_makes_the_result_stale(house, tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr("spinelib.run.execute", fake_execute(calls))
    table = tmp_path / "cohort.csv"
    table.write_text("subject_key\na\n")
    for text in ("subject_key\na\n", "subject_key\nb\n"):
        table.write_text(text)
        folder = run_notebooks("smoke", ["00"], {"data_dir": "cohort.csv"}, notebooks_dir=house)
    assert calls == ["00_first", "00_first"]
    inputs = json.loads((folder / "run.json").read_text())["inputs"]
    assert file_sha256(table) in inputs.values()


def test_outputs_of_the_run_before_do_not_linger(house, monkeypatch):
    monkeypatch.setattr("spinelib.run.execute", fake_execute([]))
    folder = run_notebooks("smoke", notebooks_dir=house)
    record = json.loads((folder / "run.json").read_text())
    stray = folder / "figures" / "old.png"
    stray.write_text("drawn by the last version")
    record["notebooks"]["00_first"]["outputs"]["figures/old.png"] = file_sha256(stray)
    (folder / "run.json").write_text(json.dumps(record))
    run_notebooks("smoke", parameters={"seed": 5}, notebooks_dir=house)
    assert not stray.exists()


def test_the_same_metric_from_two_notebooks_is_refused(house, monkeypatch):
    def execute(source, target, parameters, working_dir):
        Path(parameters["run_dir"], "metrics", f"{source.stem}.json").write_text('{"error_mm": 1}')
        target.write_text(source.read_text())
        return 0.1

    monkeypatch.setattr("spinelib.run.execute", execute)
    with pytest.raises(Exception, match="error_mm"):
        run_notebooks("smoke", notebooks_dir=house)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Two notebooks run for real, then once more from scratch under another name."""
    folder = tmp_path_factory.mktemp("house") / "notebooks"
    make_notebook(folder / "00_first.ipynb", WRITE)
    (folder / "params").mkdir()
    (folder / "params" / "smoke.yml").write_text("common:\n  seed: 4\n")
    said: list[str] = []
    first = run_notebooks("smoke", notebooks_dir=folder, say=said.append)
    second = run_notebooks("smoke", run_id="again", notebooks_dir=folder, say=said.append)
    return folder, first, second, said


def test_run_record_tells_what_was_run_with_what(real_run):
    _, folder, _, said = real_run
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["profile"], record["seed"]) == ("done", "smoke", 4)
    assert {"device", "cpu_count", "python", "packages"} <= record["machine"].keys()
    assert record["machine"]["packages"]["numpy"][0].isdigit()
    entry = record["notebooks"]["00_first"]
    assert entry["outputs"]["tables/table_00.csv"] == file_sha256(folder / "tables/table_00.csv")
    assert set(entry["outputs"]) == {"tables/table_00.csv", "metrics/00_first.json"}
    assert entry["parameters"]["epochs"] == 2
    assert entry["seconds"] > 0
    assert 0.02 < entry["peak_gb"] < 8, "a kernel with pandas takes more than 20 MB"
    assert said[0].startswith("00_first")


def test_metrics_are_merged_with_seconds_and_memory(real_run):
    _, folder, _, _ = real_run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["number_00"] == 4.5
    assert metrics["seconds.total"] == metrics["seconds.00_first"] > 0
    assert metrics["peak_gb"] > 0


def test_tables_of_two_runs_are_byte_identical(real_run):
    _, first, second, _ = real_run
    one, two = ((run / "tables" / "table_00.csv").read_bytes() for run in (first, second))
    assert one == two == b"seed,third\n4,0.333333\n"


def test_latest_points_at_the_newest_run(real_run):
    _, _, second, _ = real_run
    assert (second.parent / "latest").resolve() == second


def test_failing_notebook_shows_its_error_and_exits_with_1(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "notebooks"
    make_notebook(folder / "00_first.ipynb", STOP)
    (folder / "params").mkdir()
    (folder / "params" / "smoke.yml").write_text("")
    with pytest.raises(NotebookFailed) as error:
        run_notebooks("smoke", notebooks_dir=folder)
    assert "RuntimeError: the disc is too flat" in str(error.value)
    assert str(tmp_path / "reports/smoke/notebooks/00_first.ipynb") in str(error.value)
    assert (tmp_path / "reports/smoke/notebooks/00_first.ipynb").is_file()
    record = json.loads((tmp_path / "reports/smoke/run.json").read_text())
    assert record["notebooks"]["00_first"]["status"] == "failed"

    def fail(*_, **__):
        raise error.value

    monkeypatch.setattr("spinelib.run.run_notebooks", fail)
    assert main(["run", "00"]) == 1
    assert "too flat" in capsys.readouterr().err


def test_ctrl_c_stops_the_kernel_and_the_run_resumes(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    make_notebook(folder / "00_first.ipynb", WRITE)
    make_notebook(
        folder / "01_slow.ipynb",
        "import os, pathlib, time\nflag = pathlib.Path('kernel.pid')",
        "if not flag.exists():\n    flag.write_text(str(os.getpid()))\n    time.sleep(60)",
    )
    (folder / "params").mkdir()
    (folder / "params" / "smoke.yml").write_text("")
    call = "import spinelib.run as r; r.package_sha256 = lambda: 'the same code'; "
    call += f"r.run_notebooks('smoke', notebooks_dir={str(folder)!r})"
    monkeypatch.setattr("spinelib.run.package_sha256", lambda: "the same code")
    running = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    flag = tmp_path / "kernel.pid"
    for _ in range(300):
        if flag.exists() and flag.read_text():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=30) != 0
    time.sleep(0.5)
    assert not psutil.pid_exists(int(flag.read_text()))
    record = json.loads((tmp_path / "reports/smoke/run.json").read_text())
    assert record["notebooks"]["01_slow"]["status"] == "interrupted"

    said: list[str] = []
    run_notebooks("smoke", notebooks_dir=folder, say=said.append)
    assert "done before" in said[0]
    assert "done before" not in said[1]


def test_kernel_gets_the_plotly_renderer_and_this_process_does_not(monkeypatch):
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    with execution._environment(execution.KERNEL_ENVIRONMENT):
        assert os.environ["PLOTLY_RENDERER"] == "plotly_mimetype"
    assert "PLOTLY_RENDERER" not in os.environ


def test_peak_memory_counts_a_child():
    before = execution._children_bytes() / 1e9  # workers of earlier tests may still be there
    with execution.PeakMemory(seconds=0.02) as memory:
        subprocess.run([sys.executable, "-c", "import time; b = b'x' * 200_000_000; time.sleep(1)"], check=True)
    assert 0.19 < memory.peak_gb - before < 1.5


def test_command_line_codes(monkeypatch, capsys):
    assert main(["run", "--profile", "no_such_profile"]) == 2
    assert "spinelib: " in capsys.readouterr().err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spinelib.run.run_notebooks", interrupted)
    assert main(["run"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_papermill():
    script = "import sys; from spinelib.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'papermill', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for command in ("run", "predict", "doctor", "check"):
        shown = subprocess.run([sys.executable, "-m", "spinelib", command, "--help"], capture_output=True, text=True)
        assert "Example:" in shown.stdout
        assert shown.returncode == 0
