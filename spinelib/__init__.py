"""3D spine shape, with known error, from a DXA scan, two radiographs, CT or MR.

Submodules are the interface: ``from spinelib.spine import Spine``. Importing the package itself loads
nothing heavy.
"""

__version__ = "0.1.0"
