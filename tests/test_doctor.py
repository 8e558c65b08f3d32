"""`spinelib doctor` and `spinelib check`: what they find, and that they say how to mend it."""

import argparse
import hashlib
import json

import pytest

from spinelib import doctor
from spinelib.check import scan_before_sharing
from spinelib.cli import main
from spinelib.errors import InputError
from spinelib.models.predictor import SHIPPED_WEIGHTS


def test_findings_show_mark_and_fix():
    assert str(doctor.Finding("disk", True, "9 GB free", "unused")) == "[OK]   disk        9 GB free"
    failed = str(doctor.Finding("disk", False, "1 GB free", "make clean"))
    assert failed.startswith("[FAIL] disk")
    assert "-> make clean" in failed
    assert str(doctor.Finding("chromium", False, "absent", needed=False)).startswith("[NOTE]")


def test_this_environment_is_healthy(capsys):
    assert doctor.doctor_command(argparse.Namespace(data_dir=None)) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("python", "packages", "torch", "kernel", "data", "disk"):
        assert any(line.startswith(f"[OK]   {name}") for line in lines), name


def test_a_missing_need_makes_the_exit_code_1_and_a_missing_extra_does_not(monkeypatch):
    absent = doctor.Finding("chromium", False, "absent", "install it", needed=False)
    monkeypatch.setattr(doctor, "examine", lambda _: iter([absent]))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda _: iter([doctor.Finding("disk", False, "full")]))
    assert main(["doctor"]) == 1


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13")

    monkeypatch.setattr(doctor, "torch_device", broken)
    found = [finding for finding in doctor.examine() if "libcudart" in finding.detail]
    assert len(found) == 1
    assert not found[0].ok


def test_a_file_in_place_of_the_data_folder_is_found(tmp_path):
    (tmp_path / "data").write_text("")
    assert not doctor.writable("data", tmp_path / "data" / "deeper").ok
    assert doctor.writable("data", tmp_path / "new" / "deeper").ok


def test_weights_are_compared_with_their_card(tmp_path):
    weights, card = tmp_path / SHIPPED_WEIGHTS, (tmp_path / SHIPPED_WEIGHTS).with_suffix(".json")
    assert not doctor.weights(tmp_path).needed
    weights.write_bytes(b"numbers")
    assert not doctor.weights(tmp_path).ok, "weights without a card"
    card.write_text(json.dumps({"sha256": hashlib.sha256(b"numbers").hexdigest()}))
    assert doctor.weights(tmp_path).ok
    weights.write_bytes(b"changed")
    assert not doctor.weights(tmp_path).ok


def test_other_weights_do_not_stand_in_for_the_shipped_ones(tmp_path):
    (tmp_path / "old.safetensors").write_bytes(b"numbers")
    (tmp_path / "old.json").write_text(json.dumps({"sha256": hashlib.sha256(b"numbers").hexdigest()}))
    found = doctor.weights(tmp_path)
    assert not found.ok
    assert SHIPPED_WEIGHTS in found.detail


# Made-up identifiers: seven digits, the name of the field, instance and array index.
PARTICIPANT = "_".join(["1234567", "20158", "2", "0"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (f"{PARTICIPANT}.png", b"", "participant number"),
        ("table.csv", b"eid,age\n1,2\n", "column 'eid'"),
        ("table.tsv", b"age\tDate of birth\n1\t2\n", "column 'Date of birth'"),
        ("record.json", b'{"scan": [{"PatientName": "x"}]}', "key 'PatientName'"),
        ("notes.md", f"see {PARTICIPANT}".encode(), "participant number"),
        ("run.json", b'{"path": "/home/somebody/data"}', "home folder"),
        ("page.html", rb'<a href="C:\Users\somebody\x">', "home folder"),
        ("scan.dcm", b"", "DICOM"),
        ("scan", bytes(128) + b"DICM" + bytes(8), "DICOM"),
        (
            "nb.ipynb",
            b'{"cells": [{"cell_type": "code", "outputs": [{}], "source": []}]}',
            "notebook outputs",
        ),
    ],
)
def test_scan_finds_what_must_not_be_shared(tmp_path, name, content, reason, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(content)
    leaks = scan_before_sharing([tmp_path])
    assert [reason in leak.reason for leak in leaks] == [True]
    assert main(["check", "--before-sharing", str(tmp_path)]) == 2
    assert name in capsys.readouterr().out


def test_scan_looks_into_archives(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bulk.zip", "w") as archive:
        archive.writestr(f"{PARTICIPANT}/1.2.3.dcm", b"")
    assert "the archive holds" in scan_before_sharing([tmp_path])[0].reason


def test_scan_passes_what_is_harmless(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("subject_key,superior_mm,name\nabc,1.0,T1\n")
    (tmp_path / "run.json").write_text('{"run_dir": "reports/laptop", "sha256": "1234567890123"}')
    (tmp_path / "nb.ipynb").write_text('{"cells": [{"cell_type": "code", "outputs": [], "source": []}]}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "short.bin").write_bytes(b"x")
    assert scan_before_sharing([tmp_path]) == []
    assert main(["check", "--before-sharing", str(tmp_path)]) == 0


def test_a_path_that_is_not_there_is_an_error(tmp_path, capsys):
    with pytest.raises(InputError, match="nothing at"):
        scan_before_sharing([tmp_path / "absent"])
    assert main(["check"]) == 2
    assert "nothing to check" in capsys.readouterr().err
