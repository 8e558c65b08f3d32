"""`spinelib predict`: one image in, one 3D spine out, as table, spine file, meshes, picture and offline page."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from spinelib.curve_figures import prediction_panels
from spinelib.dress import dressed_spine
from spinelib.errors import InputError
from spinelib.figures import name_and_unit, spine_3d, use_house_style
from spinelib.geometry import Projection
from spinelib.imaging.dxa import dxa_from_ct
from spinelib.imaging.quality import require_torso
from spinelib.imaging.readers import read_projection, read_volume
from spinelib.models.predictor import CurvePredictor, Estimate
from spinelib.report import page, result_folder
from spinelib.spine import Curves, Spine

FILES = (
    "curves.csv",
    "tube.csv",
    "spine.npz",
    "spine.glb",
    "spine.stl",
    "overview.png",
    "prediction.json",
    "index.html",
)
_APEX_NOTE = "The apex level counts vertebrae: T1 = 1, T12 = 12, L1 = 13, L5 = 17 at the middle of each body."
_SIGNS = {"degrees": "°", "vertebrae": ""}


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
    estimate : Estimate
        The curves once more, with tube, intervals and novelty.
    """

    image: Projection
    curves: Curves
    spine: Spine
    quality: dict
    estimate: Estimate

    @property
    def warnings(self) -> list[str]:
        """What the user must know before trusting the result."""
        if not self.estimate.is_unusual:
            return []
        return [
            f"The image is unlike those of training (p = {self.estimate.novelty:.3f}): do not trust the tube and the "
            "intervals, and compare the curves with the image."
        ]


def predict_image(image: Projection, weights=None) -> Prediction:
    """Return the spine of a coronal DXA or DXA-like projection.

    Raises
    ------
    InputError
        If the image is plainly not an upright torso, or the weights cannot be used.
    """
    quality = require_torso(image)
    estimate = CurvePredictor.load(weights).estimate(image)
    return Prediction(image, estimate.curves, dressed_spine(estimate.curves), quality, estimate)


def predict_command(args) -> int:
    """Serve `spinelib predict`; returns the exit code."""
    out = result_folder(args.output, FILES, args.force)
    image, source = _read(args)
    result = predict_image(image, args.weights)
    write_prediction(result, out, source)
    for reason in result.quality["reasons"]:
        warnings.warn(f"input quality: {reason}", stacklevel=1)
    for reason in result.warnings:
        warnings.warn(reason, stacklevel=1)
    cobb = _with_interval("cobb_deg", *result.estimate.measures["cobb_deg"])
    print(f"{out / 'index.html'}: Cobb {cobb}, quality {result.quality['score']:.2f}")
    return 0


def write_prediction(result: Prediction, out: Path, source: str) -> None:
    """Write all FILES of a prediction into an existing folder.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    use_house_style()
    estimate = result.estimate
    tube_mm = estimate.tube_mm if np.isfinite(estimate.tube_mm).all() else None
    try:
        result.curves.save_csv(out / "curves.csv")
        tube = {"superior_mm": result.curves.heights_mm, "tube_mm": estimate.tube_mm}
        pd.DataFrame(tube).to_csv(out / "tube.csv", index=False, float_format="%.3f")
        result.spine.save(out / "spine.npz")
        result.spine.export_glb(out / "spine.glb")
        result.spine.export_stl(out / "spine.stl")
        picture = prediction_panels(result.image, result.curves, tube_mm, "Six curves from one image")
        picture.savefig(out / "overview.png")
        (out / "prediction.json").write_text(json.dumps(_record(result, source), indent=1))
        html = page(
            "Spine in 3D from one image",
            [spine_3d(result.spine)],
            tables={"Measures with 90% intervals": _measure_rows(estimate), "Certainty": _certainty_rows(estimate)},
            images=[out / "overview.png"],
            notes=[f"Source: {source}.", _APEX_NOTE, *result.quality["reasons"]],
            warnings=result.warnings,
        )
        (out / "index.html").write_text(html, encoding="utf-8")
    except OSError as error:
        message = f"cannot write to {out} ({error}). Free some space or choose another folder with -o."
        raise InputError(message) from error


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
    estimate = result.estimate
    return {
        "source": source,
        "quality": result.quality,
        "angles": {k: round(float(v), 3) for k, v in result.spine.angles.items() if np.isfinite(v)},
        "measures": {
            name: dict(zip(("value", "low", "high"), map(_number, triple), strict=True))
            for name, triple in estimate.measures.items()
        },
        "tube_mean_mm": _number(estimate.tube_mm.mean()),
        "novelty": {"p_value": _number(estimate.novelty), "is_unusual": estimate.is_unusual},
        "frame": "RAS+ mm; anterior_mm is relative to the mean of the sagittal centre curve",
        "notice": "Research software, not a medical device.",
    }


def _number(value):
    """Return a rounded number, or None for what is not known: JSON has no NaN."""
    return round(float(value), 3) if np.isfinite(value) else None


def _measure_rows(estimate):
    return {name_and_unit(name)[0]: _with_interval(name, *triple) for name, triple in estimate.measures.items()}


def _with_interval(name, value, low, high):
    """Return for example '12.3° (8.1° to 16.5°)', '-' in place of what is not known."""
    unit = name_and_unit(name)[1]
    value, low, high = (_shown(v, _SIGNS.get(unit, f" {unit}")) for v in (value, low, high))
    return f"{value} ({low} to {high})" if "-" not in (low, high) else f"{value} (-)"


def _certainty_rows(estimate):
    return {
        "mean radius of the 90% tube": _shown(estimate.tube_mm.mean(), " mm"),
        "share of ordinary images as unusual as this one": _shown(100 * estimate.novelty, "%"),
    }


def _shown(value, sign):
    return f"{value:.1f}{sign}" if np.isfinite(value) else "-"
