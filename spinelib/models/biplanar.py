"""Networks that turn two radiographs of a vertebra into its shape, by name; their file of weights.

All have `loss(batch) -> scalar` and `predict(batch) -> (mask share (b, 64, 64, 64), level index (b,))` on batches of
`spinelib.models.biplanar_data`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from spinelib.errors import InputError
from spinelib.models.lifting import LiftingNet
from spinelib.models.transvert import TransVert
from spinelib.models.weights import WeightsFile

VARIANTS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "sagittal_only": lambda: TransVert("sagittal"),
        "outer_product": lambda: TransVert("outer"),
        "transvert": lambda: TransVert("anisotropic"),
        "attention": lambda: TransVert("anisotropic", attention=True),
        "attention_adv": lambda: TransVert("anisotropic", attention=True, adversarial=True),
        "ours": LiftingNet,
    }
)
"""Makers of untrained networks: the rows of the paper's first table, then ours."""


def new_variant(name: str) -> nn.Module:
    """Return an untrained network.

    Raises
    ------
    InputError
        If the name is not one of `VARIANTS`.
    """
    if name not in VARIANTS:
        message = f"unknown variant {name!r}. Expected one of: {', '.join(map(repr, VARIANTS))}."
        raise InputError(message)
    return VARIANTS[name]()


WEIGHTS = WeightsFile(
    format="spinelib-biplanar-1",
    shipped="biplanar.safetensors",
    new=new_variant,
    train="spinelib train transvert --render 100 --variant",
    usual="ours",
)
"""Files of trained networks by the names of `VARIANTS`."""

FORMAT = WEIGHTS.format
save_variants, read_card = WEIGHTS.save, WEIGHTS.card


def load_variant(name: str, path=None) -> nn.Module:
    """Return a trained network, which knows the `annotation` that it was trained with; see `WeightsFile.load`."""
    network = WEIGHTS.load(name, path)
    network.annotation = read_card(path).get("annotation", network.annotation)
    return network
