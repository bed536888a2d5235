"""What is wrong with a configuration, in few words, out of the parser's account of everything it tried."""

from __future__ import annotations

import dataclasses
import re

from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.errors import UserInputError

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Import path \S+ does not correspond to a subclass of|Subclasses are disabled for"
)
_FIELDS = {config.__name__: {field.name for field in dataclasses.fields(config)} for config in (DiTConfig, UNetConfig)}
_CURES = {
    r"BaselineModule':\nunrecognized arguments: --routing": "routing belongs to DTRModule: set "
    "model.class_path to DTRModule",
    r"Unable to load config '\w+'": "a group of settings takes a YAML file or its settings one by one, as in "
    "--model.init_args.balancing.method=uw",
}
"""What to add where the parser's words, as they match, name no cure."""
_OTHER = {"DiTConfig": "UNetConfig", "UNetConfig": "DiTConfig"}


def plain(error: BaseException) -> str:
    """What a configuration error says, without the parser's account of all types it tried.

    Our own messages are found among the causes; of the parser's only the lines that name a key or a fault are kept.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserInputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    kept = _of_one_backbone([line for line in lines if line and not _NOISE.match(line)])
    kept += [cure for pattern, cure in _CURES.items() if re.search(pattern, "\n".join(kept))]
    return (
        "\n  ".join(kept)
        + "\n`dtr-lab train --help` lists the options, `--print_config` prints the whole configuration"
    )


def _of_one_backbone(lines: list[str]) -> list[str]:
    """Leaves out the complaints of the backbone that the user does not mean.

    Settings are tried as a DiT's and as a U-Net's. A complaint about a setting that the other one has shows that the
    other one is meant; where no complaint is left, the settings of both are mixed.
    """
    sections: dict[str, list[str]] = {"": []}
    section = ""
    for line in lines:
        if match := re.match(r"Problem with given class_path '[\w.]*\b(DiTConfig|UNetConfig)'", line):
            section = match[1]
            sections[section] = []
        else:
            sections[section].append(line)
    meant = {name: said for name, said in sections.items() if name and not _means(_OTHER[name], said)}
    complaints = [line for name, said in sections.items() if name for line in said]
    if complaints and not meant:
        return [*sections[""], f"the settings of a DiT and of a U-Net are mixed: {'; '.join(complaints)}"]
    return [*sections[""], *dict.fromkeys(line for said in meant.values() for line in said)]


def _means(config: str, said: list[str]) -> bool:
    """Whether what the other backbone says against the settings shows that they are this one's."""
    text = "\n".join(said)
    refused = re.search(r"Option '(\w+)' is not accepted", text)
    own_kind = {"DiTConfig": "dit", "UNetConfig": "unet"}[config]
    return bool(refused and refused[1] in _FIELDS[config]) or f"Got value: {own_kind}" in text
