"""Whether an image is like those that a network was trained and calibrated on.

Measured with `window_features` on 84 synthetic people (512 others to learn from, 236 more to calibrate with): area
under the ROC curve against the same images unspoilt, and share called unusual (of the unspoilt: 1 of 84).

============================================  =====  =======
spoilt by                                      area  unusual
============================================  =====  =======
upside down, inverted, constant, white noise  1.000    100 %
upper half only, 60 % of the width only       1.000    100 %
bone image in both channels                   1.000    100 %
rotated by 10 degrees                         1.000    100 %
rotated by 5 degrees                          0.998    100 %
blurred, 6 mm standard deviation              0.990     81 %
blurred, 3 mm standard deviation              0.939      4 %
pixels stated 20 % too small                  0.989     70 %
pixels stated 20 % too large                  0.945     39 %
pixels stated 10 % too large                  0.760      6 %
============================================  =====  =======

People differ in size, so a wrong pixel size shows only when it is gross. On the 6 mm blur the distance off the main
directions alone does as well (0.99), the distance along them alone (0.88) and the nearest neighbour (0.70) worse, and
without sharpness among the features none sees it (0.61 to 0.71).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA

from spinelib.errors import InputError

UNUSUAL_P = 0.01
"""Images with a smaller p-value are called unusual: one ordinary image in a hundred."""

COMPONENTS = 128
"""Directions in which `Novelty` knows the variance of ordinary images; the others share one variance."""

_BLOCKS = 14
_TRUNK = slice(3, 11)
_FEWEST_IMAGES = 8
_LEAST_VARIANCE = 1e-9  # of the rest, relative to the first direction's: float32 knows no less


@dataclass(frozen=True)
class Novelty:
    """How far an image's features lie from those of the training images, and how often ordinary images lie so far.

    Ordinary features are taken as Gaussian: their own variance along the `COMPONENTS` main directions, one variance
    for all others (probabilistic PCA, Tipping & Bishop 1999). The distance is Mahalanobis', per feature: an
    ordinary image has about 1. What counts as far is not taken from the Gaussian but from calibration subjects.

    Attributes
    ----------
    mean : ndarray, shape (d,)
    components : ndarray, shape (k, d)
        Orthonormal.
    deviations : ndarray, shape (k,)
        Standard deviation along each component.
    rest_deviation : float
        Standard deviation in every other direction.
    distances : ndarray, shape (m,)
        Of the calibration subjects, rising.
    """

    mean: np.ndarray
    components: np.ndarray
    deviations: np.ndarray
    rest_deviation: float
    distances: np.ndarray

    @classmethod
    def fit(cls, training: Float[np.ndarray, "n d"], calibration: Float[np.ndarray, "m d"]) -> "Novelty":
        """Learn what is ordinary from `training` and how far ordinary goes from other subjects, `calibration`.

        At most n / 4 components are kept. With fewer than 99 calibration subjects a warning tells the share of
        ordinary images that will be called unusual, 1 / (m + 1).
        """
        training, calibration = np.asarray(training, float), np.asarray(calibration, float)
        if training.ndim != 2 or calibration.ndim != 2 or len(training) < _FEWEST_IMAGES or len(calibration) < 1:
            message = (
                f"expected training features (n, d) of at least {_FEWEST_IMAGES} images and calibration features "
                f"(m, d), given {training.shape} and {calibration.shape}."
            )
            raise InputError(message)
        _check_finite(training)
        count = min(COMPONENTS, len(training) // 4, training.shape[1] // 2)
        with np.errstate(invalid="ignore"):  # constant features are refused below
            pca = PCA(count, svd_solver="covariance_eigh").fit(training)
        if not pca.noise_variance_ > _LEAST_VARIANCE * pca.explained_variance_[0]:
            message = "the training features do not vary enough to tell what is ordinary. Give more, other images."
            raise InputError(message)
        deviations, rest = np.sqrt(pca.explained_variance_), float(np.sqrt(pca.noise_variance_))
        model = cls(pca.mean_, pca.components_, deviations, rest, np.zeros(0))
        found = replace(model, distances=np.sort(model.distance(calibration)))
        if found.false_alarm_share > UNUSUAL_P:
            warnings.warn(
                f"{len(calibration)} calibration images cannot tell the farthest 1 %: 1 ordinary image in "
                f"{len(calibration) + 1} will be called unusual. Give 99 or more.",
                stacklevel=2,
            )
        return found

    @property
    def false_alarm_share(self) -> float:
        """Largest share of ordinary images that `is_unusual` flags."""
        return max(UNUSUAL_P, 1 / (len(self.distances) + 1))

    def distance(self, features: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n"]:
        """Return the root mean square of the standardised features; about 1 for ordinary images."""
        features = np.asarray(features, float)
        if features.shape[-1:] != self.mean.shape:
            message = f"expected {len(self.mean)} features an image, given shape {features.shape}."
            raise InputError(message)
        _check_finite(features)
        offset = features - self.mean
        along = offset @ self.components.T
        rest = offset - along @ self.components
        squares = np.sum((along / self.deviations) ** 2, axis=-1) + np.sum((rest / self.rest_deviation) ** 2, axis=-1)
        return np.sqrt(squares / len(self.mean))

    def p_value(self, features: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n"]:
        """Return the share of ordinary images at least as far out (conformal: 1 / (m + 1) is the least)."""
        count = len(self.distances)
        nearer = np.searchsorted(self.distances, self.distance(features), side="left")
        return (1 + count - nearer) / (count + 1)

    def is_unusual(self, features: Float[np.ndarray, "*n d"]) -> np.ndarray:
        """Return whether the p-value is at most `false_alarm_share`."""
        return self.p_value(features) <= self.false_alarm_share

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Return float32 arrays for a safetensors file (float16 does as well); `from_tensors` reads them."""
        return {name: np.atleast_1d(np.asarray(value, np.float32)) for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray]) -> "Novelty":
        """Return the model that `to_tensors` stored.

        Raises
        ------
        InputError
            If something is missing.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in arrays]
        if missing:
            message = f"these are not the arrays of Novelty.to_tensors; missing: {', '.join(missing)}."
            raise InputError(message)
        values = {name: np.asarray(arrays[name], float) for name in cls.__dataclass_fields__}
        return cls(**values | {"rest_deviation": float(values["rest_deviation"].item())})


def window_features(window: Float[np.ndarray, "c h w"]) -> Float[np.ndarray, " d"]:
    """Return features for `Novelty`: brightness and sharpness of the trunk.

    Means over 14 x 14 blocks of each channel and of the length of its gradient; the middle 8 columns of blocks,
    320 mm of the network's window, as the arms beside them may lie anywhere. Two channels give 448 features.
    """
    window = np.asarray(window, float)
    if window.ndim != 3 or window.shape[1] % _BLOCKS or window.shape[2] % _BLOCKS:
        message = f"expected a window (channels, height, width), multiples of {_BLOCKS}, given {window.shape}."
        raise InputError(message)
    steepness = np.hypot(*np.gradient(window, axis=(1, 2)))
    channels, height, width = window.shape
    blocks = np.stack([window, steepness]).reshape(2, channels, _BLOCKS, height // _BLOCKS, _BLOCKS, width // _BLOCKS)
    return blocks.mean(axis=(3, 5))[..., _TRUNK].ravel()


def _check_finite(features):
    if not np.isfinite(features).all():
        message = "features must be finite, given NaN or infinite values."
        raise InputError(message)
