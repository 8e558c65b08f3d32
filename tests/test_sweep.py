"""Sweeps: what is refused before anything runs, what a failure leaves, what the table says."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from test_run import WRITE, make_notebook

from spinelib.cli import main
from spinelib.errors import InputError
from spinelib.execution import NotebookFailed
from spinelib.parameters import known_profiles, known_sweeps
from spinelib.run import run_notebooks
from spinelib.sweep import read_sweep, run_sweep
from spinelib.sweep_results import comparison_table, parameter_line, variant_dots

COMMITTED = Path(__file__).resolve().parents[1] / "notebooks" / "params"
SWEEP = {
    "notebooks": ["00"],
    "profile": "smoke",
    "common": {"epochs": 5},
    "base": "full",
    "collect": ["error_*"],
    "variants": {"full": {}, "plain": {"augment": False}, "slow": {"rate": 0.01}},
}


def error_mm(parameters: dict) -> float:
    """The invented result of a run; a shared part of 10 a seed must vanish from paired differences."""
    return 10 * parameters["seed"] + 100 * parameters["rate"] - parameters["augment"] + 0.5


class Kernel:
    """Stands in for papermill: notes the parameters, writes metrics, fails where `fails(parameters)`."""

    def __init__(self):
        self.calls: list[dict] = []
        self.fails = lambda parameters: False
        self.error: BaseException = NotebookFailed(
            "00_first failed in cell 3:\n...\nRuntimeError: too flat\nSee /a/copy.ipynb"
        )

    def __call__(self, source, target, parameters, working_dir):
        self.calls.append(parameters)
        target.write_text(source.read_text())
        if self.fails(parameters):
            raise self.error
        metrics = {"error_mm": error_mm(parameters), "subjects": 7}
        Path(parameters["run_dir"], "metrics", f"{source.stem}.json").write_text(json.dumps(metrics))
        return 0.25


@pytest.fixture
def kernel(monkeypatch):
    fake = Kernel()
    monkeypatch.setattr("spinelib.run.execute", fake)
    monkeypatch.setattr("spinelib.run.package_sha256", lambda: "the same code")
    for module in ("run", "sweep"):
        monkeypatch.setattr(f"spinelib.{module}.machine", lambda: {"device": "cpu", "packages": {}})
    monkeypatch.setattr("spinelib.offline.notebook_html", lambda source, target: target.write_text("page"))
    return fake


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they come, neither written nor closed."""
    figures = []
    monkeypatch.setattr("spinelib.sweep.Notebook.figure", lambda pen, figure, *text: figures.append(figure))
    yield figures
    for figure in figures:
        plt.close(figure)


@pytest.fixture
def house(tmp_path):
    """A project with one small notebook, a profile and a sweep."""
    folder = tmp_path / "notebooks"
    make_notebook(folder / "00_first.ipynb", WRITE)
    (folder / "params").mkdir()
    (folder / "params" / "smoke.yml").write_text("common:\n  seed: 3\n")
    write_sweep(folder)
    return folder


def write_sweep(house: Path, **changes) -> None:
    content = {name: value for name, value in (SWEEP | changes).items() if value is not None}
    (house / "params" / "trial.yml").write_text(yaml.safe_dump(content, sort_keys=False))


def sweep(house: Path, **more) -> Path:
    return run_sweep("trial", notebooks_dir=house, say=lambda line: None, **more)


def read_table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / "sweep.csv", index_col="variant", keep_default_na=False, na_values=[""])


def test_each_variant_is_a_run_of_its_own(house, kernel, tmp_path):
    folder = sweep(house)
    assert folder == tmp_path / "reports" / "trial"
    assert [(c["augment"], c["rate"], c["seed"], c["epochs"]) for c in kernel.calls] == [
        (True, 0.1, 3, 5),
        (False, 0.1, 3, 5),
        (True, 0.01, 3, 5),
    ]
    for name in SWEEP["variants"]:
        record = json.loads((folder / name / "run.json").read_text())
        assert (record["status"], record["profile"]) == ("done", "smoke")
        assert (folder / name / "index.html").is_file()
        assert Path(record["notebooks"]["00_first"]["parameters"]["run_dir"]).name == name
    assert not (folder / "latest").exists()
    assert (tmp_path / "reports" / "latest").resolve() == folder


def test_table_record_metrics_and_page_compare_the_variants(house, kernel):
    folder = sweep(house)
    table = read_table(folder)
    assert list(table.columns) == ["changed", "state", "seconds", "error_mm", "error_mm.difference"]
    assert table["error_mm"].tolist() == pytest.approx([39.5, 40.5, 30.5])
    assert table["error_mm.difference"].tolist() == pytest.approx([0, 1, -9])
    assert table.loc["plain", "changed"] == "augment=False"
    assert set(table["state"]) == {"done"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["slow.error_mm"] == pytest.approx(30.5)
    assert {"seconds.total", "peak_gb"} < metrics.keys()
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["seed"]) == ("done", [3])
    assert {Path(name).name for name in record["inputs"]} == {"trial.yml", "smoke.yml"}
    text = (folder / "index.html").read_text()
    assert 'href="plain/index.html"' in text
    assert "augment=False" in text
    assert (folder / "figures" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_runs_twice(house, kernel, drawn):
    sweep(house)
    assert len(kernel.calls) == 3
    sweep(house)
    assert len(kernel.calls) == 3
    write_sweep(house, variants=SWEEP["variants"] | {"plain": {"augment": False, "rate": 1.0}})
    sweep(house)
    assert len(kernel.calls) == 4, "one variant has another parameter"
    write_sweep(house)
    sweep(house)
    assert len(kernel.calls) == 5
    sweep(house, resume=False)
    assert len(kernel.calls) == 8


def test_a_failing_variant_is_set_aside_and_runs_again_next_time(house, kernel, drawn):
    kernel.fails = lambda parameters: not parameters["augment"]
    with pytest.raises(NotebookFailed, match="1 of 3 runs failed: plain"):
        sweep(house)
    folder = house.parent / "reports" / "trial"
    table = read_table(folder)
    assert len(kernel.calls) == 3, "the variant after it has run"
    assert table["state"].tolist() == ["done", "failed: RuntimeError: too flat", "done"]
    assert np.isnan(table.loc["plain", "error_mm"])
    assert table.loc["slow", "error_mm.difference"] == pytest.approx(-9)
    assert json.loads((folder / "run.json").read_text())["status"] == "unfinished"
    assert "RuntimeError: too flat" in (folder / "index.html").read_text()

    kernel.fails = lambda parameters: False
    assert read_table(sweep(house))["state"].tolist() == ["done"] * 3
    assert len(kernel.calls) == 4


def test_without_the_base_there_is_no_difference(house, kernel, drawn):
    kernel.fails = lambda parameters: parameters["augment"] and parameters["rate"] == 0.1
    with pytest.raises(NotebookFailed):
        sweep(house)
    table = read_table(house.parent / "reports" / "trial")
    assert table["error_mm.difference"].isna().all()
    assert table["error_mm"].notna().tolist() == [False, True, True]


def test_ctrl_c_stops_the_sweep_and_keeps_what_is_done(house, kernel, drawn):
    kernel.fails, kernel.error = (lambda parameters: not parameters["augment"]), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(house)
    folder = house.parent / "reports" / "trial"
    assert read_table(folder)["state"].tolist() == ["done", "interrupted", "not run"]
    kernel.fails = lambda parameters: False
    sweep(house)
    assert len(kernel.calls) == 4


def test_seeds_run_each_variant_once_and_are_averaged(house, kernel, drawn):
    write_sweep(house, seeds=[0, 1])
    folder = sweep(house)
    assert [c["seed"] for c in kernel.calls] == [0, 1] * 3
    assert (folder / "slow-seed1" / "index.html").is_file()
    row = read_table(folder).loc["slow"]
    assert row[["error_mm", "error_mm.min", "error_mm.max"]].tolist() == pytest.approx([5.5, 0.5, 10.5])
    assert row["error_mm.difference"] == pytest.approx(-9)


def test_differences_are_taken_within_a_seed(house, kernel, drawn):
    write_sweep(house, seeds=[0, 1])
    kernel.fails = lambda parameters: not parameters["augment"] and parameters["seed"] == 1
    with pytest.raises(NotebookFailed, match="1 of 6 runs failed: plain-seed1"):
        sweep(house)
    row = read_table(house.parent / "reports" / "trial").loc["plain"]
    assert row["error_mm.difference"] == pytest.approx(1)
    assert row["state"] == "done; failed: RuntimeError: too flat"


def test_only_runs_a_part_and_the_table_has_the_rest(house, kernel, drawn, monkeypatch):
    folder = sweep(house, only=["full"])
    assert read_table(folder)["state"].tolist() == ["done", "not run", "not run"]
    sweep(house, only=["slow"])
    table = read_table(folder)
    assert table["state"].tolist() == ["done", "not run", "done"]
    assert table.loc["slow", "error_mm.difference"] == pytest.approx(-9)
    monkeypatch.setattr("spinelib.run.package_sha256", lambda: "other code")
    sweep(house, only=["slow"])
    table = read_table(folder)
    assert table["state"].tolist() == ["stale", "not run", "done"]
    assert np.isnan(table.loc["full", "error_mm"]), "a number made with other code is not compared"
    with pytest.raises(InputError, match="no variant 'slo'. Did you mean 'slow'"):
        sweep(house, only=["slo"])


def test_code_that_changes_on_the_way_is_told(house, kernel, drawn, monkeypatch):
    def fails(parameters):
        monkeypatch.setattr("spinelib.run.package_sha256", lambda: "other code")
        return False

    kernel.fails, said = fails, []
    run_sweep("trial", notebooks_dir=house, say=said.append)
    assert said[-1] == "code or inputs changed while this ran; the same command makes these again: full"
    sweep(house)
    assert len(kernel.calls) == 4


def test_command_line_values_win_over_common_and_not_over_the_variant(house, kernel, drawn):
    sweep(house, parameters={"epochs": 1, "rate": 0.5})
    assert [(c["epochs"], c["rate"]) for c in kernel.calls] == [(1, 0.5), (1, 0.5), (1, 0.01)]


def test_another_profile_has_another_folder(house, kernel, drawn):
    (house / "params" / "large.yml").write_text("common:\n  seed: 8\n")
    assert sweep(house, profile="large").name == "trial-large"
    assert {c["seed"] for c in kernel.calls} == {8}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {"full": {}, "x": {"augmnt": True}}}, "trial.yml, variant x: parameters: no notebook has"),
        ({"variants": {"full": {}, "x": {"augmnt": True}}}, "Did you mean 'augment'?"),
        ({"variants": {"full": {}, "x": {"rate": "low"}}}, "variant x: 00_first: rate='low' is a str"),
        ({"variants": {"full": {}, "x": {"run_dir": "y"}}}, "'run_dir'"),
        ({"variants": {"full": {}, "x": {"augment": True}}}, "full and x have the same parameters"),
        ({"variants": {"full": {}, "x": [1]}}, "variant x: expected {parameter: value}"),
        ({"variants": {"full": {}, "a/b": {"rate": 1.0}}}, "cannot name a variant 'a/b'"),
        ({"variants": {"full": {}, False: {"rate": 1.0}}}, "cannot name a variant False"),
        ({"variants": {"full": {}, "tables": {"rate": 1.0}}}, "are taken"),
        ({"variants": {"full": {}, "latest": {"rate": 1.0}}}, "cannot name a run 'latest'"),
        ({"variants": []}, "variants: expected lines"),
        ({"base": "ful"}, "base 'ful' is not a variant. Did you mean 'full'?"),
        ({"base": None}, "base: expected the name of a variant, got None"),
        ({"notebooks": ["07"]}, "no notebook '07'"),
        ({"notebooks": [3]}, "expected text in quotes"),
        ({"profile": "smok"}, "no profile 'smok'. Did you mean 'smoke'?"),
        ({"profile": "trial"}, "is a sweep, not a profile"),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"seeds": [1.5]}, "seeds: expected different whole numbers"),
        ({"colect": ["a"]}, "unknown line 'colect'. Did you mean 'collect'?"),
    ],
)
def test_faults_are_told_before_anything_runs(house, kernel, changes, words):
    write_sweep(house, **changes)
    with pytest.raises(InputError) as error:
        sweep(house)
    assert words in str(error.value)
    assert kernel.calls == []
    assert not (house.parent / "reports").exists()


def test_a_name_to_collect_that_nobody_measured_is_told_when_all_is_written(house, kernel, drawn):
    write_sweep(house, collect=["subjects", "eror_mm"])
    with pytest.raises(InputError, match=r"no variant measured 'eror_mm'. Did you mean 'error_mm'"):
        sweep(house)
    assert read_table(house.parent / "reports" / "trial")["subjects"].tolist() == [7, 7, 7]


def test_runs_and_sweeps_leave_each_others_folders_alone(house, kernel, drawn):
    run_notebooks("smoke", notebooks_dir=house, say=lambda line: None)
    with pytest.raises(InputError, match="is not a sweep"):
        sweep(house, run_id="smoke")
    folder = sweep(house)
    with pytest.raises(InputError, match="holds a sweep"):
        run_notebooks("smoke", run_id="trial", resume=False, notebooks_dir=house)
    assert (folder / "slow" / "index.html").is_file()


def test_sweeps_are_no_profiles(house, tmp_path):
    assert known_profiles(house / "params") == ["smoke"]
    assert known_sweeps(house / "params") == ["trial"]
    with pytest.raises(InputError, match="is a sweep, not a profile. Run it with: spinelib run --sweep trial"):
        run_notebooks("trial", notebooks_dir=house)
    with pytest.raises(InputError, match="no sweep 'trail'. Did you mean 'trial'"):
        run_sweep("trail", notebooks_dir=house)
    with pytest.raises(InputError, match="is not a sweep"):
        run_sweep("smoke", notebooks_dir=house)
    (house / "params" / "broken.yml").write_text("a: [")
    assert known_profiles(house / "params") == ["broken", "smoke"]


def test_command_line(house, kernel, drawn, monkeypatch, capsys):
    monkeypatch.setattr("spinelib.sweep.project_root", lambda: house.parent)
    path = str(house / "params" / "trial.yml")
    assert main(["run", "--sweep", path, "-p", "epochs=9", "--only", "full", "slow"]) == 0
    assert [c["epochs"] for c in kernel.calls] == [9, 9]
    assert "trial/index.html" in capsys.readouterr().out
    kernel.fails = lambda parameters: not parameters["augment"]
    assert main(["run", "--sweep", path, "--fresh", "--run-id", "other"]) == 1
    assert "1 of 3 runs failed" in capsys.readouterr().err
    assert main(["run", "00", "--sweep", path]) == 2
    assert main(["run", "--only", "full"]) == 2
    assert "--sweep FILE" in capsys.readouterr().err


def frame(values: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(values, orient="index")


def test_dots_mark_the_base_and_name_what_failed():
    figure = variant_dots(frame({"full": [3.0], "plain": [3.5], "lost": [np.nan]}), "full", "error_mm")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["full (base)", "plain", "lost: no result"]
    assert [text.get_text() for text in axes.texts] == ["3", "3.5 (+0.5)"]
    assert axes.yaxis_inverted()
    plt.close(figure)


def test_a_swept_number_is_drawn_as_a_line_on_a_log_axis():
    values = frame({"n100": [3.0, 3.2], "n25": [6.0, 6.4], "all": [2.5, 2.7], "n50": [4.0, 4.2]})
    parameter = pd.Series({"n100": 100, "n25": 25, "all": 0, "n50": 50}, name="train_subjects")
    figure = parameter_line(values, parameter, "all", "error_mm")
    (axes,) = figure.axes
    line, dashed = axes.lines
    assert line.get_xdata().tolist() == [25, 50, 100]
    assert line.get_ydata().tolist() == pytest.approx([6.2, 4.1, 3.1])
    assert dashed.get_ydata() == pytest.approx([2.6, 2.6])
    assert axes.get_xscale() == "log"
    assert axes.texts[0].get_text() == "all: 2.6"
    plt.close(figure)


@pytest.mark.parametrize(
    ("variants", "scale"),
    [
        ({"full": {}, "a": {"rate": 0.01}, "b": {"rate": 1.0}}, "log"),
        ({"full": {}, "a": {"rate": 0.01}}, "linear"),
        ({"full": {}, "a": {"rate": 0.01}, "b": {"rate": 1.0}, "c": {"epochs": 7}}, "linear"),
        ({"full": {}, "a": {"augment": False}}, "linear"),
    ],
)
def test_the_figure_fits_the_sweep(house, kernel, drawn, variants, scale):
    write_sweep(house, variants=variants)
    sweep(house)
    assert drawn[-1].axes[0].get_xscale() == scale


def test_table_of_several_metrics_keeps_their_order():
    index = pd.MultiIndex.from_product([["b", "a"], [0, 1]], names=["variant", "seed"])
    results = pd.DataFrame({"x": [1.0, 3.0, 2.0, np.nan], "y": [0.0, 0.0, 1.0, 1.0]}, index=index)
    table = comparison_table(results, ["y", "x"], "b")
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["a"].to_dict() == {
        **{"y": 1.0, "y.min": 1.0, "y.max": 1.0, "y.difference": 1.0},
        **{"x": 2.0, "x.min": 2.0, "x.max": 2.0, "x.difference": 1.0},
    }


@pytest.mark.parametrize("name", known_sweeps(COMMITTED))
def test_committed_sweeps_can_be_read_and_state_command_hardware_and_time(name):
    path = COMMITTED / f"{name}.yml"
    assert len(read_sweep(path).variants) > 3
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"spinelib run --sweep notebooks/params/{name}.yml" in header
    assert all(f"# {word}" in header for word in ("hardware", "time", "expect"))
