"""Locator and regressor in one file: from a DXA image to named curves in millimetres."""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from spinelib.errors import InputError
from spinelib.geometry import Projection
from spinelib.models.crop import Window, network_input, rows_to_curves
from spinelib.models.curves import CurveRegressor
from spinelib.models.locator import SpineLocator, locate
from spinelib.spine import CURVE_COLUMNS, Curves

SHIPPED_WEIGHTS = "curves_light.safetensors"


@dataclass
class CurvePredictor:
    """Everything needed to turn an image into curves.

    Attributes
    ----------
    locator : SpineLocator
    regressor : CurveRegressor
    card : dict
        What the weights are: command, data, seed, date, figures.
    """

    locator: SpineLocator
    regressor: CurveRegressor
    card: dict = field(default_factory=dict)

    def window(self, image: Projection) -> Window:
        """Return where the network looks; the image alone decides."""
        return locate(self.locator, image)

    @torch.no_grad()
    def predict(self, image: Projection, window: Window | None = None) -> Curves:
        """Return the T1-L5 curves of a coronal DXA (depth removed), 209 heights."""
        window = window or self.window(image)
        pixels = torch.from_numpy(network_input(image, window, self.regressor.config["pixels"]))[None]
        return rows_to_curves(self.regressor.eval()(pixels)[0].numpy(), window)

    def save(self, path, half: bool = True) -> None:
        """Write one safetensors file; the header names the columns, the networks and the card."""
        tensors = {f"locator.{k}": v for k, v in self.locator.state_dict().items()}
        tensors |= {f"regressor.{k}": v for k, v in self.regressor.state_dict().items()}
        tensors = {k: _stored(v, half) for k, v in tensors.items()}
        header = {
            "format": "spinelib-curves-1",
            "columns": json.dumps(CURVE_COLUMNS),
            "regressor": json.dumps(self.regressor.config),
            "card": json.dumps(self.card),
        }
        save_file(tensors, path, metadata=header)

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
        locator, regressor = SpineLocator(), CurveRegressor(**json.loads(header["regressor"]))
        try:
            locator.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("locator.")})
            regressor.load_state_dict({k[10:]: v for k, v in tensors.items() if k.startswith("regressor.")})
        except RuntimeError as error:
            message = f"the weights in {path} do not fit the network they name: {error}"
            raise InputError(message) from error
        return cls(locator.eval(), regressor.eval(), json.loads(header["card"]))


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


def _loaded(value):
    return value.float() if value.dtype == torch.float16 else value
