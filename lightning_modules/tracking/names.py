"""What MLflow accepts as a name, and how a nested configuration becomes flat parameters."""

from __future__ import annotations

import dataclasses
import enum
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_NAME = 250
_MAX_PARAM = 6000
_MAX_LIST = 250
_METRIC = re.compile(r"[A-Za-z0-9_\-. :/]+")
_IMAGE = re.compile(r"[A-Za-z0-9_\-. /]+")
_SCALARS = (str, int, float, bool, type(None))


def check_metric_name(name: str) -> None:
    """Refuses names of metrics, parameters and tags that MLflow would refuse, with everything else in their batch.

    Raises:
        ValueError: Unless the name has 1 to 250 characters out of ``A-Z a-z 0-9 _ - . space : /`` and reads as a
            relative path without ``.``, ``..`` or empty parts.
    """
    _check(name, _METRIC, "letters, digits, _ - . : / and spaces")


def check_image_name(name: str) -> None:
    """Like `check_metric_name`, for keys of images, which must not hold a colon."""
    _check(name, _IMAGE, "letters, digits, _ - . / and spaces")


def check_artifact_path(path: str) -> None:
    """Refuses paths that leave the run's artifacts, and ``images/``, which belongs to `log_image` alone.

    A foreign file in ``images/`` hides all images from MLflow's UI.

    Raises:
        ValueError: Naming the path.
    """
    if not path or posixpath.normpath(path) != path or path.startswith(("/", "..")):
        raise ValueError(f"artifact path {path!r} must be relative, without '.', '..' or empty parts")
    if path.split("/")[0] == "images":
        raise ValueError(f"artifact path {path!r}: use log_image for what belongs into images/")


def _check(name: str, allowed: re.Pattern[str], described: str) -> None:
    if not isinstance(name, str) or not allowed.fullmatch(name):
        raise ValueError(f"MLflow does not accept the name {name!r}: only {described} are allowed")
    if len(name) > _MAX_NAME:
        raise ValueError(f"the name {name[:40]!r}... has {len(name)} characters, MLflow accepts {_MAX_NAME}")
    if posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == ".":
        raise ValueError(f"MLflow does not accept the name {name!r}: it must read as a plain relative path")


def flat_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Scalars of a nested configuration by dotted name, lists as short strings.

    Whatever is neither (long lists, objects) is left out: the whole configuration is kept as ``config.yaml``.
    LightningCLI's ``init_args`` level is dropped, so ``model.init_args.alpha`` reads ``model.alpha``.

    Raises:
        ValueError: If a name is one MLflow does not accept.
    """
    flat = {}
    for name, value in _leaves(params, ""):
        text = _text(value)
        if text is not None:
            check_metric_name(name)
            flat[name] = text[:_MAX_PARAM]
    return flat


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            parts = [part for part in (name, "" if key == "init_args" else str(key)) if part]
            yield from _leaves(inner, ".".join(parts))
    elif name:
        yield name, value


def _text(value: Any) -> str | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, _SCALARS):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and all(isinstance(entry, _SCALARS) for entry in value):
        text = str(list(value))
        return text if len(text) <= _MAX_LIST else None
    return None
