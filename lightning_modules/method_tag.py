"""The name of what a run does, for comparing runs: routing and multi-task optimisation, as ``dtr+min_snr+upgrad``."""

from __future__ import annotations

from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.masks import MaskConfig
from lightning_modules.samplers import SamplerConfig

_SAMPLER_TAGS = {"uniform": "uniform_t", "speed": "speed_sampling"}
"""Where a sampler's name alone would be that of something else."""


def method_tag(
    routing: MaskConfig | None, loss_weight: LossWeightConfig, balancing: BalancingConfig, sampler: SamplerConfig
) -> str:
    """``<routing>[+<part> ...]``; parts are what differs from plain training, in the order of the arguments.

    Runs of one tag are taken for runs of one method. Parameters of a method (alpha, beta, gamma, …) are not in it.
    """
    parts: list[str] = ["baseline" if routing is None else routing.kind]
    if routing is not None and routing.per_block:
        parts.append("per_block")
    if routing is not None and routing.beta_last is not None:
        parts.append("depth")
    if loss_weight.name != "uniform":
        parts.append(loss_weight.name)
    if balancing.method != "none":
        parts.append(balancing.method)
    if sampler.name != "stratified":
        parts.append(_SAMPLER_TAGS.get(sampler.name, sampler.name))
    return "+".join(parts)
