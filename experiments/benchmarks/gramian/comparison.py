"""All methods on one workload: chosen, checked, and timed round by round."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

from experiments.benchmarks.gramian import measure, methods, peers
from experiments.benchmarks.gramian.measure import Case, Truth, UnusableMethodError
from experiments.benchmarks.gramian.methods import Method, Setting
from experiments.benchmarks.gramian.workloads import Workload

METHODS: dict[str, tuple[type[Method], ...]] = {
    "ours": (methods.Ours,),
    "ours_halves": (methods.OursHalves,),
    "subbatches": (methods.Subbatches,),
    "retained": (methods.Retained,),
    "autojac": (peers.AutoJac, peers.AutoJacLoop),
    "autogram": (peers.AutogramSamples, peers.AutogramTasks),
    "vmap_grad": (peers.VmapGradTasks, peers.VmapGradSamples),
    "opacus": (peers.Opacus, peers.OpacusFunctorch),
}
"""By name, the variants from which the fastest that is right is measured."""

EVERY_ROUND = ("plain", "ours", "ours_halves", "subbatches")
FEWEST_ROUNDS = 3
FEWEST_ROUNDS_SLOW = 2
"""Of a method that takes ten plain steps or more."""
HOPELESS = 1.3
"""A variant this many times slower than the best one at some K is not tried at larger K."""


@dataclasses.dataclass
class Failure:
    """A method that could not be measured at one K, with the reason."""

    name: str
    num_groups: int
    note: str


@dataclasses.dataclass
class Variant:
    """One way a method can be run, and the reason why it is out of the question, if it is."""

    kind: type[Method]
    method: Method | None = None
    excluded: str = ""
    last: Case | None = None


class Comparison:
    """The methods on one workload."""

    def __init__(self, workload: Workload, setting: Setting, names: Sequence[str], log: Callable[[str], None]) -> None:
        self.workload = workload
        self.setting = setting
        self.log = log
        self.variants = {name: [Variant(kind) for kind in METHODS[name]] for name in names}
        self.plain = methods.Plain(workload, setting)
        self.plain_seconds = self._time_plain()
        self.cases: list[Case] = []
        self.failures: list[Failure] = []

    def _time_plain(self) -> float:
        """Seconds of a plain step, to plan with."""
        batch = self.workload.batch(1, self.setting.device)
        return min(measure.seconds_per_step(self.plain, batch) for _ in range(3))

    def check_all(self, numbers: Sequence[int], numbers_halves: Sequence[int]) -> None:
        """Checks every method at every K and keeps those that can be timed, and the reasons of the others."""
        truth = measure.truth_of(self.workload, self.setting, 1)
        batch = self.workload.batch(1, self.setting.device)
        self.cases.append(measure.check(self.plain, batch, truth, measure.free_bytes(self.setting)))
        for number in sorted(numbers):
            truth = measure.truth_of(self.workload, self.setting, number)
            for name, variants in self.variants.items():
                if name == "ours_halves" and number not in numbers_halves:
                    continue
                self.log(f"checking K={number} {name}")
                self._choose(name, variants, number, truth)
                gc.collect()

    def _choose(self, name: str, variants: list[Variant], number: int, truth: Truth) -> None:
        """Keeps the fastest variant that gives the right Gramian."""
        usable: list[tuple[Variant, Case]] = []
        for variant in variants:
            if not variant.excluded:
                try:
                    usable.append((variant, self._try(variant, number, truth)))
                except UnusableMethodError as error:
                    variant.excluded, variant.method = str(error), None
        if not usable:
            reasons = [f"{v.kind.variant}: {v.excluded}" if v.kind.variant else v.excluded for v in variants]
            self.failures.append(Failure(name, number, "; ".join(reasons)))
            return
        best = min((case for _, case in usable), key=lambda case: case.trial)
        chosen = best.method.variant
        best.note = f"{best.note} ({chosen})" if chosen else best.note
        if self.setting.compiled and not best.method.compiles:
            best.note += "; does not run on compiled models, so not compiled here"
        for variant, case in usable:
            slower = f"{case.trial / best.trial:.1f} times slower at K = {number}"
            if case.trial > HOPELESS * best.trial:
                variant.excluded, variant.method = slower, None
            elif case is not best:
                best.note += f"; {variant.kind.variant}: {slower}"
        best.note += "".join(f"; {v.kind.variant}: {v.excluded}" for v in variants if v.excluded)
        self.cases.append(best)

    def _try(self, variant: Variant, number: int, truth: Truth) -> Case:
        """Checks one variant at one K."""
        available = measure.free_bytes(self.setting)
        if variant.last is not None:
            expected = variant.last.peak_bytes * number / variant.last.batch.num_groups
            if expected > available + variant.last.peak_bytes:
                raise UnusableMethodError(f"memory: may need {expected / 2**30:.0f} GiB at K = {number}")
        if variant.method is None:
            try:
                variant.method = variant.kind(self.workload, self.setting)
            except ImportError as error:
                raise UnusableMethodError(f"not installed: {error}") from error
            except Exception as error:
                raise UnusableMethodError(f"refuses the model: {error}") from error
        batch = self.workload.batch(number, self.setting.device)
        variant.last = measure.check(variant.method, batch, truth, available)
        return variant.last

    def run(self, rounds: int, seconds: float, repeats: int) -> None:
        """Times all cases in turn.

        Args:
            rounds: At most; slow methods take part in fewer.
            seconds: Time to spend; no round is begun after it, but some are made in any case.
            repeats: Steps per timing.
        """
        deadline = time.perf_counter() + seconds
        gc.collect()
        gc.freeze()  # what exists by now need not be looked through at every collection
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() > deadline:
                break
            taking_part = [case for case in self.cases if number < self._rounds_of(case, rounds)]
            left = f"{max(0.0, deadline - time.perf_counter()) / 60:.1f} min left for this model"
            self.log(f"round {number + 1} of at most {rounds}, {left}")
            measure.run_round(self.plain, taking_part, number, repeats)
        gc.unfreeze()

    def _rounds_of(self, case: Case, rounds: int) -> int:
        """How many rounds a case takes part in: the slower, the fewer."""
        if case.method.name in EVERY_ROUND:
            return rounds
        fewest = FEWEST_ROUNDS if case.trial < 10 * self.plain_seconds else FEWEST_ROUNDS_SLOW
        return max(fewest, min(rounds, int(1.5 * rounds * self.plain_seconds / case.trial)))
