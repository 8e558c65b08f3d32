"""The README tells the truth: its tables are the committed ones, its commands exist, its links lead somewhere."""

import re
import shlex

import pytest
from readme_tables import ROOT, TABLES, filled

from spinelib.cli import main

TEXT = (ROOT / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_committed(name):
    assert TABLES[name].is_file()


def test_numbers_are_those_of_the_committed_tables():
    assert filled(TEXT) == TEXT, "run: python tests/readme_tables.py"


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(r'<img src="([^"]+)"', TEXT)
    assert len(targets) > 8
    assert [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"spinelib (\w+)", TEXT)) & {"run", "predict", "doctor", "check"})
)
def test_commands_have_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "Example" in capsys.readouterr().out


def test_predict_lines_parse():
    from spinelib.cli import _parser

    lines = [
        re.sub(r"\s+#.*", "", line) for line in re.findall(r"^    (spinelib predict .*)", TEXT, flags=re.MULTILINE)
    ]
    assert len(lines) == 6
    parsed = [_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert parsed[1].spacing == [3.0, 2.4]
    assert parsed[2].ct == "abdomen.nii.gz"
    assert (parsed[4].ap, parsed[4].lat, parsed[4].centroids) == ("a.png", "l.png", "points.csv")
    assert (parsed[5].register, parsed[5].labels) == (["ct.nii.gz", "mr.nii.gz"], "ct_mask.nii.gz")
