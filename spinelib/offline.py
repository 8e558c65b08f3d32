"""HTML that works without a network: plotly figures as live divs, executed notebooks as single pages."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinelib.record import write_text_atomic

SCENES_PER_PAGE = 8
"""3D scenes drawn at once on a page; others wait for a click, since beyond 16 a browser drops the oldest."""

_PLOTLY = "application/vnd.plotly.v1+json"


def notebook_html(source: Path, target: Path) -> Path:
    """Write an executed notebook as one HTML file that needs no network: code behind a switch, figures live.

    nbconvert leaves plotly figures out under the mimetype renderer and links three scripts from the web; here
    figures are put back with plotly.js inlined once, and the links are removed.
    """
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(source, as_version=4)
    _plotly_to_html(book)
    exporter = HTMLExporter(exclude_output_prompt=True, exclude_input_prompt=True)
    for name in (
        "require_js_url",
        "mathjax_url",
        "jquery_url",
        "mermaid_js_url",
        "mermaid_layout_elk_js_url",
    ):
        setattr(exporter, name, "")
    body, _ = exporter.from_notebook_node(book, resources={"metadata": {"name": source.stem}})
    body = re.sub(r'<script src="">\s*</script>', "", body)
    write_text_atomic(target, re.sub(r"(<body[^>]*>)", lambda found: found[1] + _CODE_SWITCH, body, count=1))
    return target


def _plotly_to_html(book: Any) -> None:
    """Replace every plotly output by a div and a script; the first one carries plotly.js."""
    count = scenes = 0
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _PLOTLY in data:
                spec = data.pop(_PLOTLY)
                scenes += _scene_count(spec)
                library = "" if count else plotly_script()
                data["text/html"] = library + figure_div(f"figure-{count}", spec, wait=scenes > SCENES_PER_PAGE)
                count += 1


def _scene_count(spec: Mapping[str, Any]) -> int:
    return len({trace.get("scene", "scene") for trace in spec["data"] if _is_3d(trace)})


def _is_3d(trace: Mapping[str, Any]) -> bool:
    return trace.get("type", "").endswith("3d") or trace.get("type") in (
        "surface",
        "cone",
        "volume",
        "isosurface",
    )


def plotly_script() -> str:
    """Return plotly.js (4.8 MB) as a script element; once per page, before the first `figure_div`."""
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def figure_div(name: str, spec: Mapping[str, Any], wait: bool = False) -> str:
    """Return a plotly figure as HTML.

    Parameters
    ----------
    name : str
        Id of the div, unique on its page.
    spec : mapping
        'data' and 'layout' of the figure as JSON content.
    wait : bool
        Draw only when the reader asks for it.
    """
    # "<" as \u003c: text in a figure can then not close the script element.
    text = json.dumps({key: spec[key] for key in ("data", "layout")}).replace("<", "\\u003c")
    options = "{responsive:true,displaylogo:false}"
    draw = f"(function(){{var s={text};Plotly.newPlot('{name}',s.data,s.layout,{options});}})"
    if wait:
        button = f"<button onclick='this.remove();window[\"{name}\"]()'>show this 3D figure</button>"
        return f"<div id='{name}'></div>{button}<script>window['{name}']={draw};</script>"
    return f"<div id='{name}'></div><script>{draw}();</script>"


_CODE_SWITCH = """
<style>body:not(.show-code) .jp-CodeCell .jp-Cell-inputWrapper{display:none}
.code-switch{position:fixed;top:.5em;right:1em;z-index:9;font:14px
system-ui,sans-serif;background:#fff;padding:.2em .5em}
main,.jp-Notebook{max-width:64em;margin:auto}</style> <label class="code-switch"><input type="checkbox"
onchange="document.body.classList.toggle('show-code')"> show code</label>
"""
