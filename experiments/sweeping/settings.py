"""Settings by dotted keys, as LightningCLI names them: layers, nesting, one digest for all, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightning_modules.errors import UserInputError

Settings = dict[str, Any]
"""Dotted key -> value, which is no mapping (but may be an empty one)."""

_SHOWN = 4
_ABSENT = object()


def flattened(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings by dotted keys; keys may be dotted already. Lists stay values."""
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flattened`, fit to be written as a configuration file.

    Raises:
        UserInputError: If a key is a value as well as a group of others.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, last = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise UserInputError(f"{key} is set, and so is a part of its name as a value: leave out one of them")
        if isinstance(place.get(last), dict) and place[last]:
            raise UserInputError(f"{key} is set as a value, and so are settings below it: leave out one of them")
        place[last] = value
    return tree


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Layers of settings, later ones over earlier ones. A key replaces what was set below it, and the reverse."""
    result: Settings = {}
    for layer in layers:
        for old in list(result):
            if any(old.startswith(f"{key}.") or key.startswith(f"{old}.") for key in layer):
                del result[old]
        result.update(layer)
    return result


def digest(value: Any) -> str:
    """16 hexadecimal digits that are equal for equal values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, the settings that differ: ``"trainer.max_steps was 100, is 200"``; empty if none does."""
    old, new = flattened(before), flattened(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    said = [f"{key} was {_shown(old, key)}, is {_shown(new, key)}" for key in keys[:_SHOWN]]
    return "; ".join(said) + (f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _shown(settings: Settings, key: str) -> str:
    return json.dumps(settings[key], default=str) if key in settings else "not set"
