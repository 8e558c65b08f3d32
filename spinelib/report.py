"""What a reader sees of a run: files that notebooks write, and HTML pages that work without a network.

`Notebook` is the pen of a notebook (figures, tables, metrics with their captions); `run_index` makes the
page of a run folder, `page` that of a single result.
"""

import base64
import json
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from spinelib.errors import InputError
from spinelib.offline import figure_div, plotly_script
from spinelib.record import (
    PACKAGE_DIR,
    file_sha256,
    read_json,
    run_folder,
    write_json_atomic,
    write_text_atomic,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_FLOATS = "%.6g"


class Notebook:
    """Writes a notebook's figures, tables and metrics into its run folder and lists them at the end.

    Parameters
    ----------
    run_dir : str or Path
        Run folder; a relative one is taken from the project root.
    name : str
        Name of the notebook, such as '04_evaluate_curves'.

    Examples
    --------
    >>> page = Notebook(run_dir, "04_evaluate_curves")      # doctest: +SKIP
    >>> page.table(errors, "curve_errors", "Mean 3D error per method, mm, with 95 % CI.")  # doctest: +SKIP
    """

    def __init__(self, run_dir: str | Path, name: str) -> None:
        self.run_dir = run_folder(run_dir)
        self.name = name
        self._written: dict[str, Path] = {}
        self._metrics: dict[str, float] = {}

    def figure(self, figure: Any, name: str, caption: str) -> Any:
        """Write a figure and return what the notebook should show.

        A matplotlib figure becomes ``figures/<name>.png`` and ``.pdf``; a plotly figure
        ``figures/<name>.json`` (its interactive spec) and, where a Chromium is installed, ``.png``. The
        name 'headline' puts a plotly figure on top of the run's page.

        Raises
        ------
        InputError
            If `name` is not lower-case letters, digits and '_', or `caption` is empty.
        """
        _check_name(name, caption)
        stem = self._folder("figures") / name
        is_plotly = hasattr(figure, "to_plotly_json")
        files = _write_plotly(figure, stem) if is_plotly else _write_matplotlib(figure, stem)
        self._note("figures", name, caption, files)
        return figure if is_plotly else _picture(files[0])

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> pd.DataFrame:
        """Write ``tables/<name>.csv`` and return `frame`; six significant digits make reruns byte-identical.

        The name 'headline' puts the table on top of the run's page. A named index becomes the first columns.

        Raises
        ------
        InputError
            If `name` is not lower-case letters, digits and '_', or `caption` is empty.
        """
        _check_name(name, caption)
        path = self._folder("tables") / f"{name}.csv"
        named = any(level is not None for level in frame.index.names)
        text = frame.to_csv(index=named, float_format=_FLOATS, lineterminator="\n")
        write_text_atomic(path, text)
        self._note("tables", name, caption, [path])
        return frame

    def metrics(self, values: Mapping[str, float]) -> None:
        """Add numbers to ``metrics/<notebook>.json``; `spinelib run` merges them into ``metrics.json``.

        Parameters
        ----------
        values : mapping of str to float
            Flat, finite; the unit stands in the name, such as 'curves_3d_error_mm'.

        Raises
        ------
        InputError
            If a name is not a flat word or a value is not one finite number.
        """
        for name, value in values.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                message = f"metric {name!r}: expected letters, digits, '_', '.', '-', as in 'curves_error_mm'."
                raise InputError(message)
            self._metrics[name] = _finite(name, value)
        path = self._folder("metrics") / f"{self.name}.json"
        write_json_atomic(path, self._metrics)
        self._written[f"metrics/{path.name}"] = path

    def headline(self, sentence: str) -> None:
        """Write the sentence that opens the run's page: the result with its unit and comparison."""
        write_text_atomic(self._folder(".") / "headline.txt", sentence.strip() + "\n")

    def wrote(self, path: str | Path) -> Path:
        """Note a file in the run folder that something else wrote (a mesh, weights) for the closing table."""
        path = Path(path).resolve()
        self._written[path.relative_to(self.run_dir.resolve()).as_posix()] = path
        return path

    def finish(self) -> pd.DataFrame:
        """Return the closing table: every file written, its size in kB and its SHA-256."""
        _stop_drawing()
        rows = [
            {"file": name, "kB": round(path.stat().st_size / 1e3, 1), "sha256": file_sha256(path)}
            for name, path in sorted(self._written.items())
        ]
        return pd.DataFrame(rows, columns=["file", "kB", "sha256"])

    def _folder(self, kind: str) -> Path:
        folder = self.run_dir / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _note(self, kind: str, name: str, caption: str, files: list[Path]) -> None:
        self._written |= {f"{kind}/{path.name}": path for path in files}
        captions = self._folder(kind) / "captions.json"
        entry = {"caption": caption, "notebook": self.name, "files": [path.name for path in files]}
        others = {key: note for key, note in read_json(captions, {}).items() if key != name}
        write_json_atomic(captions, others | {name: entry})  # in the order of the notebook, also when it is run again


def find_browser() -> str | None:
    """Return the path of a Chromium or Chrome that can draw plotly figures, or None."""
    from choreographer.browsers.chromium import Chromium

    return Chromium.find_browser(skip_local=False)


def run_index(run_dir: Path) -> Path:
    """Write ``index.html`` of a run: result, 3D spine, notebooks, pictures, tables and run record."""
    record = read_json(run_dir / "run.json", {})
    tables = _tables(run_dir)
    text = _render(
        "index.html.j2",
        record=record,
        result=_text(run_dir / "headline.txt"),
        headline=tables.pop("headline", None),
        tables=tables,
        scene=_headline_scene(run_dir / "figures" / "headline.json"),
        pictures=_pictures(run_dir),
        notebooks=_notebook_rows(run_dir, record),
        metrics=read_json(run_dir / "metrics.json", {}),
        captions=read_json(run_dir / "figures" / "captions.json", {}),
    )
    write_text_atomic(run_dir / "index.html", text)
    return run_dir / "index.html"


def page(
    title: str,
    figures: Sequence[Any] = (),
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    images: Sequence[str | Path] = (),
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Return one self-contained HTML page: warnings, notes, live plotly figures, tables and embedded pictures.

    Parameters
    ----------
    title : str
    figures : sequence of plotly figures
    tables : mapping of str to mapping
        {caption: {row name: value}}.
    images : sequence of paths
        PNG files; their bytes go into the page.
    notes, warnings : sequence of str
        One paragraph each; warnings stand out.
    """
    specs = [json.loads(figure.to_json()) for figure in figures]
    divs = "".join(figure_div(f"figure-{i}", spec) for i, spec in enumerate(specs))
    return _render(
        "page.html.j2",
        title=title,
        notes=notes,
        warnings=warnings,
        scenes=plotly_script() + divs if specs else "",
        tables=tables or {},
        images=[base64.b64encode(Path(path).read_bytes()).decode() for path in images],
    )


def result_folder(output: str | Path, files: Sequence[str], force: bool = False) -> Path:
    """Return the folder for the result of a command, made if need be.

    Raises
    ------
    InputError
        If it cannot be written, or holds any of `files` and `force` is not set.
    """
    out = Path(output)
    if out.exists() and not out.is_dir():
        message = f"{out} is a file; -o expects a folder."
        raise InputError(message)
    if out.is_dir() and any((out / name).exists() for name in files) and not force:
        message = f"{out} already holds a prediction. Choose another folder or add --force to replace it."
        raise InputError(message)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        message = f"cannot write to {out} ({error}). Choose another folder with -o."
        raise InputError(message) from error
    return out


@contextmanager
def written_together(out: Path, files: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write `files` into; they move to `out` together once all are made, and replace what is there.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".writing_") as folder:
            yield Path(folder)
            for name in files:
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                (Path(folder) / name).replace(out / name)
    except OSError as error:
        message = f"cannot write to {out} ({error}). Free some space or choose another folder with -o."
        raise InputError(message) from error


def _render(template: str, **content: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(PACKAGE_DIR / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**content)


def _check_name(name: str, caption: str) -> None:
    if not _NAME.fullmatch(name):
        message = f"{name!r} cannot name a figure or table. Expected lower-case letters, digits and '_'."
        raise InputError(message)
    if not caption.strip():
        message = f"{name!r} has no caption. Expected what is shown, unit, number of subjects, weights."
        raise InputError(message)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
        message = f"metric {name!r}: expected one finite number, got {value!r}."
        raise InputError(message)
    return int(value) if float(value).is_integer() and not isinstance(value, float) else float(value)


def _write_matplotlib(figure: Any, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    # Dates and version strings in the files would make reruns differ.
    figure.savefig(png, dpi=150, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(pdf, bbox_inches="tight", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(figure)
    return [png, pdf]


def _write_plotly(figure: Any, stem: Path) -> list[Path]:
    spec = stem.with_suffix(".json")
    write_text_atomic(spec, figure.to_json())
    if find_browser() is None:
        print(f"no Chromium here: {spec.name} is written, a PNG of it is not (spinelib doctor tells how)")
        return [spec]
    png = stem.with_suffix(".png")
    _start_drawing()
    width, height = figure.layout.width or 700, figure.layout.height or 500
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The kopts argument is ignored")  # true of every server
        png.write_bytes(figure.to_image("png", width=width, height=height, scale=2))
    return [spec, png]


def _start_drawing() -> None:
    """Keep one browser for all figures of a notebook: each start costs five seconds."""
    import atexit

    import kaleido

    kaleido.start_sync_server(silence_warnings=True)
    atexit.register(_stop_drawing)


def _stop_drawing() -> None:
    import kaleido

    kaleido.stop_sync_server(silence_warnings=True)


def _picture(path: Path) -> Any:
    from IPython.display import Image

    return Image(data=path.read_bytes(), format="png")


def _headline_scene(path: Path) -> str:
    spec = read_json(path)
    return plotly_script() + figure_div("headline", spec) if spec else ""


def _tables(run_dir: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: path for path in sorted((run_dir / "tables").glob("*.csv"))}
    notes = {name: note for name, note in _in_order(run_dir / "tables") if name in found}
    return {name: _table(found[name], notes.get(name, {})) for name in notes | found}


def _in_order(folder: Path) -> list[tuple[str, Any]]:
    """Return names and notes of figures or tables, notebook after notebook, each in the order of its cells."""
    captions = read_json(folder / "captions.json", {})
    return sorted(captions.items(), key=lambda item: item[1]["notebook"])


def _table(path: Path, note: Mapping[str, Any], most_rows: int = 60) -> dict[str, Any]:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, nrows=most_rows + 1)
    rows = [[_short(text) for text in row] for row in frame.itertuples(index=False)]
    return {
        "file": f"tables/{path.name}",
        "caption": note.get("caption", path.stem),
        "notebook": note.get("notebook", ""),
        "columns": list(frame.columns),
        "rows": rows[:most_rows],
        "cut": len(rows) > most_rows,
    }


def _short(text: str) -> str:
    """Return at most four significant digits of a number with a decimal point; other text unchanged."""
    return f"{float(text):.4g}" if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text) else text


def _pictures(run_dir: Path) -> list[dict[str, str]]:
    found = []
    for name, note in _in_order(run_dir / "figures"):
        png = f"figures/{name}.png"
        on_top = name == "headline" and (run_dir / "figures" / "headline.json").is_file()
        if (run_dir / png).is_file() and not on_top:
            found.append({"file": png, "caption": note["caption"], "notebook": note["notebook"]})
    return found


def _notebook_rows(run_dir: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = sorted(record.get("notebooks", {}).items())
    page = "notebooks/{}.html"
    return [
        {"name": name, "page": page.format(name) if (run_dir / page.format(name)).is_file() else "", **entry}
        for name, entry in entries
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8").strip() if path.is_file() else ""
