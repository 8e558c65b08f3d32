"""Trivial predictors that every table shows beside the networks. All see the same window as the networks do."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline

from spinelib.geometry import Projection
from spinelib.models.crop import Window, curves_to_rows, network_input, row_offsets_mm, rows_to_curves
from spinelib.spine import Curves

BASELINES = ("mean_curve", "height_scaled_mean", "ridge", "nearest")

_POOL = 8


class MeanCurve:
    """The mean of the training rows, at the window."""

    def fit(self, examples, windows) -> "MeanCurve":
        """Learn from examples (`dxa`, `curves`, `extended`) and their windows."""
        self.rows = _rows(examples, windows).mean(axis=0)
        return self

    def predict(self, image: Projection, window: Window) -> Curves:
        """Return T1-L5 curves."""
        return rows_to_curves(self.rows, window)


class HeightScaledMean:
    """The mean of the training rows, stretched in all directions by the estimated T1-L5 length."""

    def fit(self, examples, windows) -> "HeightScaledMean":
        """Learn the mean of all rows after scaling each subject to one length."""
        self.length = float(np.mean([w.upper_mm - w.lower_mm for w in windows]))
        scaled = [
            _stretch(rows, self.length / (w.upper_mm - w.lower_mm))
            for rows, w in zip(_rows(examples, windows), windows, strict=True)
        ]
        self.rows = np.mean(scaled, axis=0)
        return self

    def predict(self, image: Projection, window: Window) -> Curves:
        """Return T1-L5 curves."""
        return rows_to_curves(_stretch(self.rows, (window.upper_mm - window.lower_mm) / self.length), window)


class PixelRegressor:
    """Rows from the principal components of the pooled window, by ridge regression or by the nearest neighbour."""

    def __init__(self, kind: str):
        regressor = RidgeCV(alphas=np.logspace(-2, 4, 13)) if kind == "ridge" else KNeighborsRegressor(1)
        self.kind, self.regressor = kind, regressor

    def fit(self, examples, windows) -> "PixelRegressor":
        """Learn from examples and their windows; the ridge penalty is chosen by leave-one-out."""
        pixels = np.stack([_pooled(e.dxa, w) for e, w in zip(examples, windows, strict=True)])
        components = PCA(min(1000, len(pixels) - 1), random_state=0)
        self.model = make_pipeline(components, self.regressor)
        self.model.fit(pixels, _rows(examples, windows).reshape(len(pixels), -1))
        return self

    def predict(self, image: Projection, window: Window) -> Curves:
        """Return T1-L5 curves."""
        return rows_to_curves(self.model.predict(_pooled(image, window)[None]).reshape(-1, 6), window)


def fit_baselines(examples, windows) -> dict[str, MeanCurve | HeightScaledMean | PixelRegressor]:
    """Return all baselines, fitted, by name."""
    models = (MeanCurve(), HeightScaledMean(), PixelRegressor("ridge"), PixelRegressor("nearest"))
    return {name: model.fit(examples, windows) for name, model in zip(BASELINES, models, strict=True)}


def _rows(examples, windows):
    # Rows beyond the known column hold its end value: they lie outside T1-L5 and are not scored.
    return np.stack([curves_to_rows(_depthless(e), w)[0] for e, w in zip(examples, windows, strict=True)])


def _depthless(example):
    return example.extended.shifted(anterior_mm=-float(example.curves.sagittal_mm[1].mean()))


def _stretch(rows, factor):
    offsets = row_offsets_mm()
    columns = [np.interp(-offsets / factor, -offsets, column) for column in rows.T]
    return np.stack(columns, axis=1) * factor


def _pooled(image, window):
    pixels = network_input(image, window)
    c, h, w = pixels.shape
    return pixels.reshape(c, h // _POOL, _POOL, w // _POOL, _POOL).mean(axis=(2, 4)).ravel()
