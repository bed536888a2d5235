"""A sweep file, read and checked: what is trained, as the user wrote it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.sweeping.files import check_keys, read_mapping
from experiments.sweeping.parameters import Search, read_search
from experiments.sweeping.settings import Settings, flattened, merged, nested
from lightning_modules.errors import UserInputError

_KEYS = ("name", "experiment", "config", "settings", "seeds", "seeded", "samples", "axes", "search")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,79}")
_NAME_HINT = (
    "letters, digits, '_', '.', '+' and '-', the first a letter or digit (in quotes where YAML reads it otherwise)"
)
_ROUTING = "routing"  # the axis that `analysis.grid` tells from the others
_OWN = {
    "seed_everything": "list the seeds under `seeds`",
    "tracking": "use `name`, `experiment`, --tracking-uri and --run-dir",
    "progress": "the sweep draws the bars",
    "resume": "the sweep goes on by itself",
    "config": "name files under the `config` of the sweep or of a choice",
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is to be trained: the cells of a grid, or a search.

    Attributes:
        path: The sweep file.
        name: Id of the comparison that all runs belong to; also names files.
        experiment: MLflow experiment.
        configs: Configuration files of `dtr-lab train` that every run starts from, later ones over earlier ones.
        settings: For every run, over the configurations.
        seeds: Of each cell, or trial.
        seeded: Settings that take the run's seed where a run has them.
        axes: Axis -> choice -> its settings, over ``settings``; empty for a search.
        samples: How many samples to draw of each run of a grid and compare with real images; 0 for none.
        search: The search; None for a grid.
        overrides: From the command line, over everything else.
    """

    path: Path
    name: str
    experiment: str
    configs: tuple[Path, ...]
    settings: Settings
    seeds: tuple[int, ...]
    seeded: tuple[str, ...]
    samples: int
    axes: dict[str, dict[str, Settings]]
    search: Search | None
    overrides: Settings


def read_sweep(
    path: Path, *, seeds: Sequence[int] | None = None, overrides: Sequence[str] = (), experiment: str | None = None
) -> Sweep:
    """Reads a sweep file and checks all of it that can be checked without the trainer's parser.

    Args:
        path: The file.
        seeds: In place of the file's.
        overrides: ``KEY=VALUE`` texts, for every run.
        experiment: In place of the file's.

    Raises:
        UserInputError: Naming the file, what is wrong in it, and the cure.
    """
    content = read_mapping(path)
    where = str(path)
    check_keys(where, content, _KEYS, required=("name", "config"))
    if ("axes" in content) == ("search" in content):
        raise UserInputError(f"{where}: give either `axes` (a grid) or `search`")
    experiment = experiment or content.get("experiment")
    if not isinstance(experiment, str) or not experiment:
        raise UserInputError(f"{where}: experiment must name the MLflow experiment, as in `experiment: digits`")
    axes = _axes(where, content["axes"], path.parent) if "axes" in content else {}
    search = read_search(where, content["search"]) if "search" in content else None
    settings = _settings(f"{where}: settings", content.get("settings", {}))
    from_command = _overrides(overrides)
    _check_parameters(search, from_command)
    return Sweep(
        path=path,
        name=_checked_name(where, "name", content["name"]),
        experiment=experiment,
        configs=_configs(where, content["config"], path.parent),
        settings=settings,
        seeds=_seeds(where if seeds is None else "--seeds", content.get("seeds", [0]) if seeds is None else seeds),
        seeded=_seeded(where, content.get("seeded", [])),
        samples=_samples(where, content.get("samples", 0)),
        axes=axes,
        search=search,
        overrides=from_command,
    )


def _axes(where: str, found: Any, folder: Path) -> dict[str, dict[str, Settings]]:
    if not isinstance(found, dict) or not found:
        raise UserInputError(f"{where}: axes must hold at least one axis, `AXIS: {{CHOICE: {{KEY: VALUE}}}}`")
    axes: dict[str, dict[str, Settings]] = {}
    for axis, choices in found.items():
        _checked_name(where, "axis", axis)
        if axis != _ROUTING and difflib.get_close_matches(axis.lower(), [_ROUTING], cutoff=0.8):
            raise UserInputError(f"{where}: axis {axis!r}: do you mean {_ROUTING}? Tables know routings by that name")
        if not isinstance(choices, dict) or not choices:
            raise UserInputError(f"{where}: axis {axis} is empty: give it choices, `CHOICE: {{KEY: VALUE}}`")
        axes[axis] = {
            _checked_name(where, f"a choice of axis {axis}", choice): _choice(f"{where}: {axis}.{choice}", own, folder)
            for choice, own in choices.items()
        }
    _check_crossing(where, axes)
    return axes


def _choice(where: str, found: Any, folder: Path) -> Settings:
    """A choice's settings: those of its configuration files, and its own over them."""
    if not isinstance(found, dict | None):
        raise UserInputError(f"{where}: a choice holds settings, `{{KEY: VALUE}}` or `{{}}`, not {found!r}")
    own = dict(found or {})
    files = _configs(where, own.pop("config"), folder) if "config" in own else ()
    layers = [_settings(str(file), read_mapping(file)) for file in files]
    return merged(*layers, _settings(where, own))


def _check_crossing(where: str, axes: Mapping[str, Mapping[str, Settings]]) -> None:
    """Where two axes set one key differently, the later one would undo the earlier one under its name."""
    setters: dict[str, tuple[str, Any]] = {}
    for axis, choices in axes.items():
        here = [(key, value) for settings in choices.values() for key, value in settings.items()]
        for key, value in here:
            other = setters.get(key)
            if other is not None and other[1] != value:
                raise UserInputError(
                    f"{where}: axes {other[0]} and {axis} both set {key}, to different values: a setting belongs to "
                    "one axis"
                )
        setters |= {key: (axis, value) for key, value in here}


def _settings(where: str, found: Any) -> Settings:
    if not isinstance(found, dict):
        raise UserInputError(f"{where} must hold settings, `KEY: VALUE`, not {found!r}")
    wrong = [key for key in found if not isinstance(key, str)]
    if wrong:
        raise UserInputError(f"{where}: the key {wrong[0]!r} is no text: write it in quotes")
    flat = flattened(found)
    for key in flat:
        first = key.split(".")[0]
        if first in _OWN:
            raise UserInputError(f"{where}: {key} is set by the sweep itself: {_OWN[first]}")
    nested(flat)
    return flat


def _overrides(texts: Sequence[str]) -> Settings:
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserInputError(f"--set {text}: settings are KEY=VALUE, such as trainer.max_steps=500")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserInputError(f"--set {text}: the value is no valid YAML: put it in quotes") from error
    return _settings("--set", found)


def _check_parameters(search: Search | None, overrides: Settings) -> None:
    both = [key for key in overrides if search is not None and key in search.parameters]
    if both:
        raise UserInputError(f"--set {both[0]}: the search chooses this setting: leave it out here, or there")


def _checked_name(where: str, what: str, found: Any) -> str:
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        raise UserInputError(f"{where}: {what} {found!r} cannot be used in file names: use {_NAME_HINT}")
    return found


def _configs(where: str, found: Any, folder: Path) -> tuple[Path, ...]:
    names = found if isinstance(found, list) else [found]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserInputError(f"{where}: config must name a configuration file of `dtr-lab train`, or a list of them")
    paths = tuple((folder / name).resolve() for name in names)
    for path in paths:
        if not path.is_file():
            raise UserInputError(f"{where}: there is no configuration {path} (paths start at the sweep file's folder)")
        read_mapping(path)
    return paths


def _seeds(where: str, found: Any) -> tuple[int, ...]:
    seeds = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise UserInputError(f"{where}: seeds must be a list of whole numbers, as in `seeds: [0, 1, 2]`")
    if len(set(seeds)) < len(seeds):
        raise UserInputError(f"{where}: seeds must differ from one another, got {seeds}")
    return tuple(seeds)


def _seeded(where: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise UserInputError(f"{where}: seeded must be a list of settings, as in `[model.init_args.routing.seed]`")
    return tuple(found)


def _samples(where: str, found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 0 or found == 1:
        raise UserInputError(f"{where}: samples must be 0, for none, or how many to draw of each run, got {found!r}")
    return found
