"""Typical vertebrae set along a predicted column: where they lie is predicted, what they look like is not."""

from dataclasses import replace

import numpy as np

from spinelib.angles import LEVEL_FRACTIONS, arc_length_mm
from spinelib.phantom.population import DIM_NAMES, morphometry
from spinelib.phantom.vertebra import vertebra_mesh, vertebra_shapes
from spinelib.reconstruct import reconstruct
from spinelib.spine import Curves, Spine

_TYPICAL_SHAPE = 0
_COLUMN_OF = {
    "height_anterior_mm": "body_h_ant_mm",
    "height_posterior_mm": "body_h_post_mm",
    "canal_width_mm": "canal_w_mm",
    "canal_depth_mm": "canal_d_mm",
    "pedicle_width_mm": "pedicle_w_mm",
    "pedicle_height_mm": "pedicle_h_mm",
    "tp_span_mm": "tp_span_mm",
    "spinous_length_mm": "spinous_len_from_post_wall_mm",
    "spinous_drop_mm": "spinous_tip_drop_mm",
    "endplate_depth_mm": "endplate_d_mm",
    "disc_below_mm": "disc_below_h_mm",
}


def dressed_spine(curves: Curves, model: str = "superellipse", spacing_mm: float = 2.0) -> Spine:
    """Return `reconstruct(curves)` with a mesh per level T1-L5.

    Each vertebra has the mean proportions of its level (phantom/morphometry.csv), its body height from the level's
    share of the column's arc, its width and depth from the column's outline. Processes and pedicles only scale
    along: they are for orientation, not for measurement.

    Parameters
    ----------
    curves : Curves
        T1-L5.
    spacing_mm : float
        Of the marching cubes.
    """
    spine = reconstruct(curves, model)
    dims = _dims(curves)
    shapes = vertebra_shapes(spine.levels, dims, _TYPICAL_SHAPE)
    meshes = tuple(
        vertebra_mesh(shape, spacing_mm).apply_transform(pose) for shape, pose in zip(shapes, spine.poses, strict=True)
    )
    return replace(spine, meshes=meshes)


def _dims(curves):
    table = morphometry().loc[list(LEVEL_FRACTIONS)]
    share = np.array([lower - upper for upper, lower in LEVEL_FRACTIONS.values()])
    typical = (table["body_h_ant_mm"] + table["body_h_post_mm"]).to_numpy() / 2
    scale = float(np.mean(arc_length_mm(curves)[-1] * share / typical))
    dims = {name: table[column].to_numpy(float) * scale for name, column in _COLUMN_OF.items()}
    # The outline is the widest cut of each body, a little outside the rims' mean width.
    dims["endplate_width_mm"] = _extent(curves, curves.coronal_mm)
    dims["endplate_depth_mm"] = _extent(curves, curves.sagittal_mm)
    dims["coronal_wedge_deg"] = np.zeros(len(table))
    return {name: dims[name] for name in DIM_NAMES}


def _extent(curves, lines):
    length = arc_length_mm(curves)
    middles = np.array([(upper + lower) / 2 for upper, lower in LEVEL_FRACTIONS.values()]) * length[-1]
    width = np.abs(lines[0] - lines[2])
    smooth = np.convolve(np.pad(width, 8, mode="edge"), np.full(17, 1 / 17), mode="valid")
    return np.clip(np.interp(middles, length, smooth), 12.0, 90.0)
