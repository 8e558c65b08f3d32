"""CT cohorts: what is listed and why not, quarantine, synthetic scans; the download of VerSe from a local server."""

import http.server
import io
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from spinelib.ct_cohort import SPLITS, list_series, load_ct_cohort, load_series, render_ct_cohort
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.verse import LabelledCT, write_labelled_ct
from spinelib.imaging.verse_archives import fetch_verse
from spinelib.phantom.scan import sample_scan
from spinelib.record import file_sha256


def toy_scan(seed, spacing_mm=2.0, key=""):
    """Two boxes whose place depends on the seed; every fifth seed fails."""
    if seed % 5 == 4:
        raise RuntimeError("the fifth one fails")
    grid = VolumeGrid.from_bounds((0, 0, 0), (30, 30, 60), spacing_mm)
    labels = np.zeros(grid.shape, np.uint8)
    labels[4:12, 4 : 10 + seed % 3, 4:10], labels[4:12, 4:10, 16:24] = 21, 20
    ct = np.random.default_rng(seed).normal(0, 20, grid.shape).astype(np.float32) + 400 * (labels > 0)
    centroids = {21: np.array([15.0, 13.0, 13.0]), 20: np.array([15.0, 13.0, 39.0])}
    return LabelledCT(key or f"toy{seed}", Volume(ct, grid.affine), Volume(labels, grid.affine), centroids)


def write(root, key, split="training", seed=0):
    return write_labelled_ct(root, toy_scan(seed, key=key), split, "PIR")


@pytest.fixture
def release(tmp_path):
    write(tmp_path, "verse500_dir-ax", "training", 1)
    write(tmp_path, "verse500_dir-sag", "training", 2)
    write(tmp_path, "gl017", "validation", 3)
    write(tmp_path, "verse401_split-verse253", "test", 5)
    return tmp_path


def reasons(root):
    table = list_series(root)
    return {row.key: row.reason for row in table.itertuples()}


def test_every_series_is_a_row(release):
    table = list_series(release)
    assert (table["reason"] == "").all()
    assert table[["key", "subject", "split"]].to_numpy().tolist() == [
        ["verse500_dir-ax", "verse500", "training"],
        ["verse500_dir-sag", "verse500", "training"],
        ["gl017", "gl017", "validation"],
        ["verse401_split-verse253", "verse401", "test"],
    ]
    scan = load_series(table.iloc[0])
    assert scan.key == "verse500_dir-ax"
    assert scan.centroids_mm[21] == pytest.approx([15, 13, 13])
    inside = list_series(release / "dataset-01training")
    assert inside["split"].tolist() == ["training"] * 2


@pytest.mark.parametrize(
    ("stem", "ending", "convention", "place"),
    [
        ("verse012", "_ctd.json", "miccai2019", [47.5, 17.5, 15.5]),
        ("verse512_CT-sag", "_iso-ctd.json", "miccai2020", [17.5, 47.5, 15.5]),
    ],
)
def test_miccai_names_are_known(tmp_path, stem, ending, convention, place):
    ct, mask, _ = write(tmp_path / "made", "x")
    folder = tmp_path / "cohort" / "verse19training"
    folder.mkdir(parents=True)
    shutil.move(ct, folder / f"{stem}.nii.gz")
    shutil.move(mask, folder / f"{stem}_seg.nii.gz")
    fields = ", ".join(f'"{axis}": {value}' for axis, value in zip("XYZ", place, strict=True))
    (folder / f"{stem}{ending}").write_text(f'[{{"label": 21, {fields}}}]')
    (row,) = list_series(tmp_path / "cohort").itertuples()
    assert (row.key, row.subject, row.split, row.reason) == (stem, stem.split("_")[0], "training", "")
    assert row.convention == convention
    assert load_series(row).centroids_mm[21] == pytest.approx([15, 13, 13], abs=1)


def test_what_cannot_be_used_is_listed_with_its_reason(release):
    paths = {name: write(release, name, "training") for name in ("a1", "a2", "a3", "a4")}
    paths["a1"][0].unlink()
    paths["a2"][1].unlink()
    shutil.copy(paths["a3"][0], paths["a3"][0].with_name("sub-a3_ct.nii"))
    paths["a4"][2].unlink()  # points are optional
    shutil.copy(paths["a4"][0], release / "dataset-01training" / "scan.nii.gz")
    shutil.copytree(release / "dataset-03test", release / "elsewhere")
    found = reasons(release)
    assert found["a1"] == "no ct beside sub-a1_seg-vert_msk.nii.gz"
    assert found["a2"].startswith("no mask beside")
    assert found["a3"].startswith("more than one file for ct")
    assert found["a4"] == ""
    assert found[""] == "unknown kind of file name"
    assert list_series(release)["reason"].str.contains("no folder above it is named after a split").sum() == 1
    assert found["gl017"] == ""
    with pytest.raises(InputError, match="no ct beside"):
        load_series(list_series(release).query("key == 'a1'").iloc[0])


def test_a_subject_stays_in_its_latest_split(tmp_path):
    write(tmp_path / "verse19training", "verse004", "training")
    write(tmp_path / "verse20test", "verse004_dir-ax", "test")
    write(tmp_path / "verse19training", "verse005", "training")
    write(tmp_path / "verse20training", "verse005", "training")
    table = list_series(tmp_path).set_index(["dataset", "key"])["reason"]
    assert table["verse19training/dataset-01training", "verse004"] == "its subject is also in the test split"
    assert table["verse20test/dataset-03test", "verse004_dir-ax"] == ""
    assert "another folder" in table["verse19training/dataset-01training", "verse005"]
    assert table["verse20training/dataset-01training", "verse005"] == ""


def test_a_bad_series_is_quarantined_and_the_rest_goes_on(release, tmp_path):
    mask = write(release, "bad", "training")[1]
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), mask)
    write(release, "alone", "training")[0].unlink()
    scans = list(load_ct_cohort(release, ("training",), quarantine=tmp_path / "q.csv"))
    assert [scan.key for scan in scans] == ["verse500_dir-ax", "verse500_dir-sag"]
    lost = pd.read_csv(tmp_path / "q.csv").set_index("key")["reason"]
    assert set(lost.index) == {"bad", "alone"}
    assert "does not fit" in lost["bad"]
    assert len(list(load_ct_cohort(release, limit=1))) == 3


def test_a_cohort_of_nothing_is_refused(tmp_path, release):
    with pytest.raises(InputError, match="no folder"):
        list_series(tmp_path / "absent")
    with pytest.raises(InputError, match="unknown splits"):
        load_ct_cohort(release, ("train",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"render_ct_cohort"):
        load_ct_cohort(tmp_path / "empty")
    write(tmp_path / "half", "a1")[0].unlink()
    with pytest.raises(InputError, match="1 failed.*no ct beside"):
        next(load_ct_cohort(tmp_path / "half"))


# --- synthetic scans ---


def test_rendered_scans_load_and_grow(tmp_path):
    few = render_ct_cohort(tmp_path, {"training": 2, "test": 1}, 3, 2.0, n_jobs=1, sample=toy_scan)
    assert few["split"].tolist() == ["training", "training", "test"]
    stamps = {path: path.stat().st_mtime_ns for path in few["ct_path"].map(Path)}
    more = render_ct_cohort(tmp_path, {"training": 6, "validation": 2}, 3, 2.0, n_jobs=1, sample=toy_scan)
    assert [p.stat().st_mtime_ns for p in stamps] == list(stamps.values())
    assert len(more) == 7
    lost = pd.read_csv(tmp_path / "quarantine.csv")
    assert lost[["key", "reason"]].to_numpy().tolist() == [["phantom-3000004", "RuntimeError: the fifth one fails"]]
    table = list_series(tmp_path)
    assert table["subject"].is_unique
    assert set(table["split"]) == set(SPLITS)
    codes = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in table["ct_path"]}
    assert len(codes) > 3
    for scan in load_ct_cohort(tmp_path):
        truth = toy_scan(int(scan.key.removeprefix("phantom-")), 2.0)
        assert np.array_equal(scan.labels.values, truth.labels.values)
        assert np.abs(scan.ct.values - truth.ct.values).max() <= 0.5
        assert scan.centroids_mm[20] == pytest.approx(truth.centroids_mm[20], abs=1e-4)


def test_a_broken_off_scan_is_made_anew(tmp_path):
    make = partial(render_ct_cohort, tmp_path, {"training": 1}, 0, 2.0, n_jobs=1, sample=toy_scan)
    row = make().iloc[0]
    Path(row.centroids_path).unlink()  # it is written last
    Path(row.ct_path).write_bytes(b"half")
    assert load_series(make().iloc[0]).key == "phantom-000000"


def test_the_phantom_itself_goes_through_the_files(tmp_path):
    (row,) = render_ct_cohort(tmp_path, {"test": 1}, spacing_mm=4.0, n_jobs=1).itertuples()
    scan, truth = load_series(row), sample_scan(500_000, 4.0)
    whole = set(truth.centroids_mm) - truth.cut
    assert set(scan.centroids_mm) == whole == set(np.unique(scan.labels.values)) - {0}
    assert np.abs(scan.ct.values - truth.ct.values).max() <= 0.5
    assert np.array_equal(
        scan.labels.values, np.where(np.isin(truth.labels.values, list(whole)), truth.labels.values, 0)
    )


@pytest.mark.parametrize(
    ("counts", "spacing_mm", "words"),
    [({"train": 3}, 2.0, "some of training"), ({}, 2.0, "given {}"), ({"test": -1}, 2.0, "-1")]
    + [({"test": 1}, bad, "one number or three") for bad in ("fine", (1, 2), 0)],
)
def test_bad_requests_are_refused(tmp_path, counts, spacing_mm, words):
    with pytest.raises(InputError, match=words):
        render_ct_cohort(tmp_path / "new", counts, spacing_mm=spacing_mm, sample=toy_scan)
    assert not (tmp_path / "new").exists()


def test_a_folder_holds_one_seed_and_spacing(tmp_path):
    render_ct_cohort(tmp_path, {"test": 1}, 0, 2.0, n_jobs=1, sample=toy_scan)
    with pytest.raises(InputError, match="another folder"):
        render_ct_cohort(tmp_path, {"test": 1}, 1, 2.0, n_jobs=1, sample=toy_scan)
    with pytest.raises(InputError, match="none of 1 scans"):
        render_ct_cohort(tmp_path / "b", {"test": 1}, 4, n_jobs=1, sample=lambda seed, spacing_mm: toy_scan(4))


# --- download ---


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {name: bytes}; names in `broken` break off half way."""

    def __init__(self):
        self.files, self.broken, self.served = {}, set(), []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/data"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/data/")
        content = self.server.files.get(name)
        self.server.served.append(name)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.server.broken else content or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    with Server() as running:
        thread = threading.Thread(target=partial(running.serve_forever, poll_interval=0.02))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(server, tmp_path):
    """The zip of one small series, served as VerSe 2020's validation part."""
    write(tmp_path / "made", "verse500", "validation")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for path in sorted((tmp_path / "made").rglob("*.*")):
            if path.is_file():
                packed.write(path, path.relative_to(tmp_path / "made").as_posix())
    server.files["dataset-verse20validation.zip"] = content.getvalue()
    return "dataset-verse20validation.zip"


def fetch(root, server, part="verse20validation", hashes=None):
    return fetch_verse(root, [part], hashes, mirror=server.url)


def test_a_part_is_downloaded_recorded_and_unpacked_once(server, archive, tmp_path):
    root = fetch(tmp_path / "verse", server)
    (row,) = list_series(root).itertuples()
    assert (row.key, row.split, row.dataset) == ("verse500", "validation", "verse20validation/dataset-02validation")
    assert load_series(row).labels.values.max() == 21
    digest = file_sha256(root / "archives" / archive)
    assert (root / "verse.sha256").read_text() == f"{digest}  {archive}\n"
    shutil.rmtree(root / "archives")
    fetch(root, server)
    assert server.served == [archive]


def test_a_file_that_differs_from_its_hash_is_refused(server, archive, tmp_path):
    fetch(tmp_path / "first", server)
    server.files[archive] = server.files[archive][:-1] + b"x"
    kept = tmp_path / "first" / "verse.sha256"
    with pytest.raises(InputError, match="expected the SHA-256 in .*verse.sha256"):
        fetch(tmp_path / "second", server, hashes=kept)
    assert list((tmp_path / "second").rglob("*.*")) == []
    kept.write_text("what is this\n")
    with pytest.raises(InputError, match="as sha256sum writes"):
        fetch(tmp_path / "third", server, hashes=kept)


def test_a_broken_off_download_leaves_nothing_and_starts_anew(server, archive, tmp_path):
    server.broken.add(archive)
    with pytest.raises(InputError, match="cannot download.*check the connection"):
        fetch(tmp_path / "verse", server)
    assert [p for p in (tmp_path / "verse").rglob("*") if p.is_file()] == []
    server.broken.clear()
    assert len(list_series(fetch(tmp_path / "verse", server))) == 1


def test_a_damaged_archive_is_refused_and_not_recorded(server, archive, tmp_path):
    content = bytearray(server.files[archive])
    content[200:220] = bytes(20)
    server.files[archive] = bytes(content)
    with pytest.raises(InputError, match="cannot unpack.*delete it and fetch again"):
        fetch(tmp_path / "verse", server)
    left = [p.name for p in (tmp_path / "verse").rglob("*")]
    assert left == ["archives", archive]
    assert not (tmp_path / "verse" / "verse.sha256").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_names_that_lead_out_are_refused(server, archive, tmp_path, name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("dataset-02validation/fine.txt", "fine")
        packed.writestr(name, "evil")
    server.files[archive] = content.getvalue()
    with pytest.raises(InputError, match="outside its folder"):
        fetch(tmp_path / "verse", server)
    assert list(tmp_path.rglob("*evil*")) == list(tmp_path.rglob("fine.txt")) == []


def test_links_are_refused(server, archive, tmp_path):
    content, link = io.BytesIO(), zipfile.ZipInfo("dataset-02validation/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr(link, "/etc/passwd")
    server.files[archive] = content.getvalue()
    with pytest.raises(InputError, match="outside its folder"):
        fetch(tmp_path / "verse", server)


def test_unknown_parts_and_absent_files_are_named(server, tmp_path):
    with pytest.raises(InputError, match="unknown parts.*verse19training"):
        fetch(tmp_path, server, "verse21")
    with pytest.raises(InputError, match="cannot download.*404"):
        fetch(tmp_path, server, "verse19test")
