"""Names and order of the methods that are compared."""

from __future__ import annotations

from collections.abc import Iterable

BASELINE = "baseline"
METHOD_NAMES = {BASELINE: "Baseline", "random": "Random routing", "dtr": "DTR"}
"""How a method's tag is written in tables and figures."""


def method_name(method: str) -> str:
    """The name to show; a method of unknown tag goes by its tag."""
    return METHOD_NAMES.get(method, method)


def ordered(methods: Iterable[str]) -> list[str]:
    """Each method once: baseline, random routing, DTR, then others by name."""
    known = list(METHOD_NAMES)
    return sorted(set(methods), key=lambda method: (known.index(method) if method in known else len(known), method))


def reference_method(methods: Iterable[str]) -> str:
    """What the others are compared with: the baseline, or the first method if there is none."""
    return ordered(methods)[0]
