"""Pages that work offline, and the files a notebook writes."""

import hashlib
import json
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from spinelib.errors import InputError
from spinelib.offline import SCENES_PER_PAGE, figure_div, notebook_html
from spinelib.report import Notebook, find_browser, page, run_index, written_together

REMOTE = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//", re.IGNORECASE)


def small_mesh() -> go.Figure:
    corners = np.array([[0, 0, 0], [30, 0, 0], [0, 30, 0], [0, 0, 30]], dtype=np.float32)
    mesh = go.Mesh3d(x=corners[:, 0], y=corners[:, 1], z=corners[:, 2], i=[0, 0, 0, 1], j=[1, 1, 2, 2], k=[2, 3, 3, 3])
    return go.Figure(mesh, layout={"width": 400, "height": 400, "title": {"text": "</script><b>L1"}})


def executed_notebook(path: Path, figures: int) -> Path:
    """An executed notebook with plotly outputs in the mimetype form."""
    spec = json.loads(small_mesh().to_json())
    cell = nbformat.v4.new_code_cell("secret_code = 1")
    cell.outputs = [
        nbformat.v4.new_output("display_data", data={"application/vnd.plotly.v1+json": spec}) for _ in range(figures)
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title"), cell]), path)
    return path


@pytest.fixture
def run_dir(tmp_path):
    """A small run folder with everything that the index shows."""
    book = Notebook(tmp_path, "04_evaluate_curves")
    frame = pd.DataFrame({"method": ["ours", "mean <curve>"], "error_mm": [1.23456789, 10.5]})
    book.table(frame, "headline", "3D error, mm.")
    book.table(pd.DataFrame({"level": [f"T{i}" for i in range(100)]}), "levels", "Levels.")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "headline.json").write_text(small_mesh().to_json())
    (tmp_path / "figures" / "captions.json").write_text('{"headline": {"caption": "A spine.", "notebook": "05"}}')
    book.headline("1.2 mm against 10.5 mm of the mean curve.")
    book.metrics({"error_mm": 1.2})
    record = {
        "run_id": "smoke",
        "profile": "smoke",
        "seed": 0,
        "git": {"commit": "abc", "dirty": True},
        "machine": {"device": "cpu", "cpu_count": 2, "memory_gb": 8, "packages": {"numpy": "2"}},
        "notebooks": {"04_evaluate_curves": {"status": "done", "seconds": 2.0, "peak_gb": 0.5}},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.json").write_text('{"seconds.total": 2.0, "peak_gb": 0.5}')
    return tmp_path


def test_notebook_page_has_live_figures_once_the_library_and_no_remote_parts(tmp_path):
    target = notebook_html(executed_notebook(tmp_path / "a.ipynb", figures=2), tmp_path / "a.html")
    text = target.read_text(encoding="utf8")
    assert text.count("Plotly.newPlot('figure-") == 2
    assert text.count("plotly.js v") == 1
    assert REMOTE.findall(text) == []
    assert "</script><b>L1" not in text, "text of a figure must not close the script element"
    assert "show code" in text
    assert "secret_code" in text


def test_notebook_page_without_figures_stays_small(tmp_path):
    target = notebook_html(executed_notebook(tmp_path / "a.ipynb", figures=0), tmp_path / "a.html")
    assert target.stat().st_size < 1_000_000
    assert REMOTE.findall(target.read_text(encoding="utf8")) == []


def test_scenes_beyond_the_browsers_limit_wait_for_a_click(tmp_path):
    source = executed_notebook(tmp_path / "a.ipynb", figures=SCENES_PER_PAGE + 2)
    text = notebook_html(source, tmp_path / "a.html").read_text(encoding="utf8")
    assert text.count("show this 3D figure</button>") == 2


def test_index_shows_result_table_scene_and_record(run_dir):
    text = run_index(run_dir).read_text(encoding="utf8")
    assert "1.2 mm against 10.5 mm of the mean curve." in text
    assert "<td>1.235</td>" in text
    assert "mean &lt;curve&gt;" in text
    assert "Plotly.newPlot('headline'" in text
    assert "Research software, not a medical device." in text
    assert "with uncommitted changes" in text
    assert "<td>T59</td>" in text and "<td>T60</td>" not in text
    assert REMOTE.findall(text) == []
    local = re.findall(r"(?:href|src)=\"([^\"#:]+)\"", text.split("<section", 1)[1])
    assert "tables/headline.csv" in local
    assert [name for name in local if not (run_dir / name).exists()] == []


def test_index_follows_the_notebooks_and_their_cells(tmp_path):
    def fill(notebook, names):
        book = Notebook(tmp_path, notebook)
        for name in names:
            book.table(pd.DataFrame({"a": [1]}), name, f"Table {name}.")
            book.figure(plt.figure(), name, f"Figure {name}.")

    fill("02_second", ["zebra", "ant"])
    fill("01_first", ["moth", "bee"])
    fill("02_second", ["wasp", "zebra", "ant"])  # run again, with one more in front
    (tmp_path / "run.json").write_text('{"run_id": "none", "machine": {"packages": {}}, "notebooks": {}}')
    text = run_index(tmp_path).read_text(encoding="utf8")
    order = ["moth", "bee", "wasp", "zebra", "ant"]
    for kind in ("Table", "Figure"):
        assert list(dict.fromkeys(re.findall(rf"{kind} (\w+)\.", text))) == order


def test_index_of_an_empty_run_still_opens(tmp_path):
    (tmp_path / "run.json").write_text('{"run_id": "none", "machine": {"packages": {}}, "notebooks": {}}')
    assert "run <code>none</code>" in run_index(tmp_path).read_text(encoding="utf8")


def test_page_embeds_pictures_and_escapes_text(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG")
    text = page("A <b>", [small_mesh()], {"Angles": {"cobb": "<12"}}, [picture], ["one & two"])
    assert "data:image/png;base64,iVBORw==" in text
    assert "A &lt;b&gt;" in text and "&lt;12" in text and "one &amp; two" in text
    assert text.count("plotly.js v") == 1
    assert REMOTE.findall(text) == []
    assert "plotly.js v" not in page("none")


@pytest.mark.browser
def test_3d_scene_is_drawn_in_a_browser_without_network(run_dir):
    browser = find_browser()
    if browser is None:
        pytest.skip("NO CHROMIUM: that the 3D figure of the report is really drawn was NOT tested")
    second = figure_div("second", json.loads(small_mesh().to_json()))
    (run_dir / "two.html").write_text(run_index(run_dir).read_text().replace("</body>", second + "</body>"))
    flags = "--headless --no-sandbox --disable-dev-shm-usage --enable-unsafe-swiftshader"
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    target = f"file://{run_dir / 'two.html'}"
    done = subprocess.run(
        [
            browser,
            *flags.split(),
            "--virtual-time-budget=20000",
            offline,
            f"--user-data-dir={run_dir / 'profile'}",
            "--dump-dom",
            target,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert body.count("<canvas") >= 2, "one WebGL canvas per 3D figure"
    assert "js-plotly-plot" in body
    assert "WebGL is not supported" not in body


def test_tables_are_byte_identical_and_keep_a_named_index(tmp_path):
    frame = pd.DataFrame({"error_mm": [1 / 3, 2.0]}, index=pd.Index(["T1", "L5"], name="level"))
    digests = set()
    for _ in range(2):
        Notebook(tmp_path, "04_x").table(frame, "errors", "Error, mm.")
        digests.add(hashlib.sha256((tmp_path / "tables/errors.csv").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert (tmp_path / "tables/errors.csv").read_text() == "level,error_mm\nT1,0.333333\nL5,2\n"


def test_matplotlib_figure_is_written_twice_the_same(tmp_path):
    digests = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [0, 1])
        book = Notebook(tmp_path, "04_x")
        shown = book.figure(figure, "line", "A line.")
        digests.append(
            [hashlib.sha256((tmp_path / f"figures/line.{s}").read_bytes()).hexdigest() for s in ("png", "pdf")]
        )
    assert digests[0] == digests[1]
    assert shown.data[:4] == b"\x89PNG"
    assert not plt.fignum_exists(figure.number)


def test_plotly_figure_without_browser_keeps_its_spec_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spinelib.report.find_browser", lambda: None)
    book = Notebook(tmp_path, "05_x")
    assert book.figure(small_mesh(), "headline", "A spine.") is not None
    assert json.loads((tmp_path / "figures/headline.json").read_text())["data"][0]["type"] == "mesh3d"
    assert "no Chromium" in capsys.readouterr().out
    assert list(book.finish()["file"]) == ["figures/headline.json"]


@pytest.mark.browser
def test_plotly_figure_becomes_a_png(tmp_path):
    if find_browser() is None:
        pytest.skip("NO CHROMIUM: writing PNG from plotly was NOT tested")
    book = Notebook(tmp_path, "05_x")
    book.figure(small_mesh(), "mesh", "A mesh.")
    pixels = plt.imread(tmp_path / "figures/mesh.png")
    assert pixels.shape[:2] == (800, 800)
    assert np.ptp(pixels[..., :3]) > 0.2, "not an empty picture"
    assert list(book.finish()["file"]) == ["figures/mesh.json", "figures/mesh.png"]


def test_closing_table_lists_every_file_with_its_hash(tmp_path):
    book = Notebook(tmp_path, "04_x")
    book.table(pd.DataFrame({"a": [1]}), "one", "One.")
    book.metrics({"n": np.int64(3)})
    book.metrics({"error_mm": np.float32(0.5)})
    (tmp_path / "spine.glb").write_bytes(b"mesh")
    book.wrote(tmp_path / "spine.glb")
    rows = book.finish().set_index("file")
    assert list(rows.index) == ["metrics/04_x.json", "spine.glb", "tables/one.csv"]
    assert rows.loc["spine.glb", "sha256"] == hashlib.sha256(b"mesh").hexdigest()
    assert json.loads((tmp_path / "metrics/04_x.json").read_text()) == {"n": 3, "error_mm": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", None, [1.0, 2.0], True])
def test_metrics_take_only_finite_numbers(tmp_path, value):
    with pytest.raises(InputError, match="expected one finite number"):
        Notebook(tmp_path, "04_x").metrics({"error_mm": value})


def test_names_and_captions_are_checked(tmp_path):
    book = Notebook(tmp_path, "04_x")
    for name in ("../up", "Big", "a b", ""):
        with pytest.raises(InputError, match="cannot name"):
            book.table(pd.DataFrame(), name, "A caption.")
    with pytest.raises(InputError, match="no caption"):
        book.table(pd.DataFrame(), "fine", " ")
    with pytest.raises(InputError, match="expected letters"):
        book.metrics({"a b": 1})


def test_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), written_together(tmp_path, ("a.txt", "b")) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
    with written_together(tmp_path, ("a.txt", "b")) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "b").mkdir()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]


def test_a_file_that_was_not_made_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"), written_together(tmp_path, ("never.txt",)):
        pass
