"""Networks that turn two radiographs of a vertebra into its shape, by name; their file of weights.

All have `loss(batch) -> scalar` and `predict(batch) -> (mask share (b, 64, 64, 64), level index (b,))` on batches of
`spinelib.models.biplanar_data`.
"""

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spinelib.errors import InputError
from spinelib.models.lifting import LiftingNet
from spinelib.models.transvert import TransVert

FORMAT = "spinelib-biplanar-1"
SHIPPED_WEIGHTS = "biplanar.safetensors"

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


def save_variants(networks: Mapping[str, nn.Module], path, card: dict) -> None:
    """Write trained networks, name -> network, to one safetensors file in 16 bits; the header holds format and card.

    Parameters
    ----------
    networks : mapping of str to Module
        Names of `VARIANTS`.
    path : path
    card : dict
        What the weights are: command, data, seed, date, figures.
    """
    tensors = {
        f"{name}.{key}": _narrow(value.detach().cpu())
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    header = {"format": FORMAT, "variants": json.dumps(list(networks)), "card": json.dumps(card)}
    save_file(tensors, path, metadata=header)


def load_variant(name: str, path=None) -> nn.Module:
    """Return a trained network in evaluation mode; without a path, of the weights shipped with the package.

    Raises
    ------
    InputError
        If the name is unknown or not in the file, or the file is missing, corrupt or not made by this package.
    """
    network, path = new_variant(name), _found(path)
    with _opened(path) as file:
        header = _header(file, path)
        held = json.loads(header["variants"])
        if name not in held:
            message = f"{path} holds {', '.join(map(repr, held))}, not {name!r}. {_fix(name)}"
            raise InputError(message)
        own = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        state = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in own}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        message = f"the weights of {name!r} in {path} do not fit the network: {error}"
        raise InputError(message) from error
    return network.eval()


def read_card(path=None) -> dict:
    """Return the card of a file of weights; raises as `load_variant` does."""
    path = _found(path)
    with _opened(path) as file:
        return json.loads(_header(file, path)["card"])


def _found(path):
    path = Path(path) if path else Path(str(files("spinelib") / "weights" / SHIPPED_WEIGHTS))
    if not path.is_file():
        message = f"no weights at {path}. {_fix('ours')}"
        raise InputError(message)
    return path


def _opened(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        message = f"{path} is not a readable safetensors file ({error}). {_fix('ours')}"
        raise InputError(message) from error


def _header(file, path):
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        message = f"{path} has the format {header.get('format')!r}, expected {FORMAT!r}. {_fix('ours')}"
        raise InputError(message)
    return header


def _fix(name):
    return f"Make them with: spinelib train transvert --render 100 --variant {name} -o runs/{name}"


def _narrow(value):
    return (value.half() if value.is_floating_point() else value).contiguous()
