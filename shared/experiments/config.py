"""Configs are dataclasses, filled in by YAML files and `key=value` overrides; OmegaConf merges and checks types."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from shared.experiments.errors import UserError, unknown

C = TypeVar("C")


def capped(default: Any, smoke: int | float) -> Any:
    """A dataclass field that `smoke` runs clip to at most `smoke` (each entry, if it is a list)."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"smoke": smoke})
    return dataclasses.field(default=default, metadata={"smoke": smoke})


def load_config(cls: type[C], *layers: tuple[str, dict], overrides: Sequence[str] = (), smoke: bool = False) -> C:
    """Merges `layers` of (where it comes from, mapping), later ones winning, then `key=value` overrides, into a `cls`.

    Args:
        overrides: OmegaConf dot-list entries, e.g. `lr=1e-3` or `model.layers=4`.
        smoke: clip every field made by `capped`.

    Raises:
        UserError: an unknown key (with the nearest valid one) or a value of the wrong type, naming where it stands.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    config = OmegaConf.structured(cls)
    for entry in overrides:
        if "=" not in entry:
            raise UserError(f"override {entry!r} is not of the form key=value")
    named = [*layers]
    if overrides:
        try:
            values = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"overrides {' '.join(overrides)!r}: {str(error).splitlines()[0]}") from error
        named.append(("command line", values))
    for source, values in named:
        _check_keys(cls, values, source)
        try:
            config = OmegaConf.merge(config, values)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{source}: {error.full_key or ''}: {reason}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{named[0][0] if named else cls.__name__}: no value for {', '.join(missing)}")
    try:
        result = OmegaConf.to_object(config)
    except ValueError as error:  # a dataclass's own __post_init__ check
        raise UserError(f"{', '.join(source for source, _ in named)}: {error}") from error
    return _clip(result) if smoke else result


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; {} for an empty file. A key that stands twice is an error."""
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        value = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, DictConfig):
        raise UserError(f"{path}: expected a mapping at the top, found a list")
    return OmegaConf.to_container(value)


def _check_keys(cls: type, values: dict, source: str, prefix: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{source}: {unknown('config key', f'{prefix}{key}', [prefix + name for name in fields])}")
        if isinstance(value, dict) and (inner := _dataclass_type(cls, key)):
            _check_keys(inner, value, source, f"{prefix}{key}.")


def _dataclass_type(cls: type, name: str) -> type | None:
    hint = typing.get_type_hints(cls)[name]
    return hint if dataclasses.is_dataclass(hint) else None


def _clip(config: C) -> C:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _clip(value)
        elif "smoke" in field.metadata and value is not None:
            cap = field.metadata["smoke"]
            changes[field.name] = [min(v, cap) for v in value] if isinstance(value, list) else min(value, cap)
    return dataclasses.replace(config, **changes)
