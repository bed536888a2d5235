"""Weights of the tasks from the Gramian of their gradients alone, by TorchJD's methods.

Every method here combines the rows of the Jacobian J (K, P) to a vector J' w, and w depends on J through J J' only: K x
K numbers are enough. Sources: PCGrad (arXiv 2001.06782), Nash-MTL (2202.01017), CAGrad (2110.14048), MGDA (Désidéri
2012; Sener and Koltun, 1810.04650), IMTL-G (Liu et al., ICLR 2021), Aligned-MTL (CVPR 2023, 2305.19000), UPGrad
(2406.16232), ConFIG (2408.11104), GradVac (2010.05874).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.errors import UserInputError
from lightning_modules.seeding import seeded_global

SUMS_OF_GRADIENTS = frozenset({"pcgrad", "gradvac", "config"})
"""Methods that give the sum of the tasks' gradients where none conflict; the others give their mean, or less."""
_USUAL_TRACES = (1e-2, 1e4)
_MATRIX_METHODS = frozenset({"nash_mtl", "config"})


class GramianWeights:
    """One method. Some have a memory: Nash-MTL starts from its last solution, GradVac averages cosines.

    Args:
        config: Its parameters.
        num_tasks: K.

    Raises:
        UserInputError: If packages that the method's solver needs are not installed.
    """

    def __init__(self, config: BalancingConfig, num_tasks: int) -> None:
        self.method = config.method
        self.num_tasks = num_tasks
        try:
            self._solver = _solver(config, num_tasks)
        except ImportError as error:
            raise UserInputError(
                f"balancing.method {config.method} needs packages that are not installed: {error}"
            ) from error

    def __call__(self, gramian: Tensor, *entropy: int) -> Tensor:
        """Weights (K,) such that sum of w_k grad L_k is the method's gradient; 1 / K each is the mean gradient.

        Methods that TorchJD defines as a sum are divided by K.

        Args:
            gramian: (K, K), of the tasks' gradients; computed in float64 on the CPU.
            entropy: Integers that PCGrad's and GradVac's random orders follow from.
        """
        exact = gramian.detach().to("cpu", torch.float64)
        size = float(exact.trace())
        # The solvers have tolerances of absolute size, which must not decide about gradients that are small, or large.
        scale = 1.0 if _USUAL_TRACES[0] < size < _USUAL_TRACES[1] or size == 0 else size
        exact = exact / scale
        with torch.no_grad(), seeded_global(*entropy):
            weights = self._from_rows(exact) if self.method in _MATRIX_METHODS else self._solver(exact)
        if self.method == "nash_mtl":  # of the methods the only one whose weights depend on the gradients' size
            weights = weights / scale**0.5
        return (weights / self.num_tasks if self.method in SUMS_OF_GRADIENTS else weights).to(gramian.device)

    def _from_rows(self, gramian: Tensor) -> Tensor:
        """The weights of a method that asks for a Jacobian: any with this Gramian will do, also a square one."""
        values, vectors = torch.linalg.eigh(gramian)
        noise = values.max() * len(values) * torch.finfo(values.dtype).eps  # its root would no longer look like noise
        rows = (vectors * torch.where(values > noise, values, 0.0).sqrt()) @ vectors.T
        if self.method == "nash_mtl":
            self._start_inside(gramian / torch.linalg.matrix_norm(gramian))
            return self._solver(rows)
        return torch.linalg.pinv(rows.T) @ self._solver(rows)

    def _start_inside(self, gramian: Tensor) -> None:
        """Lets Nash-MTL's solver start where all tasks gain, if its last solution, or its first guess, harms one.

        Its problem has logarithms of the gains. Started outside of their domain, as in the authors' code, it is
        unbounded, and the weights stay what they were: in a conflict, of all cases. MGDA's point is inside, whenever
        any is.
        """
        start = torch.as_tensor(self._solver.prvs_alpha, dtype=torch.float64)
        if bool((gramian @ start > 0).all()):
            return
        inside = _simple_solver("mgda")(gramian) + 1e-3 / self.num_tasks
        inside *= (self.num_tasks / (inside @ gramian @ inside)).sqrt()  # the solution's length: its w' G w is K
        if bool((gramian @ inside > 0).all()):
            self._solver.prvs_alpha = inside.numpy()

    def state(self) -> dict[str, Tensor]:
        """What the method remembers, for a checkpoint."""
        if self.method == "nash_mtl":
            return {"solution": torch.as_tensor(self._solver.prvs_alpha, dtype=torch.float64).clone()}
        return {name: value.clone() for name, value in self._solver.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        if self.method == "nash_mtl":
            self._solver.prvs_alpha = state["solution"].numpy()
        elif state:
            self._solver(torch.eye(self.num_tasks, dtype=torch.float64))  # lets it make room for what it remembers
            self._solver.load_state_dict(state)


def _solver(config: BalancingConfig, num_tasks: int) -> Any:
    """TorchJD's part that maps a Gramian to weights; a Jacobian for Nash-MTL, and to a vector for ConFIG."""
    from torchjd import aggregation

    if config.method == "nash_mtl":
        nash = aggregation.NashMTL(num_tasks, max_norm=config.nash_max_norm, optim_niter=config.nash_iterations)
        return nash.weighting
    if config.method == "cagrad":
        return aggregation.CAGradWeighting(c=config.cagrad_c)
    if config.method == "gradvac":
        return aggregation.GradVacWeighting(beta=config.gradvac_beta)
    return _simple_solver(config.method)


def _simple_solver(method: str) -> nn.Module:
    """One without parameters."""
    from torchjd import aggregation

    solvers: dict[str, type[nn.Module]] = {
        "pcgrad": aggregation.PCGradWeighting,
        "mgda": aggregation.MGDAWeighting,
        "imtl_g": aggregation.IMTLGWeighting,
        "aligned_mtl": aggregation.AlignedMTLWeighting,
        "upgrad": aggregation.UPGradWeighting,
        "config": aggregation.ConFIG,
    }
    return solvers[method]()
