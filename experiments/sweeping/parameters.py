"""The `search` part of a sweep file: what is searched, where, and how."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from experiments.sweeping.files import check_keys
from lightning_modules.errors import UserInputError

DIRECTIONS = ("minimize", "maximize")
SAMPLERS = ("tpe", "random")
_SEARCH_KEYS = ("metric", "direction", "trials", "sampler", "seed", "parameters")
_RANGE_KEYS = ("low", "high", "log", "step", "int", "choices")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where a setting is searched: in a range, or among choices.

    Attributes:
        low: Least value; ignored where there are choices.
        high: Greatest value.
        log: Whether values are drawn evenly in their logarithm.
        step: Distance between neighbouring values; None for all.
        whole: Whether values are whole numbers.
        choices: The values, where there is no range.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the ends of the range: if these can be trained, the others most likely can."""
        return self.choices or (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for the best settings.

    Attributes:
        metric: MLflow metric of the runs; the last value counts, averaged over seeds.
        direction: ``"minimize"`` or ``"maximize"``.
        trials: How many settings are tried.
        sampler: ``"tpe"`` (tree-structured Parzen estimator, Bergstra et al., 2011) or ``"random"``.
        seed: Of the sampler.
        parameters: Setting -> where it is searched.
    """

    metric: str
    direction: Literal["minimize", "maximize"]
    trials: int
    sampler: str
    seed: int
    parameters: dict[str, Parameter]


def read_search(where: str, found: Any) -> Search:
    """Checks the `search` part of a sweep file.

    Raises:
        UserInputError: Naming the file, the key, and the cure.
    """
    where = f"{where}: search"
    if not isinstance(found, dict):
        raise UserInputError(f"{where} must hold metric, trials and parameters")
    check_keys(where, found, _SEARCH_KEYS, required=("metric", "trials", "parameters"))
    metric, trials, seed = found["metric"], found["trials"], found.get("seed", 0)
    direction, sampler = found.get("direction", "minimize"), found.get("sampler", "tpe")
    if not isinstance(metric, str) or not metric:
        raise UserInputError(f"{where}: metric must name a metric of the runs, such as loss/val")
    if direction not in DIRECTIONS:
        raise UserInputError(f"{where}: direction must be minimize or maximize, got {direction!r}")
    if sampler == "grid":
        raise UserInputError(f"{where}: sampler must be tpe or random; a grid is written as `axes` instead of `search`")
    if sampler not in SAMPLERS:
        raise UserInputError(f"{where}: sampler must be tpe or random, got {sampler!r}")
    if not _is_whole(trials) or trials < 1:
        raise UserInputError(f"{where}: trials must be a whole number of at least 1, got {trials!r}")
    if not _is_whole(seed) or seed < 0:
        raise UserInputError(f"{where}: seed must be a whole number of at least 0, got {seed!r}")
    given = found["parameters"]
    if not isinstance(given, dict) or not given:
        raise UserInputError(f"{where}: parameters must hold at least one setting, `KEY: {{low: 0.1, high: 1.0}}`")
    parameters = {str(key): _parameter(f"{where}: {key}", value) for key, value in given.items()}
    return Search(metric, direction, trials, sampler, seed, parameters)


def _parameter(where: str, found: Any) -> Parameter:
    if not isinstance(found, dict):
        raise UserInputError(f"{where} must be {{low: ..., high: ...}} or {{choices: [...]}}, got {found!r}")
    check_keys(where, found, _RANGE_KEYS)
    if "choices" in found:
        return _choices(where, found)
    low, high, step = (_number(where, key, found.get(key)) for key in ("low", "high", "step"))
    log, whole = found.get("log", False), found.get("int", False)
    if low is None or high is None:
        raise UserInputError(f"{where} must have low and high, or choices")
    if not (isinstance(log, bool) and isinstance(whole, bool)):
        raise UserInputError(f"{where}: log and int must be true or false")
    if not low < high:
        raise UserInputError(f"{where}: low must be less than high, got {low} and {high}")
    if log and (low <= 0 or step is not None):
        raise UserInputError(f"{where}: log needs a positive low, and no step")
    if step is not None and not 0 < step <= high - low:
        raise UserInputError(f"{where}: step must be positive and at most high - low, got {step}")
    if whole and not all(value is None or float(value).is_integer() for value in (low, high, step)):
        raise UserInputError(f"{where}: with int, low, high and step must be whole numbers")
    if whole:
        low, high, step = int(low), int(high), None if step is None else int(step)
    return Parameter(low, high, log, step, whole)


def _choices(where: str, found: dict[str, Any]) -> Parameter:
    choices = found["choices"]
    if len(found) > 1:
        raise UserInputError(
            f"{where}: choices stand alone, without {', '.join(key for key in found if key != 'choices')}"
        )
    if not isinstance(choices, list) or not choices:
        raise UserInputError(f"{where}: choices must be a list of values")
    if not all(value is None or isinstance(value, str | int | float) for value in choices):
        raise UserInputError(f"{where}: choices must be plain values: texts, numbers, true, false or null")
    if len(set(choices)) < len(choices):
        raise UserInputError(f"{where}: choices must differ from one another, got {choices}")
    return Parameter(choices=tuple(choices))


def _number(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserInputError(f"{where}: {key} must be a number, got {value!r}")
    return number


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
