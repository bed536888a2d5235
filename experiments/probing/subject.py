"""What `dtr-lab probe` measures: the network of a checkpoint, from DTR Lab or elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_modules.backbones.backbone import Backbone
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.denoiser import DenoiserModule
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.published import load_published, read_weights_file
from lightning_modules.run_record import RESUME_KEY
from lightning_modules.tracking.callback import CHECKPOINT_KEY


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to measure.

    Attributes:
        module: Its loss, diffusion and settings; in evaluation mode, on the device.
        backbone: The weights to measure: ``module``'s own or their average. Requires gradients where training does.
        weights: ``"averaged"``, ``"raw"``, ``"published"`` or ``"published raw"``.
        path: The checkpoint.
        run_id: The MLflow run that wrote it, if known.
        step: Optimizer steps it was trained for, if known.
        dataset: Name of the data set it was trained on, if known.
        attempt: The attempt of that run which wrote it.
        optimizer_state: Of the trained weights, if the checkpoint has it.
    """

    module: DenoiserModule
    backbone: Backbone
    weights: str
    path: Path
    run_id: str | None = None
    step: int | None = None
    dataset: str | None = None
    attempt: int = 1
    optimizer_state: dict[str, Any] | None = None


def load_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """Loads the checkpoint that was named, of whichever kind it is.

    Raises:
        UserInputError: If it is none, or options do not apply to it.
    """
    contents = read_weights_file(args.checkpoint)
    if "hyper_parameters" not in contents:
        module: DenoiserModule = load_published(
            args.checkpoint, contents=contents, num_heads=args.num_heads, raw=args.raw_weights
        )
        weights = "published raw" if args.raw_weights else "published"
        found = Subject(module, module.backbone, weights, args.checkpoint)
    else:
        if args.num_heads is not None:
            raise UserInputError(f"--num-heads: {args.checkpoint} stores its own; the option is for published DiTs")
        module = load_denoiser(args.checkpoint)
        found = Subject(
            module,
            module.backbone if args.raw_weights else _averaged(module),
            "raw" if args.raw_weights else "averaged",
            args.checkpoint,
            run_id=contents.get(CHECKPOINT_KEY, {}).get("run_id"),
            step=contents.get("global_step"),
            dataset=contents.get(RESUME_KEY, {}).get("data"),
            attempt=contents.get(CHECKPOINT_KEY, {}).get("attempt", 1),
            optimizer_state=next(map(backbone_state, contents.get("optimizer_states", [])), None),
        )
    if args.loss_weight is not None:
        module.weigh_timesteps(LossWeightConfig(name=args.loss_weight))
    module.to(device)
    return found


def backbone_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer's state dict holds of the backbone, its first group; learned loss weights are behind it."""
    group = state["param_groups"][0]
    return {
        "state": {index: state["state"][index] for index in group["params"] if index in state["state"]},
        "param_groups": [group],
    }


def _averaged(module: DenoiserModule) -> Backbone:
    """The averaged weights, with gradients for those parameters that are trained."""
    averaged = module.ema.module
    assert isinstance(averaged, Backbone)
    for trained, parameter in zip(module.backbone.parameters(), averaged.parameters(), strict=True):
        parameter.requires_grad_(trained.requires_grad)
    return averaged
