"""`spinelib predict`: one image in, one 3D spine out, as table, spine file, meshes, picture and offline page."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spinelib.dress import dressed_spine
from spinelib.errors import InputError
from spinelib.figures import curves_on_image, spine_3d, use_house_style
from spinelib.geometry import Projection
from spinelib.imaging.dxa import dxa_from_ct
from spinelib.imaging.quality import require_torso
from spinelib.imaging.readers import read_projection, read_volume
from spinelib.models.predictor import CurvePredictor
from spinelib.report import page
from spinelib.spine import Curves, Spine

FILES = ("curves.csv", "spine.npz", "spine.glb", "spine.stl", "overview.png", "prediction.json", "index.html")


@dataclass(frozen=True)
class Prediction:
    """Result for one image.

    Attributes
    ----------
    image : Projection
    curves : Curves
        T1-L5; sagittal values are relative to the mean of the centre curve.
    spine : Spine
    quality : dict
        'score' in 0..1 and 'reasons'.
    """

    image: Projection
    curves: Curves
    spine: Spine
    quality: dict


def predict_image(image: Projection, weights=None) -> Prediction:
    """Return the spine of a coronal DXA or DXA-like projection.

    Raises
    ------
    InputError
        If the image is plainly not an upright torso, or the weights cannot be used.
    """
    quality = require_torso(image)
    curves = CurvePredictor.load(weights).predict(image)
    return Prediction(image, curves, dressed_spine(curves), quality)


def predict_command(args) -> int:
    """Serve `spinelib predict`; returns the exit code."""
    out = _prepared_folder(args.output, args.force)
    image, source = _read(args)
    result = predict_image(image, args.weights)
    write_prediction(result, out, source)
    for reason in result.quality["reasons"]:
        warnings.warn(f"input quality: {reason}", stacklevel=1)
    angles = result.spine.angles
    print(f"{out / 'index.html'}: Cobb {angles['cobb_deg']:.1f} degrees, quality {result.quality['score']:.2f}")
    return 0


def write_prediction(result: Prediction, out: Path, source: str) -> None:
    """Write all FILES of a prediction into an existing folder.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    use_house_style()
    try:
        result.curves.save_csv(out / "curves.csv")
        result.spine.save(out / "spine.npz")
        result.spine.export_glb(out / "spine.glb")
        result.spine.export_stl(out / "spine.stl")
        picture = curves_on_image(result.image, {"predicted": result.curves}, "Six curves from one image")
        picture.savefig(out / "overview.png")
        (out / "prediction.json").write_text(json.dumps(_record(result, source), indent=1))
        html = page(
            "Spine in 3D from one image",
            [spine_3d(result.spine)],
            tables={"Angles": _angle_rows(result.spine)},
            images=[out / "overview.png"],
            notes=[f"Source: {source}.", *result.quality["reasons"]],
        )
        (out / "index.html").write_text(html, encoding="utf-8")
    except OSError as error:
        message = f"cannot write to {out} ({error}). Free some space or choose another folder with -o."
        raise InputError(message) from error


def _prepared_folder(output, force):
    out = Path(output)
    if out.exists() and not out.is_dir():
        message = f"{out} is a file; -o expects a folder."
        raise InputError(message)
    if out.is_dir() and any((out / name).exists() for name in FILES) and not force:
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


def _read(args):
    if args.ct and args.inputs:
        message = "give either a DXA image or --ct VOLUME, not both."
        raise InputError(message)
    if args.ct:
        return dxa_from_ct(read_volume(args.ct)), f"DXA-like projection of the CT {Path(args.ct).name}"
    if not args.inputs:
        message = "no input. Give a DXA image (DICOM, PNG, TIFF, NIfTI) or --ct VOLUME."
        raise InputError(message)
    path = args.inputs[0] if len(args.inputs) == 1 else args.inputs
    spacing = tuple(args.spacing) if args.spacing else None
    names = ", ".join(Path(p).name for p in args.inputs)
    return read_projection(path, spacing_mm=spacing), f"image {names}"


def _record(result, source):
    return {
        "source": source,
        "quality": result.quality,
        "angles": {k: round(float(v), 3) for k, v in result.spine.angles.items() if np.isfinite(v)},
        "frame": "RAS+ mm; anterior_mm is relative to the mean of the sagittal centre curve",
        "notice": "Research software, not a medical device.",
    }


def _angle_rows(spine):
    return {name.replace("_", " "): f"{value:.1f}" for name, value in spine.angles.items() if np.isfinite(value)}
