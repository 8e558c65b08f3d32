"""Locator and regressor in one file: from a DXA image to named curves in millimetres."""

import json
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file

from spinelib.clinical import UNSIGNED, clinical_measures
from spinelib.errors import InputError
from spinelib.geometry import Projection
from spinelib.models.crop import Window, edges_apart, network_input, rows_to_curves
from spinelib.models.curves import CurveRegressor
from spinelib.models.kernel import KernelRegressor
from spinelib.models.locator import SpineLocator, locate
from spinelib.models.windows import WindowSet
from spinelib.novelty import Novelty, window_features
from spinelib.record import written_atomically
from spinelib.spine import CURVE_COLUMNS, K_DEFAULT, Curves
from spinelib.uncertainty import Calibration

SHIPPED_WEIGHTS = "curves.safetensors"
FORMAT = "spinelib-curves-3"


@dataclass(frozen=True)
class Estimate:
    """Curves with what is known of their error.

    Attributes
    ----------
    curves : Curves
        T1-L5, depth removed, 209 heights.
    spread_mm : ndarray, shape (209,)
        Typical 3D error of the centre line at each height, for this image; 1 where the regressor states none.
    tube_mm : ndarray, shape (209,)
        Radius around the centre line that holds the true one in 90% of cases at each height; NaN if not calibrated.
    measures : dict of str to (value, low, high)
        Clinical measures with 90% intervals; NaN bounds if not calibrated.
    novelty : float
        Share of ordinary images that look at least as unusual as this one (a p-value); NaN if not known.
    is_unusual : bool
        The image is unlike those of training: do not trust tube and intervals.
    """

    curves: Curves
    spread_mm: np.ndarray
    tube_mm: np.ndarray
    measures: dict[str, tuple[float, float, float]]
    novelty: float
    is_unusual: bool


@dataclass
class CurvePredictor:
    """Everything needed to turn an image into curves.

    Attributes
    ----------
    locator : SpineLocator
    regressor : CurveRegressor or KernelRegressor
    card : dict
        What the weights are: command, data, seed, date, figures.
    calibration : Calibration or None
    novelty : Novelty or None
    """

    locator: SpineLocator
    regressor: CurveRegressor | KernelRegressor
    card: dict = field(default_factory=dict)
    calibration: Calibration | None = None
    novelty: Novelty | None = None

    def window(self, image: Projection) -> Window:
        """Return where the network looks; the image alone decides."""
        return locate(self.locator, image)

    def predict(self, image: Projection, window: Window | None = None) -> Curves:
        """Return the T1-L5 curves of a coronal DXA (depth removed), 209 heights."""
        return self.with_spread(image, window)[0]

    @torch.no_grad()
    def with_spread(self, image: Projection, window: Window | None = None) -> tuple[Curves, np.ndarray]:
        """Return the curves and their spread (209,), see `Estimate`."""
        window = window or self.window(image)
        if isinstance(self.regressor, CurveRegressor):
            pixels = torch.from_numpy(network_input(image, window, self.regressor.config["pixels"]))[None]
            return rows_to_curves(self.regressor.eval()(pixels)[0].numpy(), window), np.ones(K_DEFAULT)
        heights, rows, spread = (t[0].double().numpy() for t in self.regressor(WindowSet.of([image], [window])))
        rows[:, :3] += window.right_mm
        curves = Curves.from_array(heights + window.superior_mm, edges_apart(rows))
        return curves.depth_removed(), spread

    def estimate(self, image: Projection, window: Window | None = None) -> Estimate:
        """Return curves, tube, intervals and the novelty of an image."""
        window = window or self.window(image)
        curves, spread = self.with_spread(image, window)
        values = clinical_measures(curves)
        bounds = {name: (np.nan, np.nan) for name in values}
        tube = np.full_like(spread, np.nan)
        if self.calibration is not None:
            tube, bounds = self.calibration.tube_mm(spread), bounds | self.calibration.intervals(values)
        p_value, is_unusual = np.nan, False
        if self.novelty is not None:
            features = window_features(network_input(image, window))
            p_value, is_unusual = float(self.novelty.p_value(features)), bool(self.novelty.is_unusual(features))
        lowest = {name: 0.0 if name in UNSIGNED else -np.inf for name in values}
        measures = {
            name: (value, float(np.maximum(bounds[name][0], lowest[name])), float(bounds[name][1]))
            for name, value in values.items()
        }
        return Estimate(curves, spread, tube, measures, p_value, is_unusual)

    def save(self, path, half: bool = True) -> None:
        """Write one safetensors file; the header names the columns, the networks and the card.

        Parameters
        ----------
        half : bool
            Store the networks' numbers in 16 bits; those of a kernel regressor keep theirs.
        """
        tensors = {f"locator.{k}": _stored(v, half) for k, v in self.locator.state_dict().items()}
        is_kernel = isinstance(self.regressor, KernelRegressor)
        own = self.regressor.state() if is_kernel else self.regressor.state_dict()
        tensors |= {f"regressor.{k}": _stored(v, half and not is_kernel) for k, v in own.items()}
        header = {
            "format": FORMAT,
            "columns": json.dumps(CURVE_COLUMNS),
            "kind": "kernel" if is_kernel else "network",
            "regressor": json.dumps(self.regressor.config),
            "card": json.dumps(self.card),
        }
        if self.calibration is not None:
            arrays, names = self.calibration.to_tensors()
            header["calibration"] = json.dumps(names)
            tensors |= {f"calibration.{k}": torch.from_numpy(v) for k, v in arrays.items()}
        if self.novelty is not None:
            tensors |= {
                f"novelty.{k}": _stored(torch.from_numpy(v), half) for k, v in self.novelty.to_tensors().items()
            }
        written_atomically(path, [".safetensors"], partial(save_file, tensors, metadata=header))

    @classmethod
    def load(cls, path=None) -> "CurvePredictor":
        """Read weights; without a path, the ones shipped with the package.

        Raises
        ------
        InputError
            If the file is missing, corrupt, not made by this package, or its columns are not named.
        """
        path = Path(path) if path else shipped_weights()
        if not path.is_file():
            message = f"no weights at {path}. Make them with: spinelib run 03 --profile laptop"
            raise InputError(message)
        header, tensors = _read(path)
        if tuple(json.loads(header.get("columns", "[]"))) != CURVE_COLUMNS:
            message = f"the columns of {path} are not named as {CURVE_COLUMNS}; such weights are refused."
            raise InputError(message)
        if header.get("format") != FORMAT:
            message = f"{path} has the format {header.get('format')!r}, expected {FORMAT!r}. Train the weights again."
            raise InputError(message)
        parts = {name: _part(tensors, name) for name in ("locator", "regressor", "calibration", "novelty")}
        locator, config = SpineLocator(), json.loads(header["regressor"])
        try:
            locator.load_state_dict(parts["locator"])
            if header["kind"] == "kernel":
                regressor = KernelRegressor.from_state(parts["regressor"], **config)
            else:
                regressor = CurveRegressor(**config)
                regressor.load_state_dict(parts["regressor"])
                regressor.eval()
        except (RuntimeError, KeyError) as error:
            message = f"the weights in {path} do not fit the network they name: {error}"
            raise InputError(message) from error
        calibration = novelty = None
        if parts["calibration"]:
            arrays = {k: v.numpy() for k, v in parts["calibration"].items()}
            calibration = Calibration.from_tensors(arrays, json.loads(header["calibration"]))
        if parts["novelty"]:
            novelty = Novelty.from_tensors({k: v.numpy() for k, v in parts["novelty"].items()})
        return cls(locator.eval(), regressor, json.loads(header["card"]), calibration, novelty)


def shipped_weights() -> Path:
    """Return the path of the weights that come with the package."""
    return Path(str(files("spinelib") / "weights" / SHIPPED_WEIGHTS))


def _read(path):
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return header, {k: _loaded(file.get_tensor(k)) for k in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        message = f"{path} is not a readable safetensors file ({error}). Fetch or train the weights again."
        raise InputError(message) from error


def _stored(value, half):
    value = value.detach().cpu()
    return (value.half() if half and value.dtype == torch.float32 else value).contiguous()


def _part(tensors, name):
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def _loaded(value):
    return value.float() if value.dtype == torch.float16 else value
