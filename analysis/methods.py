"""Names and order of the methods that are compared.

A method's tag is ``<routing>[+<part> ...]``: how channels are routed, and what else its training does differently
("dtr", "baseline+min_snr", "dtr+per_block+pcgrad").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

BASELINE = "baseline"
PLAIN = "plain"
UNIFORM = "uniform"
ROUTING_NAMES = {
    BASELINE: "Baseline",
    "random": "Random routing",
    "dtr": "DTR",
    "cluster": "Cluster masks",
    "learned": "Learned masks",
}
VARIANT_NAMES = {"per_block": "per block", "depth": "by depth"}
"""Parts of a tag that belong to the routing."""
OPTIMISATION_NAMES = {
    # weights of timesteps by their SNR or place
    "min_snr": "Min-SNR",
    "p2": "P2",
    "speed": "SpeeD",
    # weights of tasks that training finds
    "edm2": "EDM2 uncertainty",
    "uw": "UW",
    "imtl_l": "IMTL-L",
    "dwa": "DWA",
    "famo": "FAMO",
    "stch": "STCH",
    "geometric_mean": "Geometric mean",
    "random_weights": "Random weights",
    # aggregation of the tasks' gradients
    "pcgrad": "PCGrad",
    "nash_mtl": "Nash-MTL",
    "cagrad": "CAGrad",
    "mgda": "MGDA",
    "imtl_g": "IMTL-G",
    "aligned_mtl": "Aligned-MTL",
    "upgrad": "UPGrad",
    "config": "ConFIG",
    "gradvac": "GradVac",
    # how timesteps are drawn
    "uniform_t": "Uniform t",
    "log_normal": "Log-normal t",
    "loss_second_moment": "t by loss",
    "gradient_noise": "t by gradient noise",
    "speed_sampling": "SpeeD sampling",
}
"""Parts of a tag that belong to the optimisation, in the order in which they are listed."""
_PART_NAMES = {**ROUTING_NAMES, **VARIANT_NAMES, **OPTIMISATION_NAMES, PLAIN: "Plain", UNIFORM: "Uniform"}
_Rank = tuple[tuple[int, str], ...]


class MethodParts(NamedTuple):
    """A method's tag, taken apart.

    Attributes:
        routing: With its variants, such as ``"dtr+per_block"``.
        optimisation: The other parts, such as ``"min_snr+upgrad"``; empty where training is as usual.
    """

    routing: str
    optimisation: str


def split_method(method: str) -> MethodParts:
    """Which parts of a tag are routing, which optimisation; a part of unknown name is optimisation.

    Understands the choices of a sweep, too: "dtr_per_block" is "dtr+per_block".
    """
    first, *parts = method.split("+")
    kind, _, variant = first.partition("_")
    if kind in ROUTING_NAMES and variant in VARIANT_NAMES:
        first, parts = kind, [variant, *parts]
    variants = [part for part in parts if part in VARIANT_NAMES]
    return MethodParts("+".join([first, *variants]), "+".join(part for part in parts if part not in VARIANT_NAMES))


def method_name(method: str) -> str:
    """The name to show, of a whole tag or of a part of one; a part of unknown name goes by its tag."""
    routing, optimisation = split_method(method)
    kind = " ".join(_PART_NAMES.get(part, part) for part in routing.split("+"))
    return " + ".join([kind, *(_PART_NAMES.get(part, part) for part in optimisation.split("+") if part)])


def ordered(methods: Iterable[str]) -> list[str]:
    """Each method once, by routing (baseline, random routing, DTR, then others), then by optimisation, none first."""
    return sorted(set(methods), key=_rank)


def reference_method(methods: Iterable[str]) -> str:
    """What the others are compared with: the baseline, or the plainest method if there is none."""
    return ordered(methods)[0]


def _rank(method: str) -> tuple[_Rank, _Rank, str]:
    routing, optimisation = split_method(method)
    first, *variants = routing.split("+")
    first = BASELINE if first == PLAIN else first
    parts = optimisation.split("+") if optimisation else []
    kind = _places([first], ROUTING_NAMES) + _places(variants, VARIANT_NAMES)
    return kind, _places(parts, OPTIMISATION_NAMES), method


def _places(parts: Sequence[str], names: dict[str, str]) -> _Rank:
    """Where each part stands in a list of names; those that are not in it come after it, by name."""
    known = list(names)
    return tuple((known.index(part), "") if part in known else (len(known), part) for part in parts)
