"""`spinelib predict --ap --lat --centroids` as a user meets it, with a network that answers a block vertebra."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh
from matplotlib.figure import Figure
from PIL import Image
from plotly.graph_objects import Figure as Figure3D
from test_readers import write_dicom

from spinelib import radiographs
from spinelib.cli import main
from spinelib.geometry import PlanarGrid, Projection
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.imaging.point_pairs import PointPairs
from spinelib.imaging.radiograph_pairs import CUBE, CUBE_MM, make_pair
from spinelib.imaging.readers import read_volume, write_projection
from spinelib.levels import LEVEL_OF_LABEL, T1_TO_L5, VERSE_LABELS
from spinelib.models.biplanar import save_variants
from spinelib.models.biplanar_data import BiplanarDataset
from spinelib.models.lifting import LiftingNet
from spinelib.radiographs import FILES, quality_flags
from spinelib.spine import Spine

SHAPE, PIXEL_MM = (420, 260), 1.2
SEEN = ("T11", "T12", "L1")
CENTRES_MM = np.array([[4.0, -12.0, 60.0], [0.0, -4.0, 25.0], [-3.0, 6.0, -12.0]])
BODY_MM = (36.0, 30.0, 24.0)


class Blocks(torch.nn.Module):
    """Answers a body with a spinous process where the cube has its body centre; keeps what it was shown."""

    annotation = "c2v"

    def __init__(self):
        super().__init__()
        self.seen, self.levels, self.probability = [], list(SEEN), 0.9

    def predict(self, batch):
        self.seen.append(batch)
        offset = CUBE_MM * (np.moveaxis(np.indices((CUBE,) * 3), 0, -1) - (CUBE - 1) / 2) - [0, 12.0, 0]
        body = np.all(np.abs(offset) < np.divide(BODY_MM, 2), axis=-1)
        process = np.all(np.abs(offset + [0, 32, 4]) < [4, 20, 6], axis=-1)
        n = len(batch["frontal"])
        places = [T1_TO_L5.index(level) for level in self.levels[:n]]
        return torch.from_numpy(np.stack([self.probability * (body | process)] * n)).float(), torch.tensor(places)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    blocks = Blocks()
    monkeypatch.setattr(radiographs, "load_variant", lambda name, path=None: blocks)
    monkeypatch.setattr(radiographs, "read_card", lambda path=None: {"variant": "ours"})
    return blocks


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out what takes most of the time."""
    monkeypatch.setattr(radiographs, "radiograph_pair", lambda *_, **__: Figure())
    monkeypatch.setattr(radiographs, "vertebrae_3d", lambda *_, **__: Figure3D())


@pytest.fixture
def case(tmp_path):
    """Arguments of the command: two PNG of noise, and points of three vertebrae."""
    rng = np.random.default_rng(0)
    for name in ("ap", "lat"):
        Image.fromarray(rng.integers(0, 255, SHAPE).astype(np.uint8)).save(tmp_path / f"{name}.png")
    write_points(tmp_path / "points.csv")
    return {
        "--ap": tmp_path / "ap.png",
        "--lat": tmp_path / "lat.png",
        "--centroids": tmp_path / "points.csv",
        "-o": tmp_path / "out",
    }


def beams():
    return [make((0, 0, 0), SHAPE, PIXEL_MM) for make in (ConeBeam.frontal, ConeBeam.lateral)]


def write_points(path, levels=SEEN, change=lambda points: points):
    rows = [
        (level, view, *change(beam.project(CENTRES_MM))[i])
        for view, beam in zip(("ap", "lat"), beams(), strict=True)
        for i, level in enumerate(levels)
    ]
    pd.DataFrame(rows, columns=["level", "view", "row", "col"]).to_csv(path, index=False)


def run(case, *more, spacing=True):
    words = [str(word) for pair in case.items() for word in pair] + [str(word) for word in more]
    return main(["predict", *words, *(["--spacing", str(PIXEL_MM), str(PIXEL_MM)] if spacing else [])])


def refused(case, capsys, *more, spacing=True):
    code = run(case, *more, spacing=spacing)
    said = capsys.readouterr().err
    assert code == 2, said
    assert not case["-o"].exists() or not any(case["-o"].iterdir())
    return said


def test_weights_that_need_masks_are_refused(case, capsys, network):
    network.annotation = "v2v"
    assert "trained with the annotation 'v2v', expected one of: 'c2v', 'n2v'. Fix:" in refused(case, capsys)


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_every_promised_file_says_the_same(case, capsys):
    assert run(case) == 0
    assert "3 vertebrae, T11 to L1" in capsys.readouterr().out
    out = case["-o"]
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    table = pd.read_csv(out / "vertebrae.csv")
    assert table["level"].tolist() == table["network_level"].tolist() == list(SEEN)
    np.testing.assert_allclose(table[["right_mm", "anterior_mm", "superior_mm"]], CENTRES_MM, atol=1e-3)
    assert table["ray_gap_mm"].max() < 1e-3
    spine = Spine.load(out / "spine.npz")
    assert spine.levels == SEEN
    assert sorted(path.stem for path in (out / "meshes").iterdir()) == sorted(SEEN)
    scene = trimesh.load(out / "spine.glb")
    for level, mesh, centre in zip(SEEN, spine.meshes, CENTRES_MM, strict=True):
        assert level in scene.geometry
        assert mesh.bounds[:, 0] == pytest.approx(centre[0] + [-18, 18], abs=1)
        assert mesh.bounds[1, 1] == pytest.approx(centre[1] + 15, abs=1)
        assert trimesh.load(out / "meshes" / f"{level}.stl").volume == pytest.approx(mesh.volume, rel=1e-3)
    labels = read_volume(out / "mask.nii.gz")
    for level, centre in zip(SEEN, CENTRES_MM, strict=True):
        voxel = np.rint(np.linalg.inv(labels.affine) @ [*centre, 1])[:3].astype(int)
        assert labels.values[tuple(voxel)] == VERSE_LABELS[level]
    record = strict_json(out / "prediction.json")
    assert [row["level"] for row in record["vertebrae"]] == list(SEEN)
    assert record["flags"] == []
    assert record["weights"] == {"variant": "ours"}
    assert ConeBeam.from_dict(record["beams"]["lateral"]).shape == SHAPE
    angles = pd.read_csv(out / "angles.csv").set_index("angle")["value"]
    assert angles["vertebral_cobb_deg"] == pytest.approx(record["angles"]["vertebral_cobb_deg"], abs=1e-3)
    page = (out / "index.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page


@pytest.mark.parametrize("annotation", ["c2v", "n2v"])
def test_the_network_sees_what_it_was_trained_on(network, annotation):
    """A subject of the training data, written as whole radiographs and read back, gives the items of training."""
    from drawn_pairs import drawn_ct

    subject = make_pair(drawn_ct())
    images, whole = [], []
    for beam, strip in zip(subject.beams, subject.radiographs, strict=True):
        corner = np.rint(beam.project(beam.principal_mm) - 80).astype(int)  # 161 pixels around the central ray
        image = np.zeros((161, 161), np.float32)
        first, last = np.maximum(-corner, 0), np.minimum(np.array(strip.shape) - corner, 161)
        image[first[0] : last[0], first[1] : last[1]] = strip[
            first[0] + corner[0] : last[0] + corner[0], first[1] + corner[1] : last[1] + corner[1]
        ]
        images.append(image)
        whole.append(beam.cropped(corner + 80, (161, 161)))
    points = np.stack([beam.project(subject.bodies_mm) for beam in whole])
    levels = tuple(LEVEL_OF_LABEL[label] for label in subject.labels)
    network.levels = list(levels)
    network.annotation = annotation
    radiographs.predict_pair(images, whole, PointPairs(levels, points), network)
    (batch,) = network.seen
    expected = [BiplanarDataset([subject], annotation)[i] for i in range(2)]
    for name in ("cube_to_frontal", "cube_to_lateral"):
        torch.testing.assert_close(batch[name], torch.stack([item[name] for item in expected]), atol=2e-3, rtol=0)
    for name in ("frontal", "lateral"):
        image, marks = (batch[name] - torch.stack([item[name] for item in expected])).abs().unbind(1)
        assert image.mean() < 0.06 and marks.max() < 0.02


def test_finer_images_show_the_same_patch():
    grid = PlanarGrid.centred("coronal", (200, 200), (1.8, 1.8), (0, 0))
    rows, cols = np.indices((200, 200))
    smooth = 200 + 50 * np.sin(rows / 15) + 50 * np.cos(cols / 20)
    fine_rows, fine_cols = (np.indices((600, 600)) + 0.5) / 3 - 0.5
    fine = 200 + 50 * np.sin(fine_rows / 15) + 50 * np.cos(fine_cols / 20)
    plain, beam = radiographs._on_patch_pixels(smooth, ConeBeam.frontal((0, 0, 0), grid.shape, 1.8))
    thinned, finer = radiographs._on_patch_pixels(fine, ConeBeam.frontal((0, 0, 0), (600, 600), 0.6))
    assert beam.shape == finer.shape == (200, 200)
    np.testing.assert_allclose(finer.corner_mm, beam.corner_mm, atol=1e-9)
    np.testing.assert_allclose(thinned, plain, atol=0.1)


@pytest.mark.usefixtures("no_pictures")
def test_dicom_and_nifti_are_read_alike(case, tmp_path):
    values = np.asarray(Image.open(case["--ap"]))
    write_dicom(tmp_path / "ap.dcm", values.astype(np.uint16), PixelSpacing=[PIXEL_MM, PIXEL_MM])
    grid = PlanarGrid.centred("sagittal", SHAPE, (PIXEL_MM, PIXEL_MM), (0, 0))
    lateral = np.asarray(Image.open(case["--lat"]), np.float32)
    write_projection(tmp_path / "lat.nii.gz", Projection(("bone",), lateral[None], grid))
    mixed = case | {"--ap": tmp_path / "ap.dcm", "--lat": tmp_path / "lat.nii.gz", "-o": tmp_path / "other"}
    for some, spacing in ((case, True), (mixed, False)):
        assert run(some, spacing=spacing) == 0
    plain, other = (pd.read_csv(c["-o"] / "vertebrae.csv") for c in (case, mixed))
    pd.testing.assert_frame_equal(plain, other, rtol=0.01, atol=0.1)


@pytest.mark.usefixtures("no_pictures")
def test_points_off_their_rays_and_other_levels_are_flagged(case, network, tmp_path):
    network.levels = ["T12", "L1", "L2"]
    points = pd.read_csv(case["--centroids"])
    points.loc[0, "row"] += 9
    points.to_csv(tmp_path / "moved.csv", index=False)
    with pytest.warns(UserWarning) as told:
        assert run(case | {"--centroids": tmp_path / "moved.csv"}) == 0
    said = " ".join(str(warning.message) for warning in told)
    assert "T11: its rays pass 9 mm apart" in said
    assert "the network takes 3 of 3 vertebrae for another level, by +1: check the numbering" in said
    assert 'role="alert">T11: its rays' in (case["-o"] / "index.html").read_text()


def test_doubts_of_a_table():
    table = pd.DataFrame(
        {
            "level": ["T12", "L1", "L2"],
            "superior_mm": [40.0, 50.0, 10.0],
            "ray_gap_mm": [0.0, 7.2, 1.0],
            "network_level": ["T12", "L1", "L2"],
            "volume_cm3": [30.0, np.nan, 40.0],
        }
    )
    contacts = pd.DataFrame({"upper": ["T12"], "lower": ["L2"], "overlap_mm3": [2100.0], "gap_mm": [0.0]})
    assert quality_flags(table, contacts) == [
        "L1: its rays pass 7 mm apart",
        "levels are out of order: T12 below L1",
        "nothing was found at L1",
        "T12 and L2 overlap by 2.1 cm³, given to the more probable one",
    ]
    plain = table.assign(superior_mm=[70.0, 50.0, 10.0], ray_gap_mm=1.0, volume_cm3=30.0)
    assert quality_flags(plain, contacts.assign(overlap_mm3=900.0)) == []


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore")
def test_a_point_near_the_border_is_flagged(case, tmp_path):
    write_points(tmp_path / "high.csv", change=lambda points: points - [130, 0])
    with pytest.warns(UserWarning, match="the frontal image ends too near to T11$"):
        assert run(case | {"--centroids": tmp_path / "high.csv"}) == 0


def test_what_does_not_fit_is_refused_and_nothing_written(case, capsys, tmp_path):
    assert "does not say how large its pixels are" in refused(case, capsys, spacing=False)
    for option in ("--ap", "--lat", "--centroids"):
        less = {name: value for name, value in case.items() if name != option}
        assert f"{option} missing" in refused(less, capsys)
    assert "another input" in refused(case, capsys, "--segment", case["--ap"])
    assert "another input" in refused(case, capsys, case["--ap"])
    assert "no file" in refused(case | {"--lat": tmp_path / "absent.png"}, capsys)
    (tmp_path / "lone.csv").write_text("level,view,row,col\nT12,ap,100,100\n")
    assert "T12 (no lat)" in refused(case | {"--centroids": tmp_path / "lone.csv"}, capsys)
    write_points(tmp_path / "far.csv", change=lambda points: points + [0, 200])
    assert "points outside the images of 420 x 260" in refused(case | {"--centroids": tmp_path / "far.csv"}, capsys)
    small = tmp_path / "small.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (380, 260)).astype(np.uint8)).save(small)
    assert "images of one height" in refused(case | {"--lat": small}, capsys)
    assert "square pixels" in refused(case, capsys, "--spacing", "1.2", "0.9", spacing=False)
    assert "source_object_mm <= source_detector_mm" in refused(case, capsys, "--source-detector", 900)


def test_two_people_are_refused(case, capsys, tmp_path):
    points = pd.read_csv(case["--centroids"])
    points.loc[points["view"] == "lat", "row"] += 60
    points.to_csv(tmp_path / "other.csv", index=False)
    said = refused(case | {"--centroids": tmp_path / "other.csv"}, capsys)
    assert "the two views do not fit together" in said
    assert "--source-detector" in said


def test_a_lateral_image_is_not_frontal(case, capsys, tmp_path):
    grid = PlanarGrid.centred("sagittal", SHAPE, (PIXEL_MM, PIXEL_MM), (0, 0))
    image = np.asarray(Image.open(case["--ap"]), np.float32)
    write_projection(tmp_path / "lateral.nii.gz", Projection(("bone",), image[None], grid))
    said = refused(case | {"--ap": tmp_path / "lateral.nii.gz"}, capsys, spacing=False)
    assert "swap the files" in said or "does not say" in said


def test_an_empty_answer_is_refused(case, capsys, network):
    network.probability = 0.3
    assert "the network finds no vertebra" in refused(case, capsys)


@pytest.mark.usefixtures("no_pictures")
def test_earlier_results_are_replaced_only_when_asked(case, capsys):
    (case["-o"] / "meshes").mkdir(parents=True)
    (case["-o"] / "meshes" / "old.stl").write_text("old")
    assert run(case) == 2
    assert "--force" in capsys.readouterr().err
    assert run(case, "--force") == 0
    assert not (case["-o"] / "meshes" / "old.stl").exists()


def test_networks_come_from_the_file_of_weights(case, capsys, tmp_path, monkeypatch):
    monkeypatch.undo()
    blind = LiftingNet()
    blind.coarse.bias.data.fill_(-100.0)  # takes all for background, whatever its random weights
    save_variants({"ours": blind}, tmp_path / "ours.safetensors", {"note": "untrained"})
    said = refused(case, capsys, "--weights", tmp_path / "ours.safetensors")
    assert "the network finds no vertebra" in said
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert "not a readable safetensors file" in refused(case, capsys, "--weights", tmp_path / "broken.safetensors")
