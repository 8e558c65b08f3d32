"""Files of trained networks by name: one safetensors file in 16 bits whose header holds format, names and card."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spinelib.errors import InputError
from spinelib.record import file_sha256, written_atomically


@dataclass(frozen=True)
class WeightsFile:
    """How the networks of one system are kept.

    Attributes
    ----------
    format : str
        Written to the header, and required there.
    shipped : str
        Name of the file that comes with the package, read where no path is given.
    new : callable
        Makes the untrained network of a name; raises InputError for an unknown one.
    train : str
        The command that trains a network, up to the name.
    usual : str
        Name for that command where none was asked for.
    """

    format: str
    shipped: str
    new: Callable[[str], nn.Module]
    train: str
    usual: str

    def save(self, networks: Mapping[str, nn.Module], path, card: dict) -> None:
        """Write trained networks, name -> network.

        Parameters
        ----------
        networks : mapping of str to Module
        path : path
        card : dict
            What the weights are: command, data, seed, date, figures.
        """
        tensors = {
            f"{name}.{key}": _narrow(value.detach().cpu())
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }
        about = {"format": self.format, "variants": json.dumps(list(networks)), "card": json.dumps(card)}
        written_atomically(path, [".safetensors"], partial(save_file, tensors, metadata=about))

    def load(self, name: str, path=None) -> nn.Module:
        """Return a trained network in evaluation mode; without a path, of the weights shipped with the package.

        Raises
        ------
        InputError
            If the name is unknown or not in the file, or the file is missing, corrupt or not made by this package.
        """
        network, path = self.new(name), self._found(path)
        with self._opened(path) as file:
            held = json.loads(self._header(file, path)["variants"])
            if name not in held:
                message = f"{path} holds {', '.join(map(repr, held))}, not {name!r}. {self._fix(name)}"
                raise InputError(message)
            own = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
            state = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in own}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            message = f"the weights of {name!r} in {path} do not fit the network: {error}"
            raise InputError(message) from error
        return network.eval()

    def card(self, path=None) -> dict:
        """Return the card of a file; raises as `load` does."""
        return self._read(path, "card")

    def held(self, path=None) -> tuple[str, ...]:
        """Return the names of the networks in a file; raises as `load` does."""
        return tuple(self._read(path, "variants"))

    def _read(self, path, key):
        path = self._found(path)
        with self._opened(path) as file:
            return json.loads(self._header(file, path)[key])

    def _found(self, path):
        path = Path(path) if path else Path(str(files("spinelib") / "weights" / self.shipped))
        if not path.is_file():
            message = f"no weights at {path}. {self._fix(self.usual)}"
            raise InputError(message)
        return path

    def _opened(self, path):
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            message = f"{path} is not a readable safetensors file ({error}). {self._fix(self.usual)}"
            raise InputError(message) from error

    def _header(self, file, path):
        header = file.metadata() or {}
        if header.get("format") != self.format:
            given = f"has the format {header.get('format')!r}, expected {self.format!r}"
            message = f"{path} {given}. {self._fix(self.usual)}"
            raise InputError(message)
        return header

    def _fix(self, name):
        return f"Make them with: {self.train} {name} -o runs/{name}"


def finish_training(folder, save: Callable[[Path, dict], object], card: dict, started: float, seen: str) -> None:
    """Write what a training made to `weights.safetensors`, its card beside it as JSON with the hash, and say so.

    Parameters
    ----------
    folder : path
    save : callable
        Writes the weights to a path, with a card.
    card : dict
        Command and data; version of torch and seconds are added.
    started : float
        `time.time()` at the beginning.
    seen : str
        How much it was trained on, for people.
    """
    card = card | {"torch": torch.__version__, "seconds": round(time.time() - started)}
    path = Path(folder) / "weights.safetensors"
    save(path, card)
    path.with_suffix(".json").write_text(json.dumps(card | {"sha256": file_sha256(path)}, indent=1) + "\n")
    print(f"{path}: {seen}, {card['seconds']} s")


def _narrow(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous()
