"""What a balanced training step costs: ours and K retained backward passes, as LibMTL does, in one run on one machine.

``python -m experiments.benchmarks.balancing [--json]`` measures the whole training step (forward, backward, AdamW step)
of a DiT whose K tasks' gradients are combined in every step, by each gradient method,

- ours, with the tasks' gradients kept (``keep``), or with a second backward pass (``second_pass``);
- the reference: one forward pass, K backward passes over its retained graph into a K x P matrix, and TorchJD's
  aggregator on that matrix, whose result is written back.

All three gradients are compared first. Times are ratios to the plain steps just before and after, medians over rounds;
each round takes all steps in an order of its own. ``plain_ratio`` is the plain step against its neighbours: what ratio
noise alone can give.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchjd import aggregation

from experiments.benchmarks.gramian.__main__ import progress
from experiments.benchmarks.gramian.workloads import Batch, Workload, dit
from lightning_modules.balancing.balancer import Situation
from lightning_modules.balancing.build import build_balancer
from lightning_modules.balancing.config import GRADIENT_METHODS, BalancingConfig
from lightning_modules.balancing.gramian_weights import SUMS_OF_GRADIENTS
from lightning_modules.seeding import seeded_global

WAYS = ("keep", "second_pass")
_ENTROPY = (0,)
TARGET = 1.8
TARGET_K = 8


@dataclasses.dataclass
class Steps:
    """One method at one K: its steps by way (``keep``, ``second_pass``, ``reference``), and what they took.

    Attributes:
        method: The method.
        num_tasks: K.
        take: For each way a function that takes a training step.
        errors: For ours, the gradient's largest deviation from the reference's, relative to its largest entry.
        ratios: For each way seconds of a step over those of its neighbouring plain steps, one per round.
    """

    method: str
    num_tasks: int
    take: dict[str, Callable[[], None]]
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    ratios: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class Trainee:
    """A model, a batch and an optimizer; a learning rate of 0 keeps all steps at the same weights."""

    def __init__(self, workload: Workload, num_tasks: int) -> None:
        self.workload = workload
        self.model = workload.network()
        self.batch: Batch = conflicting(workload.batch(num_tasks))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    def losses(self) -> Tensor:
        """Losses (B,)."""
        return self.workload.losses(self.model, *self.batch.tensors())

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def plain(self) -> None:
        """A plain training step."""
        self.losses().mean().backward()
        self.update()

    def balanced(self, config: BalancingConfig) -> Callable[[], None]:
        """Ours: leaves the gradient, for the optimizer."""
        numbers = sum(parameter.numel() for parameter in self.parameters)
        balancer = build_balancer(config, self.batch.num_groups, numbers)

        def backward() -> None:
            with balancer.watch(self.model, Situation(self.batch.group, 0, entropy=_ENTROPY)) as to_loss:
                loss = to_loss(self.losses())
            loss.backward()

        return backward

    def reference(self, method: str) -> Callable[[], None]:
        """K retained backward passes and TorchJD's aggregator."""
        K = self.batch.num_groups
        aggregator = reference_aggregators(K)[method]
        length = sum(parameter.numel() for parameter in self.parameters)

        def backward() -> None:
            jacobian = torch.empty(K, length)
            losses = self.batch.task_means(self.losses()).unbind()
            for index, loss in enumerate(losses):
                rows = torch.autograd.grad(loss, self.parameters, retain_graph=index + 1 < K)
                torch.cat([row.flatten() for row in rows], out=jacobian[index])
            with seeded_global(*_ENTROPY):
                combined = aggregator(jacobian) / (K if method in SUMS_OF_GRADIENTS else 1)
            for parameter, part in zip(
                self.parameters, combined.split([p.numel() for p in self.parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)

        return backward


def conflicting(batch: Batch) -> Batch:
    """The batch with targets that pull the tasks apart in turn, so that the methods have conflicts to resolve."""
    pull = torch.where(batch.group % 2 == 0, 2.0, -1.0).view(-1, 1, 1, 1)
    return dataclasses.replace(batch, noise=batch.noise + pull)


def reference_aggregators(num_tasks: int) -> dict[str, aggregation.Aggregator]:
    """TorchJD's aggregators by our methods' names, with our methods' parameters."""
    defaults = BalancingConfig()
    return {
        "pcgrad": aggregation.PCGrad(),
        "nash_mtl": aggregation.NashMTL(
            num_tasks, max_norm=defaults.nash_max_norm, optim_niter=defaults.nash_iterations
        ),
        "cagrad": aggregation.CAGrad(c=defaults.cagrad_c),
        "mgda": aggregation.MGDA(),
        "imtl_g": aggregation.IMTLG(),
        "aligned_mtl": aggregation.AlignedMTL(),
        "upgrad": aggregation.UPGrad(),
        "config": aggregation.ConFIG(),
        "gradvac": aggregation.GradVac(beta=defaults.gradvac_beta),
    }


def prepared(trainee: Trainee, method: str) -> Steps:
    """The steps of a method; compares their gradients, which warms them up."""
    K = trainee.batch.num_groups
    backward = {way: trainee.balanced(BalancingConfig(method=method, gradients=way)) for way in WAYS}  # type: ignore[arg-type]
    backward["reference"] = trainee.reference(method)
    gradients = {}
    for way, run in backward.items():
        run()
        gradients[way] = torch.cat([p.grad.flatten() for p in trainee.parameters if p.grad is not None])
        trainee.optimizer.zero_grad(set_to_none=True)

    def step(run: Callable[[], None]) -> Callable[[], None]:
        def take() -> None:
            run()
            trainee.update()

        return take

    expected = gradients["reference"]
    errors = {way: float((gradients[way] - expected).abs().max() / expected.abs().max()) for way in WAYS}
    return Steps(method, K, {way: step(run) for way, run in backward.items()}, errors)


def run_rounds(trainee: Trainee, compared: Sequence[Steps], rounds: int, log: Callable[[str], None]) -> list[float]:
    """Times all steps, ``rounds`` times; the ratios of plain steps to their neighbours."""
    seconds, alone = _timer(trainee.plain), []
    for number in range(rounds):
        jobs = [(steps, way) for steps in compared for way in steps.take]
        random.Random(number).shuffle(jobs)
        before = seconds()
        for index, (steps, way) in enumerate(jobs):
            log(f"round {number + 1} of {rounds}, step {index + 1} of {len(jobs)}")
            took, after = _timer(steps.take[way])(), seconds()
            steps.ratios.setdefault(way, []).append(2 * took / (before + after))
            alone.append(2 * after / (before + (last := seconds())))
            before = last
    return alone


def _timer(take: Callable[[], None]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        take()
        return time.perf_counter() - start

    return measure


def rows_of(compared: Sequence[Steps]) -> list[dict[str, Any]]:
    """A row for each method and way of ours."""
    return [
        {
            "method": steps.method,
            "K": steps.num_tasks,
            "gradients": way,
            "ratio_to_plain": statistics.median(steps.ratios[way]),
            "reference_ratio_to_plain": statistics.median(steps.ratios["reference"]),
            "range": [min(steps.ratios[way]), max(steps.ratios[way])],
            "gradient_error": steps.errors[way],
            "rounds": len(steps.ratios[way]),
        }
        for steps in compared
        for way in WAYS
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of fixed width, and whether they meet the target."""
    lines = [
        f"{'method':12} {'K':>3} {'gradients':12} {'step / plain':>12} {'range':>11} {'K passes / plain':>17} error"
    ]
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"{row['method']:12} {row['K']:3} {row['gradients']:12} {row['ratio_to_plain']:12.2f} "
            f"{f'{low:.2f}-{high:.2f}':>11} {row['reference_ratio_to_plain']:17.2f}"
        )
    late = [row for row in rows if row["K"] == TARGET_K and row["ratio_to_plain"] > TARGET]
    names = ", ".join(f"{row['method']} ({row['gradients']})" for row in late)
    lines.append(f"At most {TARGET} times the plain step at K = {TARGET_K}: {'all but ' + names if late else 'all'}")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.balancing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--methods", nargs="+", default=list(GRADIENT_METHODS), choices=GRADIENT_METHODS)
    parser.add_argument("--K", nargs="+", type=int, default=[TARGET_K], help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the DiT (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="its blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples per step (default: %(default)s)")
    parser.add_argument("--input-size", type=int, default=16, help="height and width (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = arguments()
    options = parser.parse_args(given)
    if any(options.batch % K for K in options.K) or options.rounds < 1:
        parser.error("every K must divide --batch, and --rounds must be at least 1")
    warnings.filterwarnings("ignore")
    workload = dit(options.width, options.depth, options.batch, options.input_size)
    log = progress()
    rows: list[dict[str, Any]] = []
    alone: list[float] = []
    for K in options.K:
        trainee = Trainee(workload, K)
        compared = []
        for method in options.methods:
            log(f"K = {K}: comparing gradients of {method}")
            compared.append(prepared(trainee, method))
        alone += run_rounds(trainee, compared, options.rounds, log)
        rows += rows_of(compared)
    log("done")
    result = {"rows": rows, "plain_ratio": statistics.median(alone), "plain_range": [min(alone), max(alone)]}
    print(json.dumps(result) if options.json else table(rows))


if __name__ == "__main__":
    main()
