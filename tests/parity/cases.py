"""Recomputes, with our code and in float64, every quantity that a recorded case of the official code contains."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.diffusion import DiffusionConfig, GaussianDiffusion
from lightning_modules.loss_weights import LossWeightConfig, loss_weight
from lightning_modules.noise_schedules import ScheduleName
from lightning_modules.routing import MaskConfig, route

Arrays = Mapping[str, np.ndarray]
GRADIENT_NORMS = "gradient_norm_of_mean_loss"
"""Key of a case's description: norm of the mean loss's gradient by parameter."""
INPUTS = ("x0", "noise", "t", "y")
WEIGHT_PREFIX = "weight."


@dataclasses.dataclass(frozen=True)
class Case:
    """A recorded case.

    Attributes:
        name: Its key in ``cases.json``.
        description: Its entry there. What is missing is read off the arrays, or is as in the official defaults.
        arrays: Contents of its ``.npz`` file.
    """

    name: str
    description: Mapping[str, Any]
    arrays: Arrays

    def setting(self, key: str, default: Any) -> Any:
        """A described setting, or the default where the description lacks it (or says null)."""
        value = self.description.get(key)
        return default if value is None else value

    def array(self, key: str) -> Tensor:
        """An input array; floats as float64.

        Raises:
            ValueError: If the file lacks it.
        """
        if key not in self.arrays:
            raise ValueError(f"{self.name}.npz lacks the array {key!r}")
        tensor = torch.from_numpy(np.asarray(self.arrays[key]))
        return tensor.double() if tensor.is_floating_point() else tensor.long()

    @property
    def num_timesteps(self) -> int:
        return self.setting("num_timesteps", 1000)


def build_model(case: Case) -> DiT:
    """The case's DiT in float64 with its recorded weights, routed where the case is.

    Raises:
        ValueError: If weights are missing, or do not fit the description.
    """
    weights = {
        key.removeprefix(WEIGHT_PREFIX): torch.from_numpy(value)
        for key, value in case.arrays.items()
        if key.startswith(WEIGHT_PREFIX)
    }
    patches = case.array(f"{WEIGHT_PREFIX}x_embedder.proj.weight")  # (C, C_in, p, p)
    hidden_size, in_channels, patch_size = case.setting("hidden_size", patches.shape[0]), *patches.shape[1:3]
    if "num_heads" not in case.description:
        raise ValueError(f"{case.name} in cases.json lacks num_heads, which its weights do not tell")
    label_rows = (
        weights["y_embedder.embedding_table.weight"].shape[0] if "y_embedder.embedding_table.weight" in weights else 0
    )
    num_classes = case.setting("num_classes", max(label_rows - 1, 0)) if label_rows else 0
    out_channels = case.array(f"{WEIGHT_PREFIX}final_layer.linear.bias").numel() // patch_size**2
    inner_size = case.array(f"{WEIGHT_PREFIX}blocks.0.mlp.fc1.bias").numel()
    mlp_ratio = (inner_size + 0.5) / hidden_size  # the half survives the model's truncation to an integer
    config = DiTConfig(
        input_size=case.setting("input_size", case.array("x0").shape[-1]),
        patch_size=case.setting("patch_size", patch_size),
        in_channels=case.setting("in_channels", in_channels),
        hidden_size=hidden_size,
        depth=case.setting("depth", len({key.split(".")[1] for key in weights if key.startswith("blocks.")})),
        num_heads=case.description["num_heads"],
        mlp_ratio=case.setting("mlp_ratio", mlp_ratio),
        num_classes=num_classes,
        label_dropout=0.1 if label_rows > num_classes else 0.0,
        learn_sigma=case.setting("learn_sigma", out_channels == 2 * in_channels),
    )
    model = DiT(config).double()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {case.name} do not fit its description: {error}") from error
    beta = case.setting("beta", 0.8)
    if case.setting("routed", "beta" in case.description and beta < 1):
        route(model, MaskConfig(alpha=case.setting("alpha", 4), beta=beta, variant="official"), case.num_timesteps)
    return model.eval()


def build_diffusion(case: Case, learn_sigma: bool) -> GaussianDiffusion:
    """The case's diffusion; a fixed variance is the large one, as in DiT."""
    return GaussianDiffusion(
        DiffusionConfig(
            schedule=schedule_name(case.setting("schedule", "linear")),
            num_timesteps=case.num_timesteps,
            target=case.setting("target", "epsilon"),
            variance=case.setting("variance", "learned_range" if learn_sigma else "fixed_large"),
        )
    )


def schedule_name(name: str) -> ScheduleName:
    """Our name of a schedule; the official code also knows cosine by a longer one."""
    return cast(ScheduleName, {"squaredcos_cap_v2": "cosine"}.get(name, name))


def parse_loss_weight(name: str) -> LossWeightConfig:
    """A weighting by its name in the official code: ``constant``, ``min_snr_N``, ``p2`` or ``p2_GAMMA``.

    Raises:
        ValueError: For any other name.
    """
    if name.lower() in ("constant", "uniform"):
        return LossWeightConfig("uniform")
    if match := re.fullmatch(r"(min_snr|p2)(?:_([0-9.]+))?", name.lower()):
        kind, number = match.groups()
        if kind == "min_snr":
            return LossWeightConfig("min_snr", min_snr_gamma=float(number or 5))
        return LossWeightConfig("p2", p2_gamma=float(number or 1))
    raise ValueError(f"unknown loss weight {name!r}: known are constant, min_snr_N, p2 and p2_GAMMA")


def quantities(case: Case) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Everything the case records, as name, our value and its value.

    ``loss.mse`` is weighted, as the official code reports it. Gradient norms are compared in the description's order.

    Raises:
        ValueError: If the case cannot be recomputed from its arrays and description.
    """
    model = build_model(case)
    diffusion = build_diffusion(case, model.config.learn_sigma)
    x0, noise, t = case.array("x0"), case.array("noise"), case.array("t")
    x_t = diffusion.q_sample(x0, t, noise)
    output = model(x_t, t, case.array("y") if model.config.num_classes else None)
    losses = diffusion.losses(output, x0, x_t, t, noise)
    weight = loss_weight(
        parse_loss_weight(case.setting("loss_weight", "constant")), diffusion.snr[t], diffusion.config.target
    )
    mse = weight * losses.mse
    total = mse if losses.vb is None else mse + losses.vb
    posterior = diffusion.p_mean_variance(output, x_t, t)
    ours = {
        "x_t": x_t,
        "model_output": output,
        "loss.mse": mse,
        "loss.loss": total,
        "p_mean": posterior.mean,
        "p_log_variance": posterior.log_variance,
    }
    if losses.vb is not None:
        ours["loss.vb"] = losses.vb
    for name, value in ours.items():
        if name in case.arrays:
            yield name, value.detach().numpy(), case.arrays[name]
    if "interval_gramian" in case.arrays:
        reference = case.arrays["interval_gramian"]
        intervals = case.setting("intervals", len(reference))
        yield "interval_gramian", interval_gramian(model, total, intervals).numpy(), reference
    if norms := case.description.get(GRADIENT_NORMS):
        yield GRADIENT_NORMS, gradient_norms(model, total.mean(), list(norms)), np.array(list(norms.values()))


def trainable(model: DiT) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradient(loss: Tensor, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Gradients by parameter name; zero where the loss does not depend on the parameter."""
    tensors = list(parameters.values())
    parts = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, parts, strict=True))


def interval_gramian(model: DiT, losses: Tensor, intervals: int) -> Tensor:
    """Gramian (K, K) of the gradients of the mean losses of K equal consecutive parts of the batch.

    Args:
        model: The model that computed the losses.
        losses: Losses per sample ``(B,)``.
        intervals: K.

    Raises:
        ValueError: If K does not divide B.
    """
    if len(losses) % intervals:
        raise ValueError(f"a batch of {len(losses)} cannot be cut into {intervals} equal intervals")
    parameters = trainable(model)
    rows = [
        torch.cat([part.flatten() for part in gradient(losses_of_interval.mean(), parameters).values()])
        for losses_of_interval in losses.chunk(intervals)
    ]
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def gradient_norms(model: DiT, loss: Tensor, names: list[str]) -> np.ndarray:
    """Norm of the loss's gradient for each named parameter, shape ``(len(names),)``.

    Raises:
        ValueError: If the model has no trainable parameter of such a name.
    """
    gradients = gradient(loss, trainable(model))
    if unknown := sorted(set(names) - gradients.keys()):
        raise ValueError(f"the model has no trainable parameter {', '.join(unknown)}")
    return np.array([gradients[name].norm().item() for name in names])
