"""Typed parameters of notebooks: what a ``parameters`` cell declares, and whether given values fit.

papermill only warns of an unknown name and turns ``-p flag false`` into a true-valued string; here both
are refused before anything runs.
"""

import ast
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spinelib.errors import InputError

_SCALARS = {"int": int, "float": float, "bool": bool, "str": str}


class RawText(str):
    """A value as typed on a command line; its meaning depends on the type that the notebook declares."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    type_name: str
    default: Any


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return what the notebook's ``parameters`` cell declares.

    Raises
    ------
    InputError
        If the notebook has no such cell, or a parameter without a plain type or literal default.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        lines = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    except (ValueError, KeyError, SyntaxError) as error:
        message = f"{notebook.name} cannot be read as a notebook: {type(error).__name__}: {error}"
        raise InputError(message) from None
    if not lines:
        message = f"{notebook.name} has no parameters. "
        message += "Expected a code cell tagged 'parameters' with lines name: type = value."
        raise InputError(message)
    return {found.name: found for found in (_parameter(notebook.name, line) for line in lines)}


def checked(given: Mapping[str, Any], declared: Mapping[str, Parameter], where: str) -> dict[str, Any]:
    """Return `given` with every value in its declared type.

    Parameters
    ----------
    given : mapping
        Values from a profile, a command line (`RawText`) or a call.
    declared : mapping of str to Parameter
        From `declared_parameters`.
    where : str
        Named first in messages, such as '03_train_curves'.

    Raises
    ------
    InputError
        For an unknown name (with the nearest known one) or a value of another type. An int fits a float;
        no other conversion is made, since a silent one runs for hours with the wrong setting.
    """
    for name in given:
        if name not in declared:
            message = f"{where}: no parameter {name!r}. {did_you_mean(name, declared)}"
            raise InputError(message)
    return {name: _fit(where, declared[name], value) for name, value in given.items()}


def read_profile(path: Path) -> dict[str, dict[str, Any]]:
    """Return a profile: ``common`` and one section per notebook, each a mapping of parameter names to values.

    Raises
    ------
    InputError
        If the file is absent, is not YAML, or a section is not a mapping.
    """
    try:
        content = read_yaml(path) or {}
    except FileNotFoundError:
        message = f"no profile {path}. Known here: {', '.join(known_profiles(path.parent)) or 'none'}."
        raise InputError(message) from None
    if not isinstance(content, dict) or any(not isinstance(v, dict | None) for v in content.values()):
        message = f"{path}: expected sections 'common:' and '<notebook>:', each with 'name: value' lines."
        raise InputError(message)
    return {str(section): values or {} for section, values in content.items()}


def read_yaml(path: Path) -> Any:
    """Return a YAML file's content; a file that is not YAML raises `InputError`."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        message = f"{path} is not valid YAML: {error}"
        raise InputError(message) from None


def known_profiles(folder: Path) -> list[str]:
    """Return the names of the profiles in a ``params`` folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yml") if not is_sweep(path))


def known_sweeps(folder: Path) -> list[str]:
    """Return the names of the sweeps in a ``params`` folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yml") if is_sweep(path))


def is_sweep(path: Path) -> bool:
    """Return whether a YAML file lists variants of a run (see `spinelib.sweep`) and is therefore no profile."""
    try:
        content = read_yaml(path)
    except InputError:  # whoever uses the file is told
        return False
    return isinstance(content, dict) and "variants" in content


def parse_assignments(texts: Iterable[str]) -> dict[str, RawText]:
    """Return {'seed': '3'} for ``-p seed=3``.

    Raises
    ------
    InputError
        If there is no ``=`` or no name before it.
    """
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            message = f"cannot read -p {text!r}. Expected name=value, such as -p seed=3."
            raise InputError(message)
        pairs[name.strip()] = RawText(value)
    return pairs


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'epochs'?", or the list of known words where none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {near[0]!r}?" if near else f"Expected one of: {', '.join(map(repr, known))}."


def _parameter(notebook: str, line: ast.stmt) -> Parameter:
    """Read one line of the cell; papermill's own reader loses lines with a second '=', as in a comment."""
    shown = ast.unparse(line)
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
            type_name = ast.unparse(annotation)
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            type_name = ""
        case _:
            message = f"{notebook}: expected name: type = value in the parameters cell, found {shown!r}."
            raise InputError(message)
    try:
        default = ast.literal_eval(value)
    except ValueError:
        message = f"{notebook}: the default of {name!r} is not a literal: {shown!r}."
        raise InputError(message) from None
    type_name = type_name or type(default).__name__
    if not re.fullmatch(r"(int|float|bool|str)|list(\[(int|float|bool|str)\])?", type_name):
        message = f"{notebook}: {name!r} is declared {type_name}. "
        message += "Expected int, float, bool, str, list or list[...]."
        raise InputError(message)
    return Parameter(name, type_name, default)


def _fit(where: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, RawText):
        value = _from_text(parameter.type_name, value)
    outer, _, inner = parameter.type_name.rstrip("]").partition("[")
    if outer == "list":
        fits = isinstance(value, list | tuple) and (not inner or all(_is_a(inner, item) for item in value))
        convert = _SCALARS.get(inner, lambda item: item)
        fitted = [convert(item) for item in value] if fits else value
    else:
        fits = _is_a(outer, value)
        fitted = _SCALARS[outer](value) if fits else value
    if not fits:
        message = f"{where}: {parameter.name}={value!r} is a {type(value).__name__}; "
        message += f"the notebook declares {parameter.type_name} (default {parameter.default!r})."
        raise InputError(message + _yaml_float_hint(parameter.type_name, value))
    return fitted


def _from_text(type_name: str, text: str) -> Any:
    if type_name == "str":
        return str(text)
    try:
        return float(text) if type_name == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return str(text)


def _is_a(type_name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return type_name == "bool"
    return isinstance(value, int | float) if type_name == "float" else isinstance(value, _SCALARS[type_name])


def _yaml_float_hint(type_name: str, value: Any) -> str:
    """YAML reads 1e-3 as text: it wants a point and a sign."""
    looks_like_float = "float" in type_name and isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value)
    return " In YAML write it with a point, such as 1.0e-3." if looks_like_float else ""
