"""`Curves` and `Spine`: the one 3D object that every route of this package ends in."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import trimesh
from scipy.interpolate import interp1d

from spinelib.errors import InputError
from spinelib.geometry import PlanarTransform

CURVE_COLUMNS = (
    "coronal_right_mm",
    "coronal_centre_mm",
    "coronal_left_mm",
    "sagittal_anterior_mm",
    "sagittal_centre_mm",
    "sagittal_posterior_mm",
)
"""Order of the six curves wherever they stand in one array (Bourigault 2024, Fig. 4: 209 x 6)."""

K_DEFAULT = 209
"""Rows per curve in Bourigault 2024."""


@dataclass(frozen=True)
class Curves:
    """Outline of the spinal column (bodies and discs) in two orthogonal projections.

    Attributes
    ----------
    heights_mm : ndarray, shape (K,)
        superior_mm of each row, strictly falling (superior to inferior).
    coronal_mm : ndarray, shape (3, K)
        right_mm of the right edge, the centre and the left edge.
    sagittal_mm : ndarray, shape (3, K)
        anterior_mm of the anterior edge, the centre and the posterior edge.
    """

    heights_mm: np.ndarray
    coronal_mm: np.ndarray
    sagittal_mm: np.ndarray

    def __post_init__(self):
        k = len(self.heights_mm)
        if self.coronal_mm.shape != (3, k) or self.sagittal_mm.shape != (3, k) or k < 2:
            message = (
                f"curves need heights (K,) with K >= 2 and two arrays (3, K), given {self.heights_mm.shape}, "
                f"{self.coronal_mm.shape}, {self.sagittal_mm.shape}."
            )
            raise InputError(message)
        if not (np.isfinite(self.heights_mm).all() and np.isfinite(self.to_array()).all()):
            message = "curves must be finite, given NaN or infinite values."
            raise InputError(message)
        if not np.all(np.diff(self.heights_mm) < 0):
            message = "curve heights must fall strictly from superior to inferior."
            raise InputError(message)

    @classmethod
    def from_array(cls, heights_mm, array, columns=CURVE_COLUMNS) -> "Curves":
        """Build from an array (K, 6) whose columns are named; an unnamed or misnamed array is refused."""
        if tuple(columns) != CURVE_COLUMNS:
            message = f"curve columns must be {CURVE_COLUMNS}, given {tuple(columns)}. Rename or reorder them."
            raise InputError(message)
        array = np.asarray(array, float)
        if array.ndim != 2 or array.shape[1] != 6:
            message = f"expected an array (K, 6), given shape {array.shape}."
            raise InputError(message)
        return cls(np.asarray(heights_mm, float), array[:, :3].T.copy(), array[:, 3:].T.copy())

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> "Curves":
        """Build from a table with columns superior_mm and CURVE_COLUMNS."""
        missing = [c for c in ("superior_mm", *CURVE_COLUMNS) if c not in frame]
        if missing:
            message = f"the curve table lacks the columns: {', '.join(missing)}."
            raise InputError(message)
        return cls.from_array(frame["superior_mm"].to_numpy(), frame[list(CURVE_COLUMNS)].to_numpy())

    @classmethod
    def load_csv(cls, path) -> "Curves":
        """Read what `save_csv` wrote."""
        if not Path(path).is_file():
            message = f"no curve table at {path}."
            raise InputError(message)
        return cls.from_frame(pd.read_csv(path))

    def save_csv(self, path) -> None:
        """Write the table of `to_frame` with 0.001 mm resolution."""
        self.to_frame().to_csv(path, index=False, float_format="%.3f")

    def to_array(self) -> np.ndarray:
        """Return (K, 6) in the order of CURVE_COLUMNS."""
        return np.concatenate([self.coronal_mm, self.sagittal_mm]).T

    def to_frame(self) -> pd.DataFrame:
        """Return the table superior_mm + CURVE_COLUMNS, K rows."""
        frame = pd.DataFrame(self.to_array(), columns=list(CURVE_COLUMNS))
        frame.insert(0, "superior_mm", self.heights_mm)
        return frame

    def centreline(self) -> np.ndarray:
        """Return (K, 3): right, anterior, superior mm of the column's centre."""
        return np.stack([self.coronal_mm[1], self.sagittal_mm[1], self.heights_mm], axis=1)

    def at(self, heights_mm) -> "Curves":
        """Return the curves at other heights (linear; beyond the ends the end value is held)."""
        heights = np.asarray(heights_mm, float)
        rising = self.heights_mm[::-1]
        array = np.stack([np.interp(heights, rising, column[::-1]) for column in self.to_array().T], axis=1)
        return Curves.from_array(heights, array)

    def resample(self, k: int = K_DEFAULT) -> "Curves":
        """Return the curves at `k` evenly spaced heights between the same ends."""
        return self.at(np.linspace(self.heights_mm[0], self.heights_mm[-1], k))

    def mirrored(self) -> "Curves":
        """Return the left-right mirrored patient: right and left edges swap, signs flip."""
        return Curves(self.heights_mm, -self.coronal_mm[::-1], self.sagittal_mm)

    def shifted(self, right_mm=0.0, anterior_mm=0.0, superior_mm=0.0) -> "Curves":
        """Return the curves moved by a translation in mm."""
        return Curves(self.heights_mm + superior_mm, self.coronal_mm + right_mm, self.sagittal_mm + anterior_mm)

    def moved(self, transform: PlanarTransform) -> "Curves":
        """Return the curves after a rigid motion in the coronal plane, for example from the MRI to the DXA frame.

        The new heights are those of the carried centre line, so that centre and sagittal values keep their rows
        (the sagittal view inherits the vertical placement, Bourigault 2024, Fig. 3). The carried edges are read off
        at these heights and extended linearly at the ends.

        Raises
        ------
        InputError
            If the turned centre line runs upwards somewhere.
        """
        rights, superiors = transform.apply(self.coronal_mm, np.broadcast_to(self.heights_mm, self.coronal_mm.shape))
        heights = superiors[1]
        if np.any(np.diff(heights) >= 0):
            message = (
                f"the centre line, turned by {transform.rotation_deg:.1f} degrees, runs upwards somewhere; expected a "
                "small turn of a smooth curve. Check the alignment or smooth the curve."
            )
            raise InputError(message)
        right, left = (_at_heights(heights, superiors[i], rights[i]) for i in (0, 2))
        return Curves(heights, np.stack([right, rights[1], left]), self.sagittal_mm)

    def depth_removed(self) -> "Curves":
        """Return the curves with a sagittal centre of zero mean: one frontal image has no depth."""
        return self.shifted(anterior_mm=-float(self.sagittal_mm[1].mean()))


@dataclass(frozen=True)
class Spine:
    """A spine in 3D, whatever it was made from.

    Attributes
    ----------
    levels : tuple of str
        Vertebrae, cranial to caudal.
    poses : ndarray, shape (n, 4, 4)
        Vertebral-body-centre frames (right, anterior, superior) to world RAS mm.
    meshes : tuple of trimesh.Trimesh
        One surface per level in world mm, or empty.
    curves : Curves or None
    column_mesh : trimesh.Trimesh or None
        Closed surface of the column of bodies and discs, world mm.
    angles : dict of str to float
        Degrees unless the name ends in _mm.
    source : str
        What it was made from, for captions.
    """

    levels: tuple[str, ...] = ()
    poses: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 4)))
    meshes: tuple[trimesh.Trimesh, ...] = ()
    curves: Curves | None = None
    column_mesh: trimesh.Trimesh | None = None
    angles: dict[str, float] = field(default_factory=dict)
    source: str = ""

    def save(self, path) -> None:
        """Write one .npz without pickles; `load` reads it back."""
        arrays = {"poses": self.poses}
        if self.curves is not None:
            arrays |= {"curve_heights_mm": self.curves.heights_mm, "curves_mm": self.curves.to_array()}
        named = {f"mesh_{level}": mesh for level, mesh in self._level_meshes().items()}
        if self.column_mesh is not None:
            named["mesh_column"] = self.column_mesh
        for name, mesh in named.items():
            arrays[f"{name}_vertices_mm"] = np.asarray(mesh.vertices, np.float32)
            arrays[f"{name}_faces"] = np.asarray(mesh.faces, np.int32)
        meta = {
            "levels": self.levels,
            "angles": self.angles,
            "source": self.source,
            "curve_columns": CURVE_COLUMNS,
            "frame": "RAS+ mm",
        }
        np.savez_compressed(path, meta=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load(cls, path) -> "Spine":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is missing or is not a spine file of this package.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            meta = json.loads(str(arrays["meta"]))
            levels = tuple(meta["levels"])
        except (OSError, KeyError, ValueError) as error:
            message = f"{path} is not a spine file (.npz written by Spine.save): {error}"
            raise InputError(message) from error
        curves = None
        if "curves_mm" in arrays:
            columns = meta.get("curve_columns", ())
            curves = Curves.from_array(arrays["curve_heights_mm"], arrays["curves_mm"], columns)
        meshes = tuple(_mesh(arrays, level) for level in levels if f"mesh_{level}_faces" in arrays)
        column = _mesh(arrays, "column") if "mesh_column_faces" in arrays else None
        return cls(levels, arrays["poses"], meshes, curves, column, meta["angles"], meta["source"])

    def export_glb(self, path) -> None:
        """Write all surfaces as one binary glTF in metres, Y up, as viewers expect."""
        # glTF is Y-up and metric: superior -> Y, anterior -> Z, right -> -X keeps the frame right-handed.
        to_gltf = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1000.0]]) / 1000.0
        scene = trimesh.Scene()
        for name, mesh in self.surfaces().items():
            scene.add_geometry(mesh.copy().apply_transform(to_gltf), geom_name=name, node_name=name)
        Path(path).write_bytes(scene.export(file_type="glb"))

    def export_stl(self, path) -> None:
        """Write all surfaces as one binary STL in RAS mm."""
        Path(path).write_bytes(trimesh.util.concatenate(list(self.surfaces().values())).export(file_type="stl"))

    def surfaces(self) -> dict[str, trimesh.Trimesh]:
        """Return the surfaces by name ('column' and the levels).

        Raises
        ------
        InputError
            If this spine has no surface.
        """
        named = self._level_meshes()
        if self.column_mesh is not None:
            named["column"] = self.column_mesh
        if not named:
            message = "this spine has no surface; make one with spinelib.reconstruct.reconstruct(curves)."
            raise InputError(message)
        return named

    def _level_meshes(self):
        return dict(zip(self.levels, self.meshes, strict=True)) if self.meshes else {}


def _at_heights(wanted, heights, values):
    """Interpolate a falling polyline, extended by its end slopes; rows that run back up are left out."""
    keep = heights < np.minimum.accumulate(np.concatenate([[np.inf], heights[:-1]]))
    return interp1d(heights[keep], values[keep], fill_value="extrapolate")(wanted)


def _mesh(arrays, name):
    return trimesh.Trimesh(arrays[f"mesh_{name}_vertices_mm"], arrays[f"mesh_{name}_faces"], process=False)
