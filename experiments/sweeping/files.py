"""Reading YAML that users write: an error names the file, and nothing is lost in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.errors import UserInputError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written: `<<` has not been filled in yet."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserInputError: If the file cannot be read, is no YAML, names a key twice, or holds no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise UserInputError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserInputError(f"{path} is no valid YAML: {said}") from error
    if not isinstance(content, dict) or not content:
        raise UserInputError(f"{path} must hold settings, KEY: VALUE, but holds {_kind(content)}")
    return content


def check_keys(where: str, found: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str] = ()) -> None:
    """Refuses keys that nobody reads, and the absence of others.

    Raises:
        UserInputError: Naming the key, and the one that may be meant.
    """
    allowed = list(allowed)
    for key in found:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"do you mean {near[0]}?" if near else f"the keys are {', '.join(allowed)}"
            raise UserInputError(f"{where}: unknown key {key!r}; {hint}")
    missing = [key for key in required if key not in found]
    if missing:
        raise UserInputError(f"{where}: {missing[0]} is missing; add `{missing[0]}: ...`")


def _kind(content: Any) -> str:
    return "nothing" if content is None or content == {} else f"a {type(content).__name__}"
